"""Requirements of the paper on torchbearer: a trial that is called, state that is seen, callbacks."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

import lightkit as lk
from lightkit.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from tests.small import Net, loader

ROOT = Path(__file__).parents[2]


class Plain(Net):
    """Steps of plain SGD, whose result can be told by hand."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_S1_01_fit_evaluate_and_predict_on_one_object(tmp_path):
    trainer = lk.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_progress_bar=False)
    task, val = Net(), loader(8, seed=2)
    history = trainer.fit(task, loader(), val)
    [row] = trainer.validate(task, val, verbose=False)
    assert row["val_loss"] == history[-1]["val_loss"]
    assert torch.cat(trainer.predict(task, val)).shape == (8, 1)

    saved = trainer.checkpoint_callback.last_model_path
    fresh = lk.Trainer(logger=False, enable_progress_bar=False)
    [other] = fresh.validate(Net(), val, ckpt_path=saved, verbose=False)
    assert other == row  # a saved model is evaluated
    assert torch.equal(Net.load_from_checkpoint(saved).net.weight, task.net.weight)


def test_S1_02_one_state_holds_model_optimizer_and_callbacks(quiet, tmp_path):
    class Counts(lk.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.seen += 1

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state_dict):
            self.seen = state_dict["seen"]

    class Saves(lk.Callback):
        def on_train_end(self, trainer, task):
            trainer.save_checkpoint(tmp_path / "all.ckpt")

    task, trainer = Net(), quiet(callbacks=[Counts(), Saves()])
    trainer.fit(task, loader())
    optimizer = trainer.optimizers[0].state_dict()["state"]

    class Looks(lk.Callback):
        def on_train_start(self, trainer, task):
            restored = trainer.optimizers[0].state_dict()["state"]
            assert torch.equal(restored[0]["exp_avg"], optimizer[0]["exp_avg"])

    counts, other = Counts(), Net()
    again = quiet(max_epochs=2, callbacks=[counts, Looks()])
    before = task.net.weight.detach().clone()
    other.on_train_start = lambda: before.equal(other.net.weight) or pytest.fail("not restored")
    again.fit(other, loader(), ckpt_path=tmp_path / "all.ckpt")
    assert counts.seen == 10
    assert again.global_step == 10


def test_S1_03_callbacks_read_and_change_what_runs(quiet):
    seen = []

    class Changes(lk.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            batch[1].zero_()

        def on_loss(self, trainer, task, loss):
            seen.append(loss.item())
            return 2 * loss  # what is returned is added

        def on_before_backward(self, trainer, task, loss):
            assert loss.item() == pytest.approx(3 * seen[-1])

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 3

    task = Plain()
    x = loader().dataset.tensors[0][:4]
    first = task(x).square().mean().item()
    trainer = quiet(max_epochs=5, callbacks=Changes())
    trainer.fit(task, loader())
    assert seen[0] == pytest.approx(first)  # of targets that are zero
    assert trainer.global_step == 3


def weights_by_hand(penalty) -> list[torch.Tensor]:
    """The weights after an epoch of `Plain`, with a penalty added to the loss."""
    torch.manual_seed(1)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in loader():
        optimizer.zero_grad()
        (nn.functional.mse_loss(net(x), y) + penalty(net)).backward()
        optimizer.step()
    return list(net.parameters())


def assert_penalized(task, penalty):
    for found, wanted in zip(task.parameters(), weights_by_hand(penalty), strict=True):
        torch.testing.assert_close(found, wanted)


def test_S1_04_a_decorated_function_changes_the_loss(quiet):
    trainer = quiet()

    @trainer.on("loss")
    def l2(trainer, task, loss):
        return 0.3 * sum(p.square().sum() for p in task.parameters())

    torch.manual_seed(1)
    task = Plain()
    trainer.fit(task, loader())
    assert_penalized(task, lambda net: 0.3 * sum(p.square().sum() for p in net.parameters()))


def test_S1_05_a_penalty_is_added_also_where_there_is_no_other_loss(quiet):
    def l1(trainer, task):
        return 0.3 * sum(p.abs().sum() for p in task.parameters())

    trainer = quiet()
    trainer.add_to_loss(l1)
    torch.manual_seed(1)
    task = Plain()
    trainer.fit(task, loader())
    assert_penalized(task, lambda net: 0.3 * sum(p.abs().sum() for p in net.parameters()))

    class NoLoss(Plain):
        def training_step(self, batch, batch_idx):
            return torch.zeros(())

    torch.manual_seed(1)
    alone, trainer = NoLoss(), quiet()
    trainer.add_to_loss(l1)
    before = alone.net.weight.detach().clone()
    trainer.fit(alone, loader())
    moved = before - alone.net.weight.detach()
    steps = 5 * 0.1 * 0.3 * before.sign()
    far = before.abs() > 0.2  # a weight that is near to zero swings around it
    torch.testing.assert_close(moved[far], steps[far])


def scores(samples: int = 40) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(4))
    return TensorDataset(x, (x.sum(1) > 0).long())


def test_S1_06_metrics_by_name(quiet):
    task = lk.SupervisedTask(nn.Linear(4, 2), loss="cross_entropy", metrics=["accuracy"])
    [row] = quiet().validate(task, DataLoader(scores(), 16), verbose=False)
    x, y = scores().tensors
    right = (task(x).argmax(1) == y).float().mean().item()
    assert row["val_accuracy"] == pytest.approx(right)
    assert row["val_loss"] == pytest.approx(nn.functional.cross_entropy(task(x), y).item())


def test_S1_07_one_value_feeds_mean_spread_and_running_mean(quiet):
    values = [1.0, 2.0, 4.0, 8.0, 16.0]

    class Logs(Net):
        def training_step(self, batch, batch_idx):
            for name, how in {
                "acc": "mean",
                "acc_std": "std",
                "last_acc": "last",
                "running_acc": "running:2",
            }.items():
                self.log(name, values[batch_idx], reduce_fx=how)
            return super().training_step(batch, batch_idx)

    [row] = quiet().fit(Logs(), loader())
    tensor = torch.tensor(values)
    assert row["acc"] == pytest.approx(tensor.mean().item())
    assert row["acc_std"] == pytest.approx(tensor.std().item())
    assert row["last_acc"] == 16.0
    assert row["running_acc"] == pytest.approx(12.0)


class Largest(Metric):
    """A metric of one's own: the largest error."""

    def __init__(self):
        super().__init__()
        self.add_state("worst", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, prediction, target):
        self.worst = torch.maximum(self.worst, (prediction - target).abs().max())

    def compute(self):
        return self.worst


def test_S1_08_a_metric_of_ones_own_is_like_the_others(quiet):
    class Uses(Net):
        def __init__(self):
            super().__init__()
            self.largest = Largest()

        def validation_step(self, batch, batch_idx):
            self.largest(self(batch[0]), batch[1])
            self.log("val_largest", self.largest)

    def worst(net, data):
        x, y = data.dataset.tensors
        return {"val_largest": pytest.approx((net(x) - y).abs().max().item())}

    task, trainer = Uses(), quiet()
    with torch.no_grad():
        for bias in (100.0, 0.0):  # the first value is not there any more
            task.net.bias.fill_(bias)
            assert trainer.validate(task, loader(10), verbose=False) == [worst(task, loader(10))]
    own = lk.SupervisedTask(nn.Linear(4, 1), loss="mse", metrics=[Largest()])
    [row] = quiet().validate(own, loader(10), verbose=False)
    assert row.items() >= worst(own, loader(10)).items()


class Gan(lk.TaskModule):
    """Two networks, two losses, what one step makes is used by the next: no dictionary of state."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(2, 1)
        self.critic = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, real, batch_idx):
        generator, critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 2))
        loss = nn.functional.softplus(self.critic(fake.detach())).mean()
        loss = loss + nn.functional.softplus(-self.critic(real)).mean()
        for optimizer, value in (
            (critic, lambda: loss),
            (generator, lambda: nn.functional.softplus(-self.critic(fake)).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(value())
            optimizer.step()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=0.02, betas=(0.5, 0.9)),
        )


def test_S1_09_a_gan_trains_in_the_same_trainer(quiet):
    torch.manual_seed(0)
    task, real = Gan(), torch.randn(512, 1) + 3.0
    before = task.generator(torch.randn(256, 2)).mean().item()
    quiet(max_epochs=25).fit(task, DataLoader(real, 64))
    made = task.generator(torch.randn(256, 2)).mean().item()
    assert abs(before) < 1.5
    assert made == pytest.approx(3.0, abs=1.0)


def test_S1_10_a_function_is_minimised_without_data(quiet):
    class Function(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(3))

        def training_step(self, batch, batch_idx):
            assert batch is None
            return (self.x - torch.tensor([5.0, 0.0, -1.0])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task, trainer = Function(), quiet()
    trainer.fit(task, max_steps=100)
    assert trainer.global_step == 100
    torch.testing.assert_close(task.x.detach(), torch.tensor([5.0, 0.0, -1.0]))


def test_S1_11_a_vae_and_a_support_vector_machine(quiet):
    class Vae(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)

        def training_step(self, x, batch_idx):
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
            code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
            return (self.decoder(code) - x).square().sum(1).mean() + 0.1 * divergence

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.03)

    x = torch.randn(128, 2) @ torch.randn(2, 8)
    history = quiet(max_epochs=20).fit(Vae(), DataLoader(x, 32, shuffle=True))
    assert history[-1]["train_loss"] < 0.3 * history[0]["train_loss"]

    class Svm(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.plane = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            hinge = torch.relu(1 - batch[1] * self.plane(batch[0]).squeeze(1)).mean()
            return hinge + 0.01 * self.plane.weight.square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    x, y = scores(200).tensors
    svm = Svm()
    quiet(max_epochs=10).fit(svm, DataLoader(TensorDataset(x, 2.0 * y - 1), 20))
    assert ((svm.plane(x).squeeze(1) > 0) == y).float().mean() > 0.95


def test_S1_12_a_number_of_steps_per_epoch_whatever_the_length_of_the_loader(quiet):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(lambda: (torch.ones(4), torch.ones(1)), None)

    trainer = quiet(max_epochs=3, limit_train_batches=7)
    history = trainer.fit(Net(), DataLoader(Endless(), 2))
    assert [row["step"] for row in history] == [7, 14, 21]
    longer = quiet(max_epochs=2, limit_train_batches=3)
    assert [row["step"] for row in longer.fit(Net(), loader())] == [3, 6]
    repeated = quiet(max_epochs=2, limit_train_batches=9)  # a loader of five batches, over again
    history = repeated.fit(Net(), itertools.cycle(loader()))
    assert [row["step"] for row in history] == [9, 18]


def test_S1_13_state_is_attributes_that_cannot_collide(quiet):
    trainer = quiet()
    trainer.fit(Net(), loader())
    assert (trainer.state.epoch, trainer.state.global_step, trainer.state.batch_idx) == (1, 5, 0)
    with pytest.raises(AttributeError):
        trainer.state.my_own = 1  # what is one's own is an attribute of one's own task
    with pytest.raises(AttributeError):
        trainer.current_epoch = 3


def test_S1_14_what_is_built_in(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Shows(Net):
        def on_train_epoch_end(self):
            board = self.logger.experiment
            board.add_image("image", torch.rand(3, 4, 4), self.global_step)
            board.add_text("text", "seen", self.global_step)
            board.add_embedding(torch.rand(3, 2), ["a", "b", "c"], global_step=self.global_step)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    callbacks = [LearningRateMonitor(), EarlyStopping("val_loss"), ModelCheckpoint()]
    trainer = lk.Trainer(
        max_epochs=2, callbacks=callbacks, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.fit(Shows(), loader(), loader(8, seed=2))
    assert (trainer.run_dir / "checkpoints/last.ckpt").is_file()
    board = EventAccumulator(str(trainer.run_dir)).Reload()
    assert [event.step for event in board.Images("image")] == [5, 10]
    assert "text/text_summary" in board.Tags()["tensors"]
    assert list(trainer.run_dir.rglob("projector_config.pbtxt"))
    [rate] = [name for name in board.Tags()["scalars"] if name.startswith("lr")]
    assert [event.value for event in board.Scalars(rate)] == pytest.approx([0.1, 0.05])


def test_S1_15_the_order_of_a_fit_is_read_in_one_file(quiet):
    seen = []

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            frame = sys._getframe(1)
            while frame.f_code.co_name != "test_S1_15_the_order_of_a_fit_is_read_in_one_file":
                seen.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
                frame = frame.f_back
            return super().training_step(batch, batch_idx)

    quiet(limit_train_batches=1).fit(Looks(), loader())
    assert seen == [
        ("loops.py", "train_step"),
        ("loops.py", "train_epoch"),
        ("loops.py", "fit"),
        ("trainer.py", "fit"),
    ]
    tree = ast.parse((ROOT / "lightkit/loops.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_S1_16_a_bar_by_default_and_ways_to_less(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = lk.Trainer(max_epochs=1)
    trainer.fit(Net(), loader())
    assert trainer.progress_bar_callback is not None
    loud = capsys.readouterr().out
    assert re.search(r"^ *1/1 ", loud, re.MULTILINE)
    lk.Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False).fit(
        Net(), loader()
    )
    less = capsys.readouterr().out
    assert less
    assert not re.search(r"^ *1/1 ", less, re.MULTILINE)


def test_S1_17_a_run_can_be_looked_at_afterwards(tmp_path):
    trainer = lk.Trainer(max_epochs=3, default_root_dir=tmp_path, enable_progress_bar=False)
    history = trainer.fit(Net(), loader(), loader(8, seed=2))
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == history["val_loss"]
    assert history.best("val_loss")["val_loss"] == min(history["val_loss"])
    pytest.importorskip("pandas")
    assert list(history.to_pandas()["val_loss"]) == history["val_loss"]


def test_S1_18_the_project_is_looked_after():
    assert "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    gate = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for tool in ("ruff", "mypy", "pytest"):
        assert tool in gate
    assert {path.name for path in (ROOT / "templates").iterdir()} >= {"digits", "tabular"}


def test_S1_19_few_dependencies_and_optional_ones_stay_out():
    if sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        needed = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
        wanted = {"pyyaml", "rich", "tensorboard", "torch", "torchmetrics", "typing_extensions"}
        assert needed == wanted
    guests = ["sklearn", "matplotlib", "pandas", "onnx", "safetensors", "wandb", "rich", "yaml"]
    code = f"import sys, lightkit; print([n for n in {guests} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_S1_20_the_model_may_look_at_the_state(quiet):
    seen = []

    class Anneals(Net):
        def forward(self, x):
            seen.append((self.current_epoch, self.global_step, self.training))
            return super().forward(x)

    quiet(max_epochs=2, limit_train_batches=2).fit(Anneals(), loader())
    assert seen == [(0, 0, True), (0, 1, True), (1, 2, True), (1, 3, True)]
    Anneals()(torch.ones(1, 4))  # and need not be in a run
    assert seen[-1] == (0, 0, True)
