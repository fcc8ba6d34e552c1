"""What a Trainer refuses before anything is done."""

from __future__ import annotations

import inspect

import pytest

import lightkit as lk
from lightkit.callbacks import EMA, EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar, Timer
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


class Patient(EarlyStopping):
    """A user's, which passes on what it does not know."""

    def __init__(self, **given):
        super().__init__("val_loss", **given)


@pytest.mark.parametrize(
    ("cls", "given", "words"),
    [
        (EarlyStopping, {"restore_best_weights": True}, r"Did you mean .restore_best."),
        (Patient, {"patiense": 3}, "EarlyStopping .*'patiense'. Did you mean 'patience'"),
        (EMA, {"dekay": 0.9}, "EMA .*'dekay'. Did you mean 'decay'"),
        (ModelCheckpoint, {"period": 3}, "ModelCheckpoint .*'period'. Write every_n_epochs."),
        (Logger, {"save_dri": "x"}, "Logger .*Did you mean 'save_dir'"),
        (CSVLogger, {"save_dri": "x"}, "Logger .*Did you mean 'save_dir'"),
        (TensorBoardLogger, {"subdir": "x"}, "TensorBoardLogger .*Did you mean 'sub_dir'"),
    ],
)
def test_an_argument_of_a_callback_or_logger_that_does_not_exist(cls, given, words):
    with pytest.raises(ConfigError, match=words):
        cls(**given)


def test_classes_of_the_user_are_left_as_they_are():
    class Mine(lk.Callback):
        def __init__(self, width):
            self.width = width

    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        Mine(widht=3)
    assert list(inspect.signature(EarlyStopping).parameters)[:2] == ["monitor", "min_delta"]


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
