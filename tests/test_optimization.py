"""Optimizer steps through the Trainer: accumulation, clipping, closures, schedules, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import lightkit as lk
from lightkit.errors import ConfigError, OptimizerError


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(samples: int = 20) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(samples: int = 20, batch_size: int = 4) -> DataLoader:
    return DataLoader(data(samples), batch_size)


@pytest.fixture
def quiet(tmp_path):
    def make(**options) -> lk.Trainer:
        defaults = {
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "fused": False,
            "default_root_dir": tmp_path / "runs",
        }
        return lk.Trainer(**defaults | options)

    return make


def by_hand(groups, lr=0.05, clip=None) -> Net:
    """One step per group of samples, each as one big batch."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    x, y = data().tensors
    for group in groups:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[group]), y[group]).backward()
        if clip is not None:
            clip(net.parameters())
        optimizer.step()
    return net


def close(one, other) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "groups"),
    [
        (4, 2, [slice(0, 8), slice(8, 16), slice(16, 20)]),
        (3, 3, [slice(0, 9), slice(9, 18), slice(18, 20)]),
        (3, 4, [slice(0, 12), slice(12, 20)]),  # the last batch of the group is shorter
        (6, 10, [slice(0, 20)]),
    ],
)
def test_accumulation_equals_the_one_big_batch(quiet, batch_size, accumulate, groups):
    net, t = Net(), quiet(accumulate_grad_batches=accumulate)
    t.fit(net, loader(batch_size=batch_size))
    assert close(net, by_hand(groups))
    assert t.global_step == len(groups)


def test_weights_make_token_counts_exact(quiet):
    lengths = [1, 5, 2, 4, 3, 3, 2]  # 20 samples in batches that differ; the loader knows nothing
    x, y = data().tensors
    parts = list(zip(x.split(lengths), y.split(lengths), strict=True))

    class Weighted(Net):
        def training_step(self, batch, batch_idx):
            weight = len(batch[0]) if batch_idx % 2 else torch.tensor(len(batch[0]))
            return {"loss": super().training_step(batch, batch_idx), "weight": weight}

    net = Weighted()
    quiet(accumulate_grad_batches=3).fit(net, parts)
    assert close(net, by_hand([slice(0, 8), slice(8, 18), slice(18, 20)]))


def test_a_group_of_no_weight_is_skipped(quiet):
    class Weighted(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss * 0, "weight": 0} if batch_idx < 2 else {"loss": loss, "weight": 4}

    net, t = Weighted(), quiet(accumulate_grad_batches=2)
    t.fit(net, loader())
    assert close(net, by_hand([slice(8, 16), slice(16, 20)]))
    assert t.global_step == 2


def test_skipped_batches_do_not_count(quiet):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 2, 3) else super().training_step(batch, batch_idx)

    net, t = Skips(), quiet(accumulate_grad_batches=2)
    t.fit(net, loader())
    assert close(net, by_hand([slice(0, 4), slice(16, 20)]))
    assert t.global_step == 2


# --- clipping ------------------------------------------------------------------------------------


def test_clipping_by_norm_logs_the_norm_before(quiet):
    net = Net()
    row = quiet(gradient_clip_val=0.1).fit(net, loader())[0]
    norms = []
    groups = [slice(i, i + 4) for i in range(0, 20, 4)]
    expected = by_hand(groups, clip=lambda p: norms.append(nn.utils.clip_grad_norm_(p, 0.1)))
    assert close(net, expected)
    assert row["grad_norm"] == pytest.approx(float(sum(norms) / 5), rel=1e-5)
    assert row["grad_norm"] > 0.1


def test_clipping_by_value(quiet):
    net = Net()
    t = quiet(gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert "grad_norm" not in t.fit(net, loader())[0]
    groups = [slice(i, i + 4) for i in range(0, 20, 4)]
    assert close(net, by_hand(groups, clip=lambda p: nn.utils.clip_grad_value_(p, 0.01)))


def test_clipping_of_the_users_own(quiet):
    class Own(Net):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            seen.append((gradient_clip_val, gradient_clip_algorithm))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    seen, net = [], Own()
    quiet().fit(net, loader())
    assert seen == [(None, "norm")] * 5
    groups = [slice(i, i + 4) for i in range(0, 20, 4)]
    assert close(net, by_hand(groups, clip=lambda p: nn.utils.clip_grad_norm_(p, 0.1)))


# --- steps of the user's own ---------------------------------------------------------------------


def test_two_optimizers_by_hand(quiet):
    class Gan(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, z):
            return self.generator(z)

        def training_step(self, batch, batch_idx):
            x, _ = batch
            one, two = self.optimizers()
            assert isinstance(one, torch.optim.Adam)
            self.toggle(self.critic)
            fake = self(torch.randn(len(x), 2))
            loss = self.critic(fake.detach()).mean() - self.critic(x).mean()
            two.zero_grad()
            self.manual_backward(loss)
            assert self.generator.weight.grad is None or batch_idx
            two.step()
            self.toggle(self.generator)
            loss = -self.critic(self(torch.randn(len(x), 2))).mean()
            one.zero_grad()
            self.manual_backward(loss)
            one.step()
            self.log_dict({"g": loss.detach(), "c": 1.0})

        def toggle(self, part):
            self.requires_grad_(False)
            part.requires_grad_(True)

        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.generator.parameters(), 0.01),
                torch.optim.SGD(self.critic.parameters(), 0.01),
            ]

        def on_before_optimizer_step(self, optimizer):
            steps.append(type(optimizer).__name__)

    steps, net = [], Gan()
    before = [net.generator.weight.clone(), net.critic.weight.clone()]
    t = quiet(gradient_clip_val=1.0)
    row = t.fit(net, loader())[0]
    assert not torch.equal(before[0], net.generator.weight)
    assert not torch.equal(before[1], net.critic.weight)
    assert t.global_step == 5
    assert steps == ["SGD", "Adam"] * 5
    assert {"g", "c", "grad_norm_0", "grad_norm_1"} <= set(row)
    with pytest.raises(ConfigError, match="automatic optimization only"):
        quiet(accumulate_grad_batches=2).fit(Gan(), loader())


def test_lbfgs(quiet):
    class Closed(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1, max_iter=5)

    net, t = Closed(), quiet(max_epochs=3)
    history = t.fit(net, loader(batch_size=20))
    expected = Net()
    optimizer = torch.optim.LBFGS(expected.parameters(), lr=1, max_iter=5)
    x, y = data().tensors

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(expected(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert close(net, expected)
    assert history[-1]["train_loss"] < 0.01 < history[0]["train_loss"]


def test_what_a_closure_computes_again_is_logged_once(quiet):
    class Closed(Net):
        def __init__(self):
            super().__init__()
            self.error = MeanSquaredError()

        def training_step(self, batch, batch_idx):
            self.error.update(self(batch[0]), batch[1])
            self.log("error", self.error)
            self.log("ones", 1.0, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1, max_iter=5)

    row = quiet(max_epochs=1).fit(Closed(), loader())[0]
    assert row["ones"] == len(loader())
    assert row["error"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_closure_called_twice(quiet, accumulate):
    """SAM: the gradient is taken at the weights moved uphill."""

    class Sam(Net):
        def training_step(self, batch, batch_idx):
            self.log("mine", 1.0)
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            kept = [p.detach().clone() for p in self.parameters()]
            with torch.no_grad():
                for p in self.parameters():
                    p += 0.1 * p.grad
            optimizer_closure()
            with torch.no_grad():
                for p, old in zip(self.parameters(), kept, strict=True):
                    p.copy_(old)
            optimizer.step()

    net, t = Sam(), quiet(accumulate_grad_batches=accumulate)
    t.fit(net, loader())
    expected = Net()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    x, y = data().tensors
    size = 4 * accumulate
    for group in [slice(i, i + size) for i in range(0, 20, size)]:

        def gradient(group=group):
            optimizer.zero_grad()
            nn.functional.mse_loss(expected(x[group]), y[group]).backward()

        gradient()
        kept = [p.detach().clone() for p in expected.parameters()]
        with torch.no_grad():
            for p in expected.parameters():
                p += 0.1 * p.grad
        gradient()
        with torch.no_grad():
            for p, old in zip(expected.parameters(), kept, strict=True):
                p.copy_(old)
        optimizer.step()
    assert close(net, expected)
    assert t.global_step == -(-5 // accumulate)


def test_zero_grad_of_the_users_own_and_of_the_optimizers(quiet):
    class Own(Net):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            seen.append((epoch, batch_idx))
            optimizer.zero_grad(set_to_none=False)

    class Mine(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            seen.append("mine")
            super().zero_grad(set_to_none)

    class Other(Net):
        def configure_optimizers(self):
            return Mine(self.parameters(), lr=0.05)

    groups = [slice(i, i + 4) for i in range(0, 20, 4)]
    for kind, expected in ((Own, [(0, i) for i in range(5)]), (Other, ["mine"] * 5)):
        seen, net = [], kind()
        quiet().fit(net, loader())
        assert seen == expected
        assert close(net, by_hand(groups))


def test_no_optimizer_at_all(quiet, caplog):
    class Nothing(Net):
        def configure_optimizers(self):
            return None

    net = Nothing()
    before = net.net.weight.clone()
    quiet().fit(net, loader())
    assert torch.equal(net.net.weight, before)
    assert "no optimizer" in caplog.text


# --- schedules -----------------------------------------------------------------------------------

SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


def test_every_schedule_of_torch_is_here():
    bases = {"LRScheduler", "SWALR"}
    found = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type)
        and not name.startswith("_")
        and hasattr(value, "step")
        and value.__module__ == schedulers.__name__
        and name not in bases
    }
    assert found <= set(SCHEDULES)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # torch's SequentialLR
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_moves_per_step_and_per_epoch(quiet, name, interval, capsys):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            plan = {"scheduler": SCHEDULES[name](optimizer), "interval": interval}
            if name == "ReduceLROnPlateau":
                plan |= {"interval": "epoch", "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    class Rates(lk.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    seen = []
    epochs = 2 if interval == "step" else 10
    t = quiet(max_epochs=epochs, callbacks=Rates(), limit_train_batches=5)
    t.fit(Scheduled(), loader(), loader(4))
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.05)
    scheduler, expected = SCHEDULES[name](optimizer), []
    for _epoch in range(epochs):
        for _step in range(5):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if interval == "step" and name != "ReduceLROnPlateau":
                scheduler.step()
        if name == "ReduceLROnPlateau":
            scheduler.step(1.0)
        elif interval == "epoch":
            scheduler.step()
    assert seen == pytest.approx(expected)
    assert f"schedule: {name}" in capsys.readouterr().out


def test_a_plateau_without_its_metric(quiet):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = schedulers.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_los"}

    with pytest.raises(OptimizerError, match=r"'val_los'.*Did you mean 'val_loss'"):
        quiet().fit(Scheduled(), loader(), loader(4))


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "inside", "kept"),
    [
        (32, torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        (64, torch.float64, torch.float64),
    ],
)
def test_precisions_on_the_cpu(quiet, precision, inside, kept):
    class Look(Net):
        def forward(self, x):
            seen.add(super().forward(x).dtype)
            return super().forward(x)

    seen, net = set(), Look()
    before = net.net.weight.detach().clone()
    t = quiet(precision=precision, max_epochs=2, gradient_clip_val=5.0)
    history = t.fit(net, loader(), loader(8))
    t.validate(net, loader(), verbose=False)
    t.predict(net, loader())
    assert seen == {inside}
    assert net.net.weight.dtype is kept
    assert not torch.equal(net.net.weight.float(), before)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert torch.get_default_dtype() is torch.float32


def test_an_overflow_in_fp16_skips_step_and_schedule(quiet):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plan = {"scheduler": schedulers.ExponentialLR(optimizer, 0.5), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    class Moves(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            moved.append(not torch.equal(before[-1], task.net.weight))
            before.append(task.net.weight.detach().clone())

    net = Overflows()
    moved, before = [], [net.net.weight.detach().clone()]
    t = quiet(precision="16-mixed", terminate_on_nan=False, callbacks=Moves())
    t.fit(net, loader())
    assert not moved[1]
    assert moved[-1]
    assert torch.isfinite(net.net.weight).all()
    assert t.global_step == 5
    assert t.lr_schedulers[0].scheduler.last_epoch == sum(moved)
