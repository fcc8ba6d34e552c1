"""The last lines of a fit: what was best, and nothing that helps nobody."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

import lightkit as lk
from lightkit.announce import _best
from lightkit.callbacks import EarlyStopping, ModelCheckpoint
from lightkit.history import History
from tests.small import Net, loader

ROWS = [
    {"epoch": 1, "step": 5, "time": 1.0, "train_loss": 3.0, "val_loss": 2.0, "val_acc": 0.5},
    {"epoch": 2, "step": 10, "time": 1.0, "train_loss": 2.0, "val_loss": 1.0, "val_acc": 0.25},
    {"epoch": 3, "step": 15, "time": 1.0, "train_loss": 1.0, "val_loss": 1.5, "val_acc": 0.75},
]


def best(*callbacks: Any, rows: list[dict[str, float]] = ROWS) -> str:
    return _best(SimpleNamespace(history=History(rows), callbacks=list(callbacks)))  # type: ignore[arg-type]


def test_the_checkpoints_decide_which_epoch_is_the_best() -> None:
    by_accuracy = ModelCheckpoint(monitor="val_acc", mode="max")
    stopping = EarlyStopping("train_loss")
    assert best() == best(ModelCheckpoint.default()) == best(ModelCheckpoint())
    assert best() == "epoch 2, val_loss 1.0000, train_loss 2.0000, val_acc 0.2500"
    assert best(stopping, by_accuracy).startswith("epoch 3, val_acc 0.7500, train_loss")
    assert best(stopping, ModelCheckpoint.default()).startswith("epoch 2, val_loss")
    assert best(stopping, ModelCheckpoint()).startswith("epoch 3, train_loss 1.0000")


def test_nothing_is_the_best_of_one_epoch_or_of_none_that_was_measured() -> None:
    assert best(rows=ROWS[:1]) == best(rows=[]) == ""
    assert best(rows=[{"epoch": n, "train_loss": 1.0} for n in (1, 2)]) == ""
    assert best(rows=[{"epoch": n, "val_loss": math.nan} for n in (1, 2)]) == ""


def test_of_many_metrics_a_few_are_told() -> None:
    rows = [{"epoch": n, "val_loss": 1.0, **{f"m{i}": 0.5 for i in range(8)}} for n in (1, 2)]
    assert best(rows=rows).endswith("m0 0.5000, m1 0.5000, m2 0.5000, m3 0.5000 and 4 more")


def test_a_fit_says_its_best_epoch_before_its_folder(tmp_path, capsys) -> None:
    trainer = lk.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(Net(), loader(), loader())
    told = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in told] == ["best", "results", "curves"]
    epoch = trainer.history.best("val_loss")["epoch"]
    assert told[0].startswith(f"best:     epoch {epoch}, val_loss ")


@pytest.mark.parametrize("at", [0, 1])
def test_after_an_error_in_the_first_step_there_is_nothing_to_say(tmp_path, capsys, at) -> None:
    class Fails(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == at:
                raise RuntimeError("a defect")

    checkpoint = ModelCheckpoint(save_on_exception=False)
    trainer = lk.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=checkpoint
    )
    with pytest.raises(RuntimeError, match="a defect"):
        trainer.fit(Fails(), loader())
    assert ("nothing to go on from" in capsys.readouterr().out) is (at == 1)
