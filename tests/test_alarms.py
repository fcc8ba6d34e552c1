"""Alarms: a task for each with exactly that fault, and healthy ones of which nothing is told."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import cli
from lightkit.callbacks import EMA, SWA, BackboneFinetuning

ROOT = Path(__file__).parents[1]


def data(samples=64, classes=3, batch=4):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=made)
    return DataLoader(TensorDataset(x, x.argmax(1) % classes), batch)


class Task(lk.TaskModule):
    """Two layers over six numbers and three classes; the tests change one thing of it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.fixture
def told(caplog):
    """Returns what was told so far, as pairs of name and text."""
    caplog.set_level(logging.INFO, "lightkit")

    def found():
        records = [r for r in caplog.records if hasattr(r, "hint")]
        return [(r.hint, re.sub(r"^\w+: +|\s\[.*$", "", r.getMessage())) for r in records]

    return found


# --- faults --------------------------------------------------------------------------------------


def test_a_layer_that_forward_does_not_call_is_named(quiet, told):
    class Unused(Task):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    quiet().fit(Unused(), data())
    ((name, text),) = told()
    assert name == "no-gradient"
    assert text.startswith(
        "2 of 6 trainable parameters got no gradient in the first 10 steps: extra.bias, extra.weight."
    )


def test_a_loss_that_is_cut_off_from_a_part_is_told_also_by_a_short_fit(quiet, told):
    class Cut(Task):
        def forward(self, x):
            return self.head(self.body(x).detach())

    quiet(max_steps=2).fit(Cut(), data())
    assert told() == []  # too little to tell it from parts that take turns
    quiet(max_steps=3).fit(Cut(), data())
    ((name, text),) = told()
    assert name == "no-gradient"
    assert "2 of 4" in text
    assert "in the first 3 steps: body.bias, body.weight" in text


def test_modules_without_a_gradient_other_than_zero_are_named(quiet, told):
    class Dead(Task):
        def __init__(self):
            super().__init__()
            nn.init.constant_(self.body.bias, -100.0)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))

    quiet().fit(Dead(), data())
    ((name, text),) = told()
    assert name == "zero-gradient"
    assert text.startswith("The gradients of 1 of 2 modules were zero in the first 10 steps: body.")


def test_steps_that_change_nothing_are_told(quiet, told):
    class Forgets(Task):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()

    quiet().fit(Forgets(), data())
    ((name, text),) = told()
    assert name == "no-change"
    start = "Nothing changed in the first 10 steps: in none of 4 parameters the element with the "
    assert text.startswith(start)
    assert "at a learning rate of 0.1. Look for an optimizer_step that does not step" in text


@pytest.mark.parametrize("schedule", [False, True])
def test_a_rate_of_zero_is_told(quiet, told, schedule):
    class Still(Task):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.0)
            if not schedule:
                return optimizer
            made = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.0, total_steps=100)
            return [optimizer], [{"scheduler": made, "interval": "step"}]

    quiet().fit(Still(), data())
    ((name, text),) = told()
    assert name == "no-change"
    assert text.startswith(
        "Nothing changed in the first 10 steps: the learning rate is 0, and so is"
    )


def test_a_rate_below_what_the_weights_can_hold_is_told(quiet, told):
    class Tiny(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-12)

    quiet(precision="bf16-true").fit(Tiny(), data())
    ((name, text),) = told()
    assert name == "no-change"
    assert text.endswith("whether the rate is too small for bfloat16.")


@pytest.mark.parametrize("how", ["zeroes gradients", "drops gradients", "puts weights back"])
def test_hooks_that_undo_the_step_are_told(quiet, told, how):
    class Undoes(Task):
        def on_after_backward(self):
            for p in self.parameters():
                if how == "zeroes gradients":
                    p.grad.zero_()
                elif how == "drops gradients":
                    p.grad = None

        def on_train_batch_start(self, batch, batch_idx):
            vars(self)["before"] = [p.detach().clone() for p in self.parameters()]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if how == "puts weights back":
                with torch.no_grad():
                    for p, old in zip(self.parameters(), self.before, strict=True):
                        p.copy_(old)

    quiet().fit(Undoes(), data())
    assert [name for name, _ in told()] == ["no-change"]


def test_an_optimizer_that_lacks_what_others_have_does_not_step(quiet, told):
    class Own(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.param_groups[0]["lr"] = None
            del self.defaults

        def step(self, closure=None):
            pass

    quiet().fit(Optimized(Own), data())
    ((name, text),) = told()
    assert name == "no-change"
    assert "at a learning rate of its own." in text


def test_a_layer_that_never_comes_is_told_later_where_others_take_turns(quiet, told):
    class Depths(Task):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.body(x)
            for block in self.blocks[:-1]:
                x = x + block(x) if torch.rand(()) < 0.5 else x
            return self.head(x)

    quiet(max_epochs=6).fit(Depths(), data())
    assert told() == []
    quiet(max_epochs=7).fit(Depths(), data())
    ((name, text),) = told()
    assert name == "no-gradient"
    assert "in the first 100 steps: blocks.2.bias, blocks.2.weight." in text


@pytest.mark.parametrize("automatic", [True, False])
def test_a_step_that_leaves_eval_mode_behind_is_told(quiet, told, automatic):
    class Looks(Task):
        def __init__(self):
            super().__init__()
            self.drop, self.automatic_optimization = nn.Dropout(), automatic

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.eval()
            with torch.no_grad():
                self(batch[0])
            if not automatic:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    quiet(max_steps=3).fit(Looks(), data())
    assert [name for name, _ in told()] == ["eval-mode"]
    start = (
        "training_step left modules in eval mode, in the first 3 steps, that were in train mode: "
    )
    assert told()[0][1].startswith(f"{start}Looks. So they train")


@pytest.mark.parametrize("images", [False, True])
def test_a_first_loss_far_above_chance_is_a_hint(quiet, told, images, caplog):
    class Wild(Task):
        def __init__(self):
            super().__init__()
            nn.init.normal_(self.head.weight, std=1000.0)

        def training_step(self, batch, batch_idx):
            scores = self(batch[0])
            if images:
                scores, target = scores[:, :, None, None], batch[1][:, None, None]
                return F.cross_entropy(scores, target)
            return F.cross_entropy(scores, batch[1])

    quiet(max_steps=12, accumulate_grad_batches=2, max_epochs=-1).fit(Wild(), data())
    ((name, text),) = told()
    assert name == "high-loss"
    assert re.match(r"the first loss is [\d.e+]+, and guessing among 3 classes gives 1.1; ", text)
    assert [r.levelname for r in caplog.records if hasattr(r, "hint")] == ["INFO"]


class Given(Task):
    """A loss of its own, of what goes through something before it."""

    def __init__(self, before, loss, images=False):
        super().__init__()
        self.before, self.loss, self.images = before, loss, images

    def training_step(self, batch, batch_idx):
        scores, target = self.before(self(batch[0])), batch[1]
        if self.images:
            scores, target = scores[:, :, None, None], target[:, None, None]
        if self.loss is not F.cross_entropy:
            target = F.one_hot(target, 3).float()
        return self.loss(scores, target)


def softmax(scores):
    return scores.softmax(1)


@pytest.mark.parametrize("images", [False, True])
def test_a_softmax_before_a_cross_entropy_is_told(quiet, told, images, caplog):
    task = Given(softmax, F.cross_entropy, images)
    quiet(max_steps=12, accumulate_grad_batches=2, max_epochs=-1).fit(task, data())
    ((name, text),) = told()
    assert name == "probabilities"
    assert "went through a softmax already: so it cannot fall below 0.551." in text
    perfect = F.cross_entropy(torch.eye(3), torch.arange(3))
    assert perfect.item() == pytest.approx(0.551, abs=1e-3)
    assert [r.levelname for r in caplog.records if hasattr(r, "hint")] == ["WARNING"]


@pytest.mark.parametrize("weight", [None, torch.full((3,), 0.5)])
def test_a_sigmoid_before_a_cross_entropy_with_logits_is_told(quiet, told, weight):
    loss = partial(F.binary_cross_entropy_with_logits, pos_weight=weight)
    quiet().fit(Given(torch.sigmoid, loss), data())
    ((name, text),) = told()
    assert name == "probabilities"
    least = "falls slowly" if weight is not None else "cannot fall below 0.313"
    assert f"went through a sigmoid already: so it {least}." in text


def test_it_is_told_once_of_a_net_in_one_line(quiet, told, caplog):
    task = lk.SupervisedTask(nn.Sequential(net(), nn.Softmax(1)), loss="cross_entropy")
    quiet().fit(task, data())
    assert [name for name, _ in told()] == ["probabilities"]
    assert caplog.text.lower().count("softmax") == 3  # in one sentence


def test_faults_in_manual_optimization_are_told(quiet, told):
    class Manual(Task):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.extra, self.never = nn.Linear(2, 2), nn.Linear(2, 2)

        def configure_optimizers(self):
            one = [*self.body.parameters(), *self.head.parameters(), *self.extra.parameters()]
            return [torch.optim.SGD(p, lr=0.1) for p in (one, self.never.parameters())]

        def training_step(self, batch, batch_idx):
            optimizer, _ = self.optimizers()  # of the second one, which rests, nothing is known
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    quiet().fit(Manual(), data())
    ((name, text),) = told()
    assert name == "no-gradient"
    assert "extra.bias, extra.weight." in text


def test_faults_are_told_once_and_the_listeners_go(quiet, told):
    class Unused(Task):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

    trainer, lengths = quiet(max_epochs=2), []
    names = ("on_train_batch_start", "on_loss", "on_after_backward", "on_train_batch_end")

    @trainer.on("train_batch_start")
    def look():
        hooks = trainer.session.hooks
        lengths.append([len(getattr(hooks, name)) for name in names])

    trainer.fit(Unused(), data())
    assert len(told()) == 1
    rest = lengths[-1]
    assert lengths == [[n + 1 for n in rest]] * 10 + [rest] * 22

    lengths.clear()
    trainer.fit(Task(), data())  # where nothing is wrong they go after the first step
    assert lengths == [[n + 1 for n in rest]] + [rest] * 31


def test_weights_and_losses_are_those_of_a_fit_without_hints(quiet):
    def trained(**options):
        torch.manual_seed(0)
        task = Task()
        history = quiet(max_epochs=2, **options).fit(task, data())
        return history["train_loss"], [p.detach().clone() for p in task.parameters()]

    (losses, weights), (plain, others) = trained(), trained(hints=False)
    assert losses == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


# --- healthy tasks -------------------------------------------------------------------------------


@pytest.mark.parametrize("template", sorted(path.stem for path in ROOT.glob("configs/*.yaml")))
def test_nothing_is_told_of_the_templates(template, told, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    limits = (
        "max_epochs=1",
        "limit_train_batches=4",
        "limit_val_batches=1",
        "val_check_interval=1.0",
    )
    flags = [f"--trainer.{limit}" for limit in (*limits, f"default_root_dir={tmp_path}")]
    assert cli.main(["fit", "--config", f"configs/{template}.yaml", *flags]) == 0
    assert told() == []


class Optimized(Task):
    """With an optimizer of the test's."""

    def __init__(self, make, **schedule):
        super().__init__()
        self._make, self._schedule = make, schedule

    def configure_optimizers(self):
        optimizer = self._make(self.parameters())
        if not self._schedule:
            return optimizer
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, **self._schedule}}


class Sharpened(Task):
    """A step that goes up first, as SAM's."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        old = [p.detach().clone() for p in self.parameters()]
        with torch.no_grad():
            for p in self.parameters():
                p.add_(p.grad, alpha=0.05)
        optimizer.zero_grad()
        optimizer_closure()
        with torch.no_grad():
            for p, before in zip(self.parameters(), old, strict=True):
                p.copy_(before)
        optimizer.step()
        optimizer.zero_grad()


class Adversaries(Task):
    """Two optimizers that take turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.Adam(m.parameters(), lr=0.01) for m in (self.body, self.head)]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        self.untoggle_optimizer(optimizer)


class Frozen(Task):
    """A backbone that does not learn, in eval mode, set by every step."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.body.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.body.eval()
        return super().training_step(batch, batch_idx)


class Normed(Task):
    """Batch norms, of which one is kept in eval mode, and dropout; biases that cancel out."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))

    def training_step(self, batch, batch_idx):
        self.norm.eval()
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Residual(Task):
    """Branches that begin at zero: behind the last one there is no gradient in the first steps."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        for layer in (self.two, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.body(x)
        return self.head(x + self.two(torch.tanh(self.one(x))))


class Tied(Task):
    """Words in and out through one matrix."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        nn.init.normal_(self.words.weight, std=0.1)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.words(x.argmax(1)))))


class Sparse(Task):
    """Embeddings of which a step touches few rows, each in its own optimizer."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(1000, 8, sparse=True), nn.Linear(8, 3)
        del self.body

    def forward(self, x):
        return self.head(self.table((x[:, 0].abs() * 300).long()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recurrent(Task):
    """A GRU and attention over the numbers as a sequence."""

    def __init__(self):
        super().__init__()
        self.body = nn.GRU(1, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        states, _ = self.body(x[:, :, None])
        return self.head(self.attention(states, states, states)[0][:, -1])


class Turns(Task):
    """Two heads that take turns, by what the batch is."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        head = self.other if batch_idx % 2 else self.head
        return F.cross_entropy(head(torch.tanh(self.body(batch[0]))), batch[1])


class Weighted(Task):
    """Means of different weights, of which the first ones are zero; class weights."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 0.5]))
        return {"loss": loss, "weight": float(batch_idx > 1)}


class Skips(Task):
    """Skips a batch now and then, the first one too."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)


class Summed(Task):
    """A loss of many parts, above what chance gives, that is no mean of a cross entropy."""

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        whole = F.cross_entropy(scores, batch[1], reduction="sum")
        return 10 * whole + 100 + F.cross_entropy(scores, batch[1], label_smoothing=0.1)


class Looks(Task):
    """Looks at samples in eval mode within the step, and goes back."""

    def training_step(self, batch, batch_idx):
        self.eval()
        with torch.no_grad():
            self(batch[0])
        self.train()
        return super().training_step(batch, batch_idx)


class Lazy(Task):
    """Layers that are made by the first batch, and a parameter of the task's own."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.LazyLinear(8), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * super().forward(x)


class LoRA(Task):
    """A low rank beside a frozen layer, of which one factor is zero; steps of its own, each of 8."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) + self.up(self.down(x))))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 8)
        if batch_idx % 8 == 7:
            optimizer.step()
            optimizer.zero_grad()


class Experts(Task):
    """More experts than the first batches need: called with what is theirs, or not at all."""

    def __init__(self, dense):
        super().__init__()
        self.dense, self.gate = dense, nn.Linear(6, 32)
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(32))
        del self.body

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.dense or mine.any():
                out[mine] = weight[mine, None] * expert(x[mine])
        return self.head(out)


class Heads(Task):
    """One head for each kind of batch."""

    def __init__(self, count):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(count))
        del self.head

    def training_step(self, batch, batch_idx):
        head = self.heads[batch_idx % len(self.heads)]
        return F.cross_entropy(head(self.body(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


class Cancelled(Task):
    """A last layer that rests in the first epoch: a hook takes its gradients away."""

    def on_after_backward(self):
        if not self.current_epoch:
            self.head.zero_grad()


class Made(Task):
    """A parameter of which a hook makes the gradient."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.ones(3))

    def on_after_backward(self):
        self.codes.grad = self.codes.detach() / 2


class Cosines(Task):
    """Cosines with a temperature: sure of itself from the first step."""

    def training_step(self, batch, batch_idx):
        one, other = F.normalize(self.body(batch[0])), F.normalize(self.head.weight)
        return F.cross_entropy(one @ other.T / 0.01, batch[1])

    def configure_optimizers(self):
        self.head.bias.requires_grad_(False)
        return super().configure_optimizers()


class InTurns(Adversaries):
    """Two parts, of which the one that rests is in eval mode."""

    def training_step(self, batch, batch_idx):
        parts = [self.body, self.head]
        parts[batch_idx % 2].train()
        parts[1 - batch_idx % 2].eval()
        super().training_step(batch, batch_idx)


class Taught(Task):
    """A teacher in eval mode that is in no optimizer, as a warning says; an average of weights."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(6, 3), nn.Dropout())
        self.average = torch.optim.swa_utils.AveragedModel(self.body)

    def training_step(self, batch, batch_idx):
        self.teacher.eval()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.update_parameters(self.body)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=0.1)


class Warmed(Task):
    """Rates that rise from too little for the numbers that hold the weights."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.by == "hand":
            optimizer.param_groups[0]["lr"] = 1e-10 * (batch_idx + 1)
        optimizer.step(optimizer_closure)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.by == "hand":
            return optimizer
        if self.by == "one cycle":
            made = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100_000, div_factor=1e8)
        else:
            made = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-8, 1.0, 10_000)
        return [optimizer], [{"scheduler": made, "interval": "step"}]


class ManualClosure(Task):
    """A step that differentiates until the last moment, in manual optimization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Mixed(Task):
    """Complex and double numbers, parametrized weights, a layer that is computed again."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
        nn.utils.parametrizations.weight_norm(self.body)
        nn.utils.parametrizations.spectral_norm(self.head)

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False)
        return self.head(((x.cfloat() @ self.mix).abs() * self.scale).float())


def finetuned():
    task = Task()
    task.backbone = task.body
    return task


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


OPTIM = torch.optim
HEALTHY = {
    "plain": (Task, {}),
    "adam": (partial(Optimized, partial(OPTIM.AdamW, lr=1e-5)), {}),
    "LBFGS": (partial(Optimized, partial(OPTIM.LBFGS, lr=0.1)), {}),
    "warm-up from 0": (partial(Optimized, partial(OPTIM.SGD, lr=0.1), interval="step"), {}),
    "a warm-up by epochs": (partial(Optimized, partial(OPTIM.SGD, lr=0.1), interval="epoch"), {}),
    "an average of weights": (Task, {"callbacks": [EMA(decay=0.9)]}),
    "stochastic averages": (Task, {"callbacks": [SWA(0.05, 1)]}),
    "a closure": (Sharpened, {}),
    "two optimizers": (Adversaries, {}),
    "accumulation": (Task, {"accumulate_grad_batches": 3}),
    "a frozen backbone": (Frozen, {}),
    "a backbone that thaws": (finetuned, {"callbacks": [BackboneFinetuning(1)]}),
    "norms and dropout": (Normed, {}),
    "branches from zero": (Residual, {}),
    "tied weights": (Tied, {}),
    "sparse embeddings": (Sparse, {}),
    "recurrent": (Recurrent, {}),
    "heads in turns": (Turns, {}),
    "weights": (Weighted, {}),
    "skipped batches": (Skips, {}),
    "another loss": (Summed, {}),
    "looks and returns": (Looks, {}),
    "lazy layers": (Lazy, {}),
    "bf16": (Task, {"precision": "bf16-mixed"}),
    "fp16": (Task, {"precision": "16-mixed"}),
    "clipped": (Task, {"gradient_clip_val": 0.01}),
    "a trial": (Task, {"fast_dev_run": True}),
    "half of it": (Task, {"precision": "bf16-true"}),
    "steps of 8 by hand, from zero": (LoRA, {}),
    "experts that are called": (partial(Experts, True), {}),
    "experts that are not called": (partial(Experts, False), {}),
    "twelve heads": (partial(Heads, 12), {}),
    "heads in a trial": (partial(Heads, 2), {"fast_dev_run": True}),
    "heads in three steps": (partial(Heads, 5), {"max_steps": 3}),
    "gradients taken away": (Cancelled, {}),
    "gradients made": (Made, {}),
    "cosines": (Cosines, {}),
    "logarithms of probabilities": (partial(Given, nn.LogSoftmax(1), F.cross_entropy), {}),
    "probabilities": (partial(Given, torch.sigmoid, F.binary_cross_entropy), {}),
    "logits": (partial(Given, nn.Identity(), F.binary_cross_entropy_with_logits), {}),
    "parts in turns in eval mode": (InTurns, {}),
    "a teacher": (Taught, {"hints": ["no-optimizer"]}),
    "a warm-up in half": (partial(Warmed, "steps"), {"precision": "bf16-true"}),
    "one cycle in half": (partial(Warmed, "one cycle"), {"precision": "bf16-true"}),
    "a warm-up by hand in half": (partial(Warmed, "hand"), {"precision": "bf16-true"}),
    "a closure by hand": (ManualClosure, {}),
    "numbers of other kinds": (Mixed, {}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_told_of_healthy_tasks(name, quiet, told):
    make, options = HEALTHY[name]
    quiet(**{"max_epochs": 2, **options}).fit(make(), data(), data(samples=8))
    assert told() == []


def test_nothing_is_told_of_a_net_in_one_line(quiet, told, tmp_path):
    x = torch.randn(32, 6)
    options = {"default_root_dir": tmp_path, "enable_progress_bar": False}
    lk.fit(net(), (x, x.argmax(1) % 3), loss="cross_entropy", epochs=1, **options)
    assert told() == []


# --- few batches, over and over ------------------------------------------------------------------


def test_few_batches_that_are_learnt_are_told_so(quiet, told):
    class Quick(Task):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    quiet(max_epochs=40, overfit_batches=2).fit(Quick(), data())
    ((name, text),) = told()
    assert name == "overfit"
    assert re.fullmatch(
        r"learnt: train_loss went from 1\.\d+ to 0\.0\d+ in 80 steps on the same batches", text
    )


def test_an_accuracy_of_one_is_learnt_too(quiet, told):
    class Floor(Task):
        def training_step(self, batch, batch_idx):
            scores = self(batch[0])
            self.log("train_accuracy", (scores.argmax(1) == batch[1]).float().mean())
            return F.cross_entropy(scores, batch[1], label_smoothing=0.3)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    quiet(max_epochs=40, overfit_batches=2).fit(Floor(), data())
    assert told()[0][1].startswith("learnt: ")
    assert told()[0][1].endswith(", train_accuracy 1")


def test_few_batches_that_are_not_learnt_are_a_warning(quiet, told, caplog):
    class Wrong(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    quiet(max_epochs=5, overfit_batches=1).fit(Wrong(), data())
    ((name, text),) = told()
    assert name == "overfit"
    assert text.startswith("Not learnt: train_loss went from ")
    assert "below a tenth" in text
    assert [r.levelname for r in caplog.records if hasattr(r, "hint")] == ["WARNING"]


@pytest.mark.parametrize(
    ("by_step", "verdict"),
    [
        (lambda n: -1.0, "Not learnt: train_loss went from -1 to -1 in 40 steps"),
        (
            lambda n: -1.0 - n,
            "learning: train_loss went from -2.5 to -40.5 in 40 steps on the same",
        ),
        (lambda n: 3.0 - n, "learnt: train_loss went from 1.5 to -36.5"),
        (lambda n: 0.0, "learnt: train_loss went from 0 to 0"),
    ],
)
def test_a_verdict_on_losses_that_begin_at_zero_or_below(quiet, told, by_step, verdict):
    class Given(Task):
        def training_step(self, batch, batch_idx):
            return 0 * self(batch[0]).sum() + by_step(self.trainer.global_step + 1)

    own = ["zero-gradient", "no-change"]
    quiet(max_epochs=20, overfit_batches=2, hints=own).fit(Given(), data())
    assert told()[0][1].startswith(verdict)
    assert "tenth" not in told()[0][1] or verdict.startswith("Not")


def test_few_batches_that_are_on_their_way_are_told_to_go_on(quiet, told):
    quiet(max_epochs=15, overfit_batches=2).fit(Task(), data())
    ((_, text),) = told()
    assert text.startswith("learning: train_loss went from")
    assert "not below a tenth" in text


def test_one_epoch_is_nothing_to_judge_by(quiet, told):
    quiet(max_epochs=1, overfit_batches=2).fit(Task(), data())
    assert [text[:20] for _, text in told()] == ["nothing to judge by:"]
