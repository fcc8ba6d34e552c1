"""The digits task in every format, on one GPU and, in small, on the CPU."""

from __future__ import annotations

import logging

import pytest
import torch

import lightkit as lk
from templates.digits.data import DigitsData
from templates.digits.model import DigitsNet


def train(folder, precision, *, gpus, epochs, width=16, callbacks=None, ckpt_path=None):
    """Trains as configs/digits.yaml says and returns trainer, task and history."""
    trainer = lk.Trainer(
        gpus=gpus,
        precision=precision,
        max_epochs=epochs,
        seed=0,
        default_root_dir=folder,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    task = DigitsNet(width=width)
    data = DigitsData(batch_size=32)
    history = trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    return trainer, task, history


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    ("gpus", "epochs", "width", "least"),
    [
        pytest.param(1, 12, 16, 0.97, marks=pytest.mark.gpu, id="gpu"),
        pytest.param(0, 2, 8, 0.80, id="cpu"),
    ],
)
def test_it_learns(tmp_path, precision, gpus, epochs, width, least):
    trainer, task, _ = train(tmp_path, precision, gpus=gpus, epochs=epochs, width=width)
    kind = "cuda" if gpus else "cpu"
    assert trainer.session.device.type == kind
    assert {p.device.type for p in task.parameters()} == {kind}
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    assert trainer.callback_metrics["val_accuracy"] > least
    (row,) = trainer.test(task, datamodule=DigitsData(batch_size=32), verbose=False)
    assert row["test_accuracy"] > least
    assert [type(o).__name__ for o in trainer.session.plan.fused] == ["AdamW"]
    (entry,) = trainer.lr_schedulers
    moved = entry.scheduler.last_epoch
    assert moved <= trainer.global_step == epochs * len(trainer.train_dataloader)
    if precision != "16-mixed":
        assert moved == trainer.global_step


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.gpu), 0])
def test_a_run_goes_on_where_it_was(tmp_path, precision, gpus):
    how = {"gpus": gpus, "epochs": 4, "width": 16 if gpus else 4}
    whole, task, once = train(tmp_path / "whole", precision, **how)
    train(tmp_path / "parts", precision, **how, callbacks=_StopAfter(2))
    again, other, twice = train(tmp_path / "parts", precision, **how, ckpt_path="last")
    assert again.global_step == whole.global_step
    one, two = (t.lr_schedulers[0].scheduler.last_epoch for t in (whole, again))
    scales = [t.session.precision.state_dict() for t in (whole, again)]
    if gpus:  # some kernels add in an order of their own
        assert abs(one - two) <= 2
        assert twice["train_loss"] == pytest.approx(once["train_loss"], rel=0.2)
        assert twice[-1]["val_accuracy"] > 0.95
        return
    assert one == two
    assert scales[0] == scales[1]
    assert twice["train_loss"] == once["train_loss"]
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in task.state_dict().items())


class _StopAfter(lk.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, task):
        if trainer.current_epoch == self.epochs - 1:
            trainer.stop("half of it")


@pytest.mark.gpu
def test_the_hint_for_tf32_comes_once_and_ends_with_a_choice(tmp_path, caplog):
    if torch.cuda.get_device_capability() < (8, 0) or torch.version.hip is not None:
        pytest.skip("this card has no TF32")
    switches = torch.backends.cuda.matmul
    before = getattr(switches, "fp32_precision", None)
    found = []
    try:
        for choice in (None, "high"):
            if choice is not None:
                torch.set_float32_matmul_precision(choice)
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="lightkit"):
                train(tmp_path, "32", gpus=1, epochs=1)
            found.append([r for r in caplog.records if "set_float32_matmul" in r.getMessage()])
    finally:
        if before is None:
            torch.set_float32_matmul_precision("highest")
        else:
            switches.fp32_precision = before
    assert [len(records) for records in found] == [1, 0]
    assert found[0][0].levelno == logging.INFO
