"""The plan of a fit: what it says, and that nothing remains of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit import cli
from lightkit.differences import compare
from lightkit.errors import ConfigError, UsageError
from tests.small import Net, loader


class Large(lk.TaskModule):
    """Known numbers: 20 x 30 + 30 frozen, 30 x 2 + 2 that learn."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(20, 30).requires_grad_(False)
        self.head = nn.Linear(30, 2)

    def training_step(self, batch, batch_idx):
        return self.head(self.frozen(batch)).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.head.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [OneCycleLR(optimizer, 0.1, steps)]


def rows(count: int) -> DataLoader:
    return DataLoader(torch.randn(count, 20), 8)


def test_its_numbers(tmp_path, capsys):
    trainer = lk.Trainer(
        max_epochs=6,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
        default_root_dir=tmp_path / "runs",
        callbacks=lk.callbacks.ModelCheckpoint(monitor="val_loss", save_top_k=3),
    )
    task, train, val = Large(), rows(80), rows(16)
    before, random = copy.deepcopy(task.state_dict()), lk.rng.rng_state()
    plan = trainer.check(task, train, val)
    assert list(tmp_path.iterdir()) == []
    assert list(compare(before, task.state_dict(), "", [])) == []
    assert list(compare(random, lk.rng.rng_state(), "", [])) == []
    assert (trainer.stage, trainer.history, trainer.run_dir) == (None, [], None)
    assert (plan.device, plan.processes, plan.precision) == ("cpu", 1, "bf16-mixed")
    assert (plan.parameters, plan.trainable) == (692, 62)
    assert (plan.weights, plan.gradients) == (4 * 692, 4 * 62)
    assert plan.states == 2 * 4 * 62 + 2 * 4  # two means of each, and a counter for each tensor
    assert plan.peak is None
    assert (plan.epochs, plan.steps, plan.batches, plan.global_batch) == (6, 30, 10, 16)
    assert plan.seconds == pytest.approx(
        30 * plan.step_seconds + 6 * 2 * plan.rehearsed.validation, rel=1e-6
    )
    assert (plan.rehearsed.train, plan.rehearsed.val) == (10, 2)
    assert plan.checkpoint > plan.weights + plan.states
    assert plan.checkpoints == 5 * plan.checkpoint  # three, the last, and one under way
    assert plan.free > 0
    text = str(plan)
    assert "model:     692 parameters, 62 of them trainable" in text
    assert (
        "memory:    3.52 kB: weights 2.77 kB, gradients 248 bytes, optimizer 504 bytes; act" in text
    )
    assert "training:  6 epochs, 30 steps, 10 batches per epoch, 16 samples per step" in text
    assert "schedule:  OneCycleLR per step: lr 0.004 -> 0.1 (step 9) -> 4e-07 (step 30)" in text
    assert "device" not in capsys.readouterr().out  # nothing of the fit itself is said


def test_a_fit_gives_the_same_bits_after_it(quiet):
    ends = []
    for checks in (True, False):
        lk.seed_everything(1, verbose=False)
        task, train, trainer = Net(), loader(), quiet(max_epochs=2)
        shuffled = DataLoader(train.dataset, 4, shuffle=True)
        if checks:
            trainer.check(task, shuffled, loader(8, 2))
        history = trainer.fit(task, shuffled, loader(8, 2))
        ends.append([task.net.weight, [(row["train_loss"], row["val_loss"]) for row in history]])
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_where_the_length_is_not_known(quiet):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(torch.randn(12, 4), torch.randn(12, 1), strict=True)

    plan = quiet(max_epochs=3).check(Net(), DataLoader(Stream(), 4))
    assert (plan.epochs, plan.steps, plan.batches, plan.seconds) == (3, None, None, None)
    assert (plan.checkpoint, plan.checkpoints) == (0, 0)
    assert "\ntraining:  3 epochs, 4 samples per step\n" in str(plan)
    assert "disk" not in str(plan)
    short = str(quiet(max_epochs=1, limit_train_batches=1).check(Net(), loader()))
    assert "training:  1 epoch, 1 step, 1 batch per epoch, 4 samples per step" in short
    assert quiet(max_epochs=-1, max_steps=7).check(Net(), loader()).epochs is None


def test_validations_within_an_epoch(quiet):
    options = {"max_epochs": 4, "val_check_interval": "2 steps"}
    plan = quiet(**options).check(Net(), loader(), loader(8))
    assert plan.seconds == pytest.approx(
        20 * plan.step_seconds + 10 * 2 * plan.rehearsed.validation, rel=1e-6
    )


def test_what_fails_is_raised(quiet):
    class Bad(Net):
        def validation_step(self, batch, batch_idx):
            raise ValueError("not like this")

    trainer = quiet()
    with pytest.raises(ValueError, match="not like this"):
        trainer.check(Bad(), loader(), loader(8))
    with pytest.raises(ConfigError, match="monitors 'val_los'"):
        quiet(callbacks=lk.callbacks.EarlyStopping("val_los")).check(Net(), loader(), loader(8))
    with pytest.raises(UsageError, match="cannot rehearse this fit: the loader .* only once"):
        trainer.check(Net(), iter(loader()))
    assert trainer.check(Net(), loader()).steps == 5  # it can go on


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "planned_model.py").write_text(
        "from tests.small import Net as Task, loader\n"
        "import lightkit as lk\n"
        "class Data(lk.DataModule):\n"
        "    def train_dataloader(self):\n"
        "        return loader()\n"
    )
    (tmp_path / "c.yaml").write_text(
        "trainer: {max_epochs: 2}\ntask: {class_path: planned_model.Task}\ndata: {class_path: planned_model.Data}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "--config", "c.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("rehearsed: 5 batches of training, a checkpoint of ")
    assert "\ntraining:  2 epochs, 10 steps, 5 batches per epoch, 4 samples per step\n" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == [
        "c.yaml",
        "planned_model.py",
    ]
