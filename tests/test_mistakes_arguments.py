"""What a Trainer refuses before anything is done."""

from __future__ import annotations

import pytest

import lightkit as lk
from lightkit.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar, Timer
from lightkit.errors import ConfigError
from lightkit.loggers import CSVLogger, JSONLLogger, Logger, TensorBoardLogger
from tests.small import Net, loader


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EarlyStopping("val_loss"), r"two EarlyStopping .* key .EarlyStopping\('val_loss'"),
        (ModelCheckpoint, "two ModelCheckpoint store their state .* different arguments"),
        (lambda: Timer("1 min"), "two Timer .* under the key 'Timer'"),
        (ProgressBar, "ProgressBar and ProgressBar would show the same twice. Remove one"),
        (ModelSummary, "ModelSummary and ModelSummary would show the same twice"),
    ],
)
def test_a_callback_twice_where_one_is_meant(make, words):
    with pytest.raises(ConfigError, match=words):
        lk.Trainer(callbacks=[make(), make()])
    with pytest.raises(ConfigError, match="the same .* object is there twice. Remove one"):
        lk.Trainer(callbacks=[one := make(), one])


def test_several_callbacks_of_one_class_that_differ():
    class Mine(lk.Callback):
        pass

    several = [
        *(EarlyStopping("val_loss"), EarlyStopping("val_acc", mode="max")),
        *(ModelCheckpoint(), ModelCheckpoint(monitor="val_loss")),
        *(Mine(), Mine()),
    ]
    assert lk.Trainer(callbacks=several).callbacks[: len(several)] == several


@pytest.mark.parametrize("make", [CSVLogger, JSONLLogger, TensorBoardLogger])
def test_loggers_that_would_write_to_one_file(make):
    with pytest.raises(ConfigError, match=rf"logger: two {make.__name__} would write to one file"):
        lk.Trainer(logger=[make(), make()])
    with pytest.raises(ConfigError, match=rf"the same {make.__name__} object is there twice"):
        lk.Trainer(logger=[one := make(), one])


def test_loggers_that_do_not_meet():
    class Mine(Logger):
        pass

    several = [TensorBoardLogger(), TensorBoardLogger(sub_dir="board")]
    several += [TensorBoardLogger(prefix="a"), CSVLogger(), JSONLLogger(), Mine(), Mine()]
    assert lk.Trainer(logger=several).loggers == several


@pytest.mark.parametrize("given", [3, True, ["runs"]])
def test_a_folder_that_is_none(given):
    with pytest.raises(ConfigError, match=r"default_root_dir=.*: allowed is the path of a folder"):
        lk.Trainer(default_root_dir=given)


def test_a_checkpoint_callback_without_checkpoints(quiet):
    with pytest.raises(ConfigError, match=r"enable_checkpointing=False, but .* Remove one of the"):
        quiet(callbacks=ModelCheckpoint()).fit(Net(), loader())


def test_accumulation_in_manual_optimization(quiet):
    task = Net()
    task.automatic_optimization = False
    with pytest.raises(
        ConfigError, match=r"accumulate_grad_batches works in automatic .* every so"
    ):
        quiet(accumulate_grad_batches=2).fit(task, loader())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpus": 1, "accelerator": "cpu"}, 'gpus=1 asks for a CUDA GPU, but accelerator="cpu"'),
        ({"gpus": 1, "devices": 2}, "gpus=1 and devices=2 both say how many"),
    ],
)
def test_devices_that_contradict_each_other(quiet, given, words):
    with pytest.raises(ConfigError, match=words):
        quiet(**given).fit(Net(), loader())
