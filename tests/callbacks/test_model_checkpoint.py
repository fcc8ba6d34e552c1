"""Which files there are after which save points, with a stand-in for the Trainer."""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import types
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn

from lightkit.callbacks import model_checkpoint
from lightkit.callbacks.model_checkpoint import ModelCheckpoint
from lightkit.checkpoint import Writer, latest, read_checkpoint, settle
from lightkit.distributed import Ranks
from lightkit.errors import CheckpointError, ConfigError
from lightkit.session import Session
from lightkit.state import TrainState
from tests import threads


class Trainer:
    """The attributes that the callback reads, and a loop that calls it as the real one does."""

    def __init__(
        self, folder: pathlib.Path | None, *callbacks: ModelCheckpoint, ranks: Ranks | None = None
    ) -> None:
        self.run_dir = folder
        self.callbacks = list(callbacks)
        self.task = nn.Linear(1, 1, bias=False)
        self.callback_metrics: dict[str, Tensor] = {}
        self.state = TrainState()
        self.session = Session(state=self.state)
        if ranks is not None:
            self.session.strategy.ranks = ranks
        self.is_global_zero = self.session.strategy.is_global_zero
        self.interrupted: str | None = None
        self.num_val_batches: list[int | None] = [1]
        self.sanity_checking = False
        self.saves: list[str] = []
        self.fail = False
        self.writer = Writer()
        self.session.metrics = types.SimpleNamespace(
            reduced=lambda name: self.callback_metrics.get(name), check_shared=lambda name: None
        )

    @property
    def global_step(self) -> int:
        return self.state.global_step

    @property
    def epoch_ended(self) -> bool:
        return self.session.flow.epoch_ended

    @property
    def run_ending(self) -> bool:
        return self.session.flow.ending

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return self.callbacks

    def save_checkpoint(
        self, path, weights_only=False, *, background, then, failed, exact
    ) -> pathlib.Path:
        if self.fail:
            raise CheckpointError(f"{path} could not be written: disk full")
        header = {"format": 1, "version": "0", "global_step": self.global_step, "exact": exact}
        self.saves.append(pathlib.Path(path).name)
        if not self.is_global_zero:
            return pathlib.Path(path)
        if self.session.ledger is not None:
            header["run"] = self.session.ledger.record.id
        contents = {"lightkit": header, "model": self.task.state_dict()}
        if not weights_only:
            contents["loop"] = self.state.state_dict()
            contents["callbacks"] = {c.state_key: c.state_dict() for c in self.callbacks}
        self.writer.write(
            contents, pathlib.Path(path), background=background, then=then, failed=failed
        )
        return pathlib.Path(path)

    def call(self, hook: str, *args) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.task, *args)

    def start(self, checkpoint: pathlib.Path | None = None) -> Trainer:
        self.call("setup", "fit")
        if checkpoint is not None:
            contents = read_checkpoint(checkpoint)
            self.state.load_state_dict(contents["loop"])
            self.call("on_load_checkpoint", contents)
            for callback in self.callbacks:
                if callback.state_key in contents["callbacks"]:
                    callback.load_state_dict(contents["callbacks"][callback.state_key])
        self.call("on_fit_start")
        return self

    def finish(self) -> None:
        self.call("on_fit_end")
        self.call("teardown", "fit")

    def validate(self, **metrics: float) -> None:
        self.call("on_validation_start")
        self.callback_metrics |= {k: torch.tensor(v) for k, v in metrics.items()}
        if not self.sanity_checking:
            self.state.validations += 1
        self.call("on_validation_end")

    def step(
        self, val: dict | None = None, end: bool = False, ending: bool = False, **train: float
    ):
        """One optimizer step, its validation, the end of the epoch and of the run, if any."""
        self.state.global_step += 1
        self.state.batch_idx += 1
        with torch.no_grad():
            self.task.weight.fill_(float(self.state.global_step))
        self.callback_metrics |= {k: torch.tensor(v) for k, v in train.items()}
        if val is not None:
            self.validate(**val)
        if end:
            self.state.epoch, self.state.batch_idx = self.state.epoch + 1, 0
        self.session.flow.epoch_ended, self.session.flow.ending = end, ending
        self.call("on_save_point")
        settle()

    def epoch(self, val: float | None = None, steps: int = 2, ending: bool = False) -> None:
        for _ in range(steps - 1):
            self.step()
        self.step({"val_loss": val} if val is not None else None, end=True, ending=ending)


def files(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*"))


def step_of(path) -> int:
    return read_checkpoint(path)["loop"]["global_step"]


# ---- what is kept


def test_the_default_keeps_the_best_and_the_newest(tmp_path):
    callback = ModelCheckpoint.default()
    trainer = Trainer(tmp_path, callback).start()
    for value in (3.0, 1.0, 2.0):
        trainer.epoch(value)
    trainer.call("on_fit_end")
    folder = tmp_path / "checkpoints"
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000004.ckpt", "step_000006.ckpt"]
    assert (folder / "best.ckpt").samefile(folder / "step_000004.ckpt")
    assert (folder / "last.ckpt").samefile(folder / "step_000006.ckpt")
    assert callback.best_model_path == str(folder / "step_000004.ckpt")
    assert callback.best_model_score == torch.tensor(1.0)
    assert callback.last_model_path == str(folder / "last.ckpt")
    assert callback.dirpath == str(folder)
    assert callback.current_score == torch.tensor(2.0)
    assert latest(folder) == folder / "step_000006.ckpt"
    net = nn.Linear(1, 1, bias=False)
    net.load_state_dict(torch.load(folder / "best.ckpt", weights_only=True)["model"])
    assert net.weight.item() == 4.0


def test_the_default_without_val_loss_keeps_the_newest_and_is_never_an_error(tmp_path):
    callback = ModelCheckpoint.default()
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch()
    trainer.step({"val_acc": 0.5}, end=True)
    assert files(tmp_path) == ["last.ckpt", "step_000003.ckpt"]
    assert callback.best_model_score is None


def test_the_default_monitors_once_val_loss_comes(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint.default()).start()
    trainer.epoch()
    trainer.epoch(1.0)
    trainer.epoch()
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000004.ckpt", "step_000006.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"save_top_k": 2}, [2, 3, 4]),
        ({"save_top_k": 2, "save_last": False}, [2, 3]),
        ({"save_top_k": -1}, [1, 2, 3, 4]),
        ({"save_top_k": 0}, [4]),
        ({"mode": "max"}, [1, 4]),
        ({"save_top_k": 1, "save_last": False}, [2]),
    ],
)
def test_the_best_k_and_the_newest(tmp_path, arguments, expected):
    callback = ModelCheckpoint(monitor="val_loss", **arguments)
    trainer = Trainer(tmp_path, callback).start()
    for value in (4.0, 1.0, 2.0, 3.0):
        trainer.epoch(value, steps=1)
    numbered = [name for name in files(tmp_path) if name.startswith("step")]
    assert numbered == [f"step_{step:06d}.ckpt" for step in expected]
    assert ("last.ckpt" in files(tmp_path)) == arguments.get("save_last", True)
    if callback.best_k_models:
        best = min if callback.mode == "min" else max
        worst = max if callback.mode == "min" else min
        scores = {k: float(v) for k, v in callback.best_k_models.items()}
        assert callback.best_model_path == best(scores, key=scores.get)
        assert callback.kth_best_model_path == worst(scores, key=scores.get)
        assert step_of(tmp_path / "checkpoints" / "best.ckpt") == step_of(callback.best_model_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["last.ckpt", "step_000003.ckpt"]),
        ({"save_last": False}, ["step_000003.ckpt"]),
        ({"save_top_k": 0}, ["last.ckpt", "step_000003.ckpt"]),
        ({"save_top_k": 0, "save_last": False}, []),
        (
            {"save_top_k": -1},
            ["last.ckpt", "step_000001.ckpt", "step_000002.ckpt", "step_000003.ckpt"],
        ),
    ],
)
def test_without_a_monitor(tmp_path, arguments, expected):
    callback = ModelCheckpoint(**arguments)
    trainer = Trainer(tmp_path, callback).start()
    for _ in range(3):
        trainer.epoch(1.0, steps=1)
    assert files(tmp_path) == expected
    if expected:
        assert callback.best_model_path.endswith("step_000003.ckpt")
        assert step_of(callback.last_model_path) == 3


def test_nan_is_never_best(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    trainer = Trainer(tmp_path, callback).start()
    for value in (float("nan"), 2.0, float("nan")):
        trainer.epoch(value, steps=1)
    assert [pathlib.Path(p).name for p in callback.best_k_models] == ["step_000002.ckpt"]
    assert step_of(tmp_path / "checkpoints" / "best.ckpt") == 2


def test_files_of_others_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("mine.ckpt", "step_000000.ckpt", "step_000099.ckpt"):
        (folder / name).write_text("mine")
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="val_loss")).start()
    for value in (3.0, 2.0, 1.0):
        trainer.epoch(value)
    for name in ("mine.ckpt", "step_000000.ckpt", "step_000099.ckpt"):
        assert (folder / name).read_text() == "mine"


def test_the_old_file_goes_only_when_the_new_one_is_complete(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(2.0)
    before = files(tmp_path)
    score, state = callback.best_model_score, callback.state_dict()["files"]
    trainer.fail = True
    with pytest.raises(CheckpointError, match="disk full"):
        trainer.epoch(1.0)
    assert files(tmp_path) == before == ["best.ckpt", "last.ckpt", "step_000002.ckpt"]
    assert callback.best_model_score is score
    assert callback.state_dict()["files"] == state
    trainer.fail = False
    trainer.epoch(0.5)
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000006.ckpt"]


def test_a_file_that_cannot_be_removed_is_tried_again(tmp_path, monkeypatch, caplog):
    trainer = Trainer(tmp_path, ModelCheckpoint()).start()
    trainer.epoch()
    unlink = pathlib.Path.unlink

    def busy(self, **kwargs):
        if self.name == "step_000002.ckpt":
            raise OSError(16, "Device or resource busy")
        unlink(self, **kwargs)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="lightkit"):
        patch.setattr(pathlib.Path, "unlink", busy)
        trainer.epoch()
    assert "step_000002.ckpt could not be removed" in caplog.text
    assert "step_000002.ckpt" in files(tmp_path)
    trainer.epoch()
    assert files(tmp_path) == ["last.ckpt", "step_000006.ckpt"]


# ---- when


def test_by_default_at_the_end_of_epochs_only(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint()).start()
    for _ in range(3):
        trainer.step()
    assert trainer.saves == []
    trainer.step({"val_loss": 1.0})  # no monitor: a validation is no reason to save
    assert trainer.saves == []
    trainer.step(end=True)
    assert trainer.saves == ["step_000005.ckpt"]


def test_by_default_with_a_monitor_also_at_validations_within_an_epoch(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="val_loss")).start()
    trainer.step()
    trainer.step({"val_loss": 2.0})
    trainer.step()
    trainer.step({"val_loss": 1.0}, end=True)
    assert trainer.saves == ["step_000002.ckpt", "step_000004.ckpt"]


def test_a_validation_within_an_epoch_is_no_reason_for_a_training_metric(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="train_loss")).start()
    trainer.step(train_loss=1.0)
    trainer.step({"val_loss": 2.0})
    trainer.step(end=True, train_loss=0.5)
    assert trainer.saves == ["step_000003.ckpt"]


def test_every_n_epochs(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(every_n_epochs=2, save_top_k=-1)).start()
    for epoch in range(5):
        trainer.epoch(steps=1, ending=epoch == 4)
    # The end of the run is saved, whatever the interval.
    assert trainer.saves == [f"step_00000{n}.ckpt" for n in (2, 4, 5)]


def test_every_n_steps(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(every_n_train_steps=3)).start()
    for _ in range(2):
        trainer.epoch(steps=5)
    assert trainer.saves == [f"step_00000{n}.ckpt" for n in (3, 6, 9)]
    assert files(tmp_path) == ["last.ckpt", "step_000009.ckpt"]
    trainer.state.global_step -= 1  # a batch without a step comes by the same number again
    trainer.step()
    assert len(trainer.saves) == 3


def test_intervals_may_be_combined(tmp_path):
    callback = ModelCheckpoint(every_n_train_steps=4, every_n_epochs=1)
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(steps=5)
    trainer.epoch(steps=3)
    assert trainer.saves == [f"step_00000{n}.ckpt" for n in (4, 5, 8)]


@pytest.mark.parametrize("interval", [timedelta(seconds=60), "1 min"])
def test_by_time(tmp_path, interval):
    now = [100.0]
    trainer = Trainer(tmp_path, ModelCheckpoint(train_time_interval=interval))
    trainer.session.flow.clock = lambda: now[0]
    trainer.start()
    for seconds in (30, 31, 30, 30, 59):
        now[0] += seconds
        trainer.step()
    assert trainer.saves == ["step_000002.ckpt", "step_000004.ckpt"]


def test_the_end_of_the_run_within_an_epoch(tmp_path):
    for save_last, saves in ((True, ["step_000003.ckpt"]), (False, [])):
        callback = ModelCheckpoint(every_n_epochs=5, save_last=save_last)
        trainer = Trainer(tmp_path / str(save_last), callback).start()
        trainer.epoch()
        trainer.step(ending=True)
        assert trainer.saves == saves


def test_one_save_where_a_step_an_epoch_and_the_run_end_together(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(every_n_train_steps=1, every_n_epochs=1)).start()
    trainer.step({"val_loss": 1.0}, end=True, ending=True)
    assert trainer.saves == ["step_000001.ckpt"]


def test_a_run_without_a_folder_saves_nothing(tmp_path, caplog):
    trainer = Trainer(None, ModelCheckpoint(tmp_path / "x")).start()
    trainer.epoch(ending=True)
    trainer.call("on_fit_end")
    assert trainer.saves == []
    assert not (tmp_path / "x").exists()
    assert not caplog.records


# ---- the monitor


def test_a_value_is_judged_only_once(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=3)
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(1.0)
    trainer.epoch()  # validated every second epoch
    trainer.epoch(2.0)
    names = [pathlib.Path(p).name for p in callback.best_k_models]
    assert names == ["step_000002.ckpt", "step_000006.ckpt"]
    assert trainer.saves == ["step_000002.ckpt", "step_000004.ckpt", "step_000006.ckpt"]


def test_weights_judged_by_an_earlier_value_are_pointed_out_once(tmp_path, caplog):
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    trainer = Trainer(tmp_path, callback).start()
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        for value in (3.0, 2.0):
            trainer.step({"val_loss": value})
            trainer.step()
    assert len(caplog.records) == 1
    assert "judges the weights of step 2 by val_loss of step 1" in caplog.text


def test_a_training_metric_is_judged_at_every_save(tmp_path):
    callback = ModelCheckpoint(monitor="train_loss")
    trainer = Trainer(tmp_path, callback).start()
    for value in (2.0, 1.0, 3.0):
        trainer.step(end=True, train_loss=value)
    assert callback.best_model_score == torch.tensor(1.0)
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000002.ckpt", "step_000003.ckpt"]


def test_a_misspelled_monitor_is_an_error_at_the_first_validation(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="val_los", every_n_epochs=10)).start()
    trainer.step(train_loss=1.0)
    with pytest.raises(ConfigError) as caught:
        trainer.step({"val_loss": 1.0, "val_acc": 0.5})
    message = str(caught.value)
    assert "monitor='val_los'): nothing of that name is logged. Did you mean 'val_loss'?" in message
    assert message.endswith("There are: train_loss, val_acc, val_loss.")


def test_without_a_validation_at_the_end_of_the_first_epoch(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="val_loss")).start()
    trainer.num_val_batches = []
    trainer.step(train_loss=1.0)
    with pytest.raises(ConfigError, match="There are: train_loss"):
        trainer.step(end=True)


def test_a_validation_of_every_second_epoch_is_waited_for(tmp_path):
    for monitor in ("val_loss", "val_lost"):
        trainer = Trainer(tmp_path, ModelCheckpoint(monitor=monitor)).start()
        trainer.step(end=True, train_loss=1.0)
        assert trainer.saves == ["step_000001.ckpt"]
        if monitor == "val_loss":
            trainer.step({"val_loss": 1.0}, end=True)
        else:
            with pytest.raises(ConfigError, match="monitor='val_lost'"):
                trainer.step({"val_loss": 1.0}, end=True)


def test_a_metric_of_the_end_of_the_epoch_is_waited_for(tmp_path):
    callback = ModelCheckpoint(monitor="score", mode="max")
    trainer = Trainer(tmp_path, callback).start()
    trainer.step({"val_loss": 1.0})
    trainer.step(end=True, score=0.5)
    assert callback.best_model_score == torch.tensor(0.5)


def test_the_sanity_check_counts_for_nothing(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    trainer.sanity_checking = True
    trainer.validate(val_loss=0.0)
    trainer.sanity_checking = False
    trainer.callback_metrics.clear()
    trainer.step()
    assert trainer.saves == []
    trainer.step({"val_loss": 5.0}, end=True)
    assert callback.best_model_score == torch.tensor(5.0)


def test_a_score_keeps_its_precision(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    for value in (1.0, 1.0 - 1e-12):
        trainer.callback_metrics.clear()
        trainer.call("on_validation_start")
        trainer.callback_metrics["val_loss"] = torch.tensor(value, dtype=torch.float64)
        trainer.state.validations += 1
        trainer.call("on_validation_end")
        trainer.step(end=True)
    assert step_of(callback.best_model_path) == 2


# ---- names


def test_templates(tmp_path):
    callback = ModelCheckpoint(filename="{epoch}-{val_loss:.2f}", monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(0.123)
    trainer.epoch(0.5)  # not one of the best: called by its step
    assert files(tmp_path) == [
        "best.ckpt",
        "epoch=1-val_loss=0.12.ckpt",
        "last.ckpt",
        "step_000004.ckpt",
    ]
    trainer.step({"val_loss": 0.1})  # within the third epoch
    assert callback.best_model_path.endswith("epoch=3-val_loss=0.10.ckpt")


def test_a_template_without_a_monitor(tmp_path):
    callback = ModelCheckpoint(
        filename="e{epoch}-acc{val/acc:.1f}.ckpt", auto_insert_metric_name=False, save_top_k=-1
    )
    trainer = Trainer(tmp_path, callback).start()
    trainer.step({"val/acc": 0.25}, end=True)
    trainer.step({"val/acc": 0.75}, end=True)
    assert files(tmp_path) == ["e1-acc0.2.ckpt", "e2-acc0.8.ckpt", "last.ckpt"]


def test_a_metric_in_a_template_that_is_not_there_yet_or_never(tmp_path):
    callback = ModelCheckpoint(filename="{val_los}", every_n_train_steps=1)
    trainer = Trainer(tmp_path, callback).start()
    trainer.step()
    assert trainer.saves == ["step_000001.ckpt"]
    trainer.step({"val_loss": 1.0})
    assert trainer.saves == ["step_000001.ckpt", "step_000002.ckpt"]
    with pytest.raises(ConfigError, match=r"'val_los', which is not logged\. Did you mean 'val_l"):
        trainer.step(end=True)


def test_one_name_for_the_best(tmp_path):
    callback = ModelCheckpoint(filename="best", monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    for value in (2.0, 3.0, 1.0, 4.0):
        trainer.epoch(value, steps=1)
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000004.ckpt"]
    assert step_of(tmp_path / "checkpoints" / "best.ckpt") == 3


def test_a_kept_file_is_never_replaced_by_another_of_its_name(tmp_path):
    callback = ModelCheckpoint(filename="{epoch}", monitor="val_loss", save_top_k=2)
    trainer = Trainer(tmp_path, callback).start()
    for value in (1.0, 2.0):  # twice within one epoch
        trainer.step({"val_loss": value})
    assert files(tmp_path) == [
        "best.ckpt",
        "epoch=1-step_000002.ckpt",
        "epoch=1.ckpt",
        "last.ckpt",
    ]
    assert step_of(callback.best_model_path) == 1


def test_no_version_suffixes_the_same_name_is_replaced(tmp_path):
    for _ in range(2):
        trainer = Trainer(tmp_path, ModelCheckpoint(filename="model")).start()
        trainer.epoch()
        trainer.epoch()
        assert files(tmp_path) == ["last.ckpt", "model.ckpt"]


# ---- endings, arguments, several of them


def test_the_best_weights_are_restored_on_request(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", restore_best=True)
    trainer = Trainer(tmp_path, callback).start()
    for value in (2.0, 1.0, 3.0):
        trainer.epoch(value, steps=1)
    assert trainer.task.weight.item() == 3.0
    trainer.call("on_fit_end")
    assert trainer.task.weight.item() == 2.0


def test_nothing_to_restore_is_said(tmp_path, caplog):
    callback = ModelCheckpoint(monitor="val_loss", restore_best=True)
    trainer = Trainer(tmp_path, callback).start()
    trainer.call("on_fit_end")
    assert "No checkpoint was written: no step was made." in caplog.text
    assert "No best weights to restore" in caplog.text


def test_a_save_that_was_wanted_and_never_due_is_said(tmp_path, caplog):
    callback = ModelCheckpoint(every_n_epochs=9, save_last=False)
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(ending=True)
    trainer.call("on_fit_end")
    assert "No checkpoint was written: none was due." in caplog.text


def test_an_unwritable_folder_is_an_error_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be made: .*dirpath="):
        Trainer(tmp_path, ModelCheckpoint(tmp_path / "file" / "x")).start()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(CheckpointError, match="is not writable for this user"):
        Trainer(tmp_path, ModelCheckpoint()).start()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"mode": "mni"}, "mode='mni'; allowed are 'min' and 'max'. Did you mean 'min'"),
        ({"save_top_k": 2}, r"needs monitor=.*1 keeps the newest, -1 all, 0 none"),
        ({"save_top_k": -2}, "save_top_k=-2; it must be an integer, at least -1"),
        ({"save_top_k": 1.5}, "save_top_k=1.5"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1; it must be an integer, at least 0"),
        ({"every_n_train_steps": "5"}, "every_n_train_steps='5'"),
        ({"every_n_train_steps": True}, "every_n_train_steps=True"),
        ({"train_time_interval": "soon"}, "train_time_interval='soon' is no duration"),
        ({"restore_best": True}, "restore_best=True needs monitor="),
        ({"restore_best": True, "monitor": "a", "save_top_k": 0}, "restore_best=True needs"),
        ({"every_n_epochs": 2, "save_top_k": 0, "save_last": False}, "save nothing"),
        ({"filename": "a", "monitor": "b", "save_top_k": 2}, "the same for every file"),
        ({"filename": "last", "monitor": "b"}, "needs another name"),
        ({"filename": "{"}, "is no template"),
        ({"filename": "/a"}, "dirpath="),
    ],
)
def test_arguments_that_cannot_work(arguments, what):
    with pytest.raises(ConfigError, match=what):
        ModelCheckpoint(**arguments)


def test_ported_arguments_are_accepted(tmp_path):
    ModelCheckpoint(
        tmp_path,
        "{epoch}",
        monitor="val_loss",
        verbose=True,
        save_last=None,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
        train_time_interval=None,
    )


def test_verbose_says_each_file(tmp_path, caplog):
    trainer = Trainer(tmp_path, ModelCheckpoint(monitor="val_loss", verbose=True)).start()
    with caplog.at_level(logging.INFO, logger="lightkit"):
        trainer.epoch(0.5)
    assert "step_000002.ckpt (val_loss=0.5), the best so far" in caplog.text


def test_several_in_one_folder_keep_each_others_files(tmp_path):
    by_loss = ModelCheckpoint(monitor="val_loss", save_last=False)
    by_acc = ModelCheckpoint(monitor="val_acc", mode="max", save_last=False)
    newest = ModelCheckpoint(every_n_train_steps=1)
    trainer = Trainer(tmp_path, by_loss, by_acc, newest).start()
    for loss, acc in ((1.0, 0.9), (2.0, 0.8), (0.5, 0.1), (3.0, 0.2)):
        trainer.step({"val_loss": loss, "val_acc": acc}, end=True)
    assert files(tmp_path) == [
        "best.ckpt",
        "best_val_acc.ckpt",
        "last.ckpt",
        "step_000001.ckpt",
        "step_000003.ckpt",
        "step_000004.ckpt",
    ]
    folder = tmp_path / "checkpoints"
    assert [step_of(folder / f"{n}.ckpt") for n in ("best", "best_val_acc", "last")] == [3, 1, 4]
    assert len({c.state_key for c in trainer.callbacks}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"save_weights_only": True}),
        ({"filename": "{epoch}"}, {"filename": "{epoch}", "every_n_epochs": 2}),
        ({"monitor": "val_loss"}, {"monitor": "val_loss", "every_n_epochs": 2}),
    ],
)
def test_several_that_would_clash_need_a_folder_each(tmp_path, one, other):
    with pytest.raises(ConfigError, match="a dirpath of its own"):
        Trainer(tmp_path, ModelCheckpoint(**one), ModelCheckpoint(**other)).start()
    Trainer(tmp_path, ModelCheckpoint(**one), ModelCheckpoint(tmp_path / "b", **other)).start()


def test_weights_only(tmp_path):
    trainer = Trainer(tmp_path, ModelCheckpoint(save_weights_only=True)).start()
    trainer.epoch()
    assert "loop" not in torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)


# ---- going on


def test_a_run_that_goes_on_keeps_the_best_of_before(tmp_path):
    first = Trainer(tmp_path, ModelCheckpoint(monitor="val_loss", save_top_k=2)).start()
    for value in (1.0, 3.0, 4.0):
        first.epoch(value, steps=1)
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2)
    second = Trainer(tmp_path, callback).start(tmp_path / "checkpoints" / "last.ckpt")
    assert callback.best_model_score == torch.tensor(1.0)
    assert callback.current_score == torch.tensor(4.0)
    second.epoch(2.0, steps=1)
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", "step_000001.ckpt", "step_000004.ckpt"]
    # Every file says by itself what it is: its own state names it among the best.
    state = read_checkpoint(tmp_path / "checkpoints" / "step_000004.ckpt")["callbacks"]
    assert list(state[callback.state_key]["files"]["written"]) == [
        str(tmp_path / "checkpoints" / name) for name in ("step_000001.ckpt", "step_000004.ckpt")
    ]


def test_a_crash_between_the_save_and_the_cleaning_leaves_nothing_behind(tmp_path, monkeypatch):
    first = Trainer(tmp_path, ModelCheckpoint(async_save=False))
    first.session.ledger = a_run("a")
    first.start().epoch()
    monkeypatch.setattr(model_checkpoint, "collect_garbage", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.epoch()
    monkeypatch.undo()
    os.link(tmp_path / "checkpoints" / "step_000002.ckpt", tmp_path / "checkpoints" / "x")
    os.replace(tmp_path / "checkpoints" / "x", tmp_path / "checkpoints" / "last.ckpt")
    assert files(tmp_path) == ["last.ckpt", "step_000002.ckpt", "step_000004.ckpt"]
    second = Trainer(tmp_path, ModelCheckpoint())
    second.session.ledger = a_run("a")
    second.start(latest(tmp_path / "checkpoints"))
    assert files(tmp_path) == ["last.ckpt", "step_000004.ckpt"]  # at once: it may have been the end
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 4
    second.epoch()
    assert files(tmp_path) == ["last.ckpt", "step_000006.ckpt"]


def a_run(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(record=types.SimpleNamespace(id=name))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_that_its_run_forgot_goes_once_the_next_one_is_complete(tmp_path, weights_only):
    folder, there = tmp_path / "checkpoints", []

    def begin(path=None) -> Trainer:
        main = ModelCheckpoint(tmp_path / "main", every_n_train_steps=2, save_top_k=-1)
        other = ModelCheckpoint(every_n_train_steps=1, save_weights_only=weights_only)
        t = Trainer(tmp_path, other, main)
        t.session.ledger = a_run("a")
        return t.start(path)

    first = begin()
    for _ in range(3):
        first.step()
    (folder / "step_000009.ckpt").write_bytes(b"of somebody else")
    assert "step_000003.ckpt" in files(tmp_path)
    # Killed; its newest whole state is that of step 2.
    second = begin(tmp_path / "main" / "step_000002.ckpt")
    assert "step_000003.ckpt" in files(tmp_path)
    second.state.global_step = 7
    real = second.save_checkpoint
    second.save_checkpoint = lambda *a, **k: (there.append(files(tmp_path)), real(*a, **k))
    second.step()
    assert "step_000003.ckpt" in there[0]
    assert files(tmp_path) == ["last.ckpt", "step_000008.ckpt", "step_000009.ckpt"]


def test_files_of_another_run_in_the_same_folder_stay(tmp_path):
    first = Trainer(tmp_path, ModelCheckpoint())
    first.session.ledger = a_run("a")
    first.start().epoch()
    copy = shutil.copy(tmp_path / "checkpoints" / "step_000002.ckpt", tmp_path / "old.ckpt")
    first.epoch()
    second = Trainer(tmp_path, ModelCheckpoint())
    second.session.ledger = a_run("b")
    second.start(copy).epoch(steps=5)
    assert files(tmp_path) == ["last.ckpt", "step_000004.ckpt", "step_000007.ckpt"]


def test_from_any_file_of_several_nothing_is_removed_that_one_of_them_keeps(tmp_path):
    def savers() -> list[ModelCheckpoint]:
        return [
            ModelCheckpoint(every_n_train_steps=2),
            ModelCheckpoint(filename="{epoch}-{val_loss:.1f}", monitor="val_loss", save_top_k=2),
        ]

    values = (3.0, 1.0, 2.0, 0.5, 4.0)
    first = Trainer(tmp_path / "a", *savers())
    first.session.ledger = a_run("a")
    first.start()
    for value in values[:3]:
        first.epoch(value, steps=3)
    for path in sorted((tmp_path / "a" / "checkpoints").glob("*.ckpt")):
        root = tmp_path / path.stem
        shutil.copytree(tmp_path / "a", root)
        newest, best = savers()
        t = Trainer(root, newest, best)
        t.session.ledger = a_run("a")
        path = root / "checkpoints" / path.name
        contents = torch.load(path, weights_only=True)
        for state in contents["callbacks"].values():  # the folder was moved: it is the same one
            text = str(tmp_path / "a")
            state["dirpath"] = state["dirpath"].replace(text, str(root))
            kept = state["files"]
            kept["best"] = {k.replace(text, str(root)): v for k, v in kept["best"].items()}
            kept["written"] = {k.replace(text, str(root)): v for k, v in kept["written"].items()}
            kept["garbage"] = [k.replace(text, str(root)) for k in kept["garbage"]]
            for name in ("best_path", "newest"):
                kept[name] = kept[name].replace(text, str(root))
        torch.save(contents, path)
        known = [k for s in contents["callbacks"].values() for k in s["files"]["best"]]
        known = [k for k in known if pathlib.Path(k).exists()]
        t.start(path)
        assert set(known) <= set(best.best_k_models) | set(newest.best_k_models), path.name
        for value in values[t.state.epoch :]:
            t.epoch(value, steps=3 - t.state.batch_idx)
        assert best.best_model_score == torch.tensor(0.5)
        assert {os.path.basename(p) for p in best.best_k_models} == {
            "epoch=2-val_loss=1.0.ckpt",
            "epoch=4-val_loss=0.5.ckpt",
        }
        for saver in (newest, best):
            assert all(pathlib.Path(p).exists() for p in saver._files.written), path.name
        assert latest(root / "checkpoints").name == "step_000015.ckpt"
        assert step_of(best.best_model_path) == 12


def test_a_save_that_was_due_stays_due_where_only_a_signal_made_it(tmp_path):
    """The validation that a signal broke off comes again, and its value is judged as it was due."""
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    first = Trainer(tmp_path, callback).start()
    first.step()
    first.interrupted, first.state.pending_validation = "SIGTERM", "step"
    first.step(ending=True)
    assert callback.best_model_score is None
    again = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2)
    second = Trainer(tmp_path, again).start(tmp_path / "checkpoints" / "last.ckpt")
    second.state.pending_validation = ""
    second.validate(val_loss=1.5)
    second.call("on_save_point")
    assert again.best_model_score == torch.tensor(1.5)


def test_the_same_object_in_a_second_fit_starts_anew(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    first = Trainer(tmp_path / "a", callback).start()
    first.epoch(1.0)
    first.finish()
    assert step_of(callback.last_model_path) == 2
    second = Trainer(tmp_path / "b", callback).start()
    assert callback.best_model_path == ""
    second.epoch(5.0)
    assert callback.best_model_score == torch.tensor(5.0)
    assert files(tmp_path / "a") == ["best.ckpt", "last.ckpt", "step_000002.ckpt"]


def test_a_state_that_was_loaded_for_a_fit_that_failed_to_start_is_forgotten(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    first = Trainer(tmp_path / "a", callback).start()
    first.epoch(1.0)
    first.finish()
    callback.load_state_dict(callback.state_dict())
    first.call("teardown", "fit")
    Trainer(tmp_path / "b", callback).start()
    assert callback.best_model_path == ""


def test_other_entry_points_forget_nothing(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(1.0)
    trainer.call("teardown", "fit")
    trainer.call("setup", "test")
    assert callback.best_model_path.endswith("step_000002.ckpt")


@pytest.mark.parametrize("background", [False, True])
def test_only_rank_zero_touches_files_and_all_know_the_same(tmp_path, background):
    def train(ranks):
        callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, async_save=background)
        trainer = Trainer(tmp_path, callback, ranks=ranks).start()
        known = []
        for loss in (3.0, 1.0, 2.0):
            trainer.epoch(loss)
            known.append(callback.best_model_path)
        trainer.call("on_fit_end")
        known.append((callback.best_model_path, callback.last_model_path, callback.best_k_models))
        return trainer.saves, known, {path.name for path in tmp_path.rglob("*.ckpt")}

    (saves, known, there), other = threads.together(2, train)
    assert saves == ["step_000002.ckpt", "step_000004.ckpt", "step_000006.ckpt"]
    assert other[0] == saves, "every rank takes part in a save"
    assert other[1][-1] == known[-1]
    if not background:
        assert other[1] == known
    assert there == {"last.ckpt", "best.ckpt", "step_000004.ckpt", "step_000006.ckpt"}


def test_a_file_that_rank_zero_cannot_write_leads_all_ranks_alike(tmp_path):
    def train(ranks, on_error):
        callback = ModelCheckpoint(monitor="val_loss", save_top_k=1, on_error=on_error)
        trainer = Trainer(tmp_path / on_error, callback, ranks=ranks).start()
        trainer.epoch(2.0)
        trainer.fail = ranks.is_zero
        trainer.epoch(1.0)
        after = callback.best_model_path, callback._files.newest
        trainer.fail = False
        trainer.epoch(1.5)  # better than the best there is
        trainer.call("on_fit_end")
        return after, trainer.saves, callback.best_model_path

    zero, one = threads.together(2, lambda ranks: train(ranks, "warn"))
    assert zero[0] == one[0]
    assert zero[0][0].endswith("step_000002.ckpt")
    assert zero[2] == one[2]
    assert zero[2].endswith("step_000006.ckpt")

    def fails(ranks):
        with pytest.raises(CheckpointError, match="disk full"):
            train(ranks, "raise")
        return True

    assert threads.together(2, fails) == [True, True]


def test_after_an_exception_several_ranks_do_not_wait_for_each_other(tmp_path):
    def train(ranks):
        trainer = Trainer(tmp_path, ModelCheckpoint(), ranks=ranks).start()
        trainer.epoch(1.0)
        trainer.step()
        if ranks.is_zero:
            trainer.call("on_exception", ValueError("mine"))
        return trainer.saves

    assert threads.together(2, train) == [["step_000002.ckpt"]] * 2


def test_a_folder_that_cannot_be_written_is_told_by_all_ranks(tmp_path):
    (tmp_path / "file").touch()

    def begin(ranks):
        with pytest.raises(CheckpointError, match="cannot be made"):
            Trainer(tmp_path / "file", ModelCheckpoint(), ranks=ranks).start()
        return True

    assert threads.together(3, begin) == [True] * 3


def test_a_step_at_which_nothing_is_due_is_cheap(tmp_path):
    import sys

    callback = ModelCheckpoint.default()
    trainer = Trainer(tmp_path, callback).start()
    trainer.epoch(1.0)
    trainer.session.flow.epoch_ended = False
    calls = []
    sys.setprofile(lambda frame, event, arg: event == "call" and calls.append(frame.f_code.co_name))
    callback.on_save_point(trainer, trainer.task)
    sys.setprofile(None)
    assert calls == ["on_save_point"]


def test_order_and_default_arguments_are_those_of_the_field():
    callback = ModelCheckpoint()
    assert callback.order == 100
    assert (callback.monitor, callback.mode, callback.save_top_k) == (None, "min", 1)
    assert callback.best_k_models == {}
