"""Which names of methods are hooks, and which are refused."""

from __future__ import annotations

import pytest

import lightkit as lk
from lightkit.errors import HookNameError
from lightkit.hook_names import CALLBACK_NAMES, OLD_NAMES, TASK_NAMES, check_hook_names


def define(base, name, member=None):
    return type("Mine", (base,), {name: member or (lambda self: None)})


WRONG_ON_TASKS = {
    "on_train_epoch_ends": "on_train_epoch_end",
    "on_training_epoch_end": "on_train_epoch_end",
    "on_trian_strat": "on_train_start",
    "on_train_begin": "Write on_train_start",
    "on_epoch_begin": "Write on_train_epoch_start",
    "on_test_batch_begin": "Write on_test_batch_start",
    "on_val_epoch_end": "_epoch_end",
    "on_befor_zero_grad": "on_before_zero_grad",
    "validaton_step": "validation_step",
    "validate_step": "validation_step",
    "trainning_step": "training_step",
    "training_setp": "training_step",
    "training_steps": "training_step",
    "prediction_step": "predict_step",
    "trainingStep": "training_step",
    "configure_optimisers": "configure_optimizers",
    "configure_optimizer": "configure_optimizers",
    "config_optimizers": "configure_optimizers",
    "train_dataloders": "train_dataloader",
    "set_up": "setup",
    "tearDown": "teardown",
    **OLD_NAMES,
}


@pytest.mark.parametrize("name", WRONG_ON_TASKS)
def test_misspelled_names_on_a_task(name):
    with pytest.raises(HookNameError) as caught:
        define(lk.TaskModule, name)
    assert f"Mine.{name}" in str(caught.value)
    assert WRONG_ON_TASKS[name] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("on_train_epoch_ends", "on_train_epoch_end"),
        ("on_validation_finished", "on_validation"),
        ("on_batch_end", "on_train_batch_end"),
        ("set_up", "setup"),
        ("load_statedict", "load_state_dict"),
    ],
)
def test_misspelled_names_on_a_callback(name, right):
    with pytest.raises(HookNameError, match=right):
        define(lk.Callback, name)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("train_dataloaders", "train_dataloader"),
        ("val_dataloder", "val_dataloader"),
        ("prepare_datas", "prepare_data"),
        ("on_after_batch_transfers", "on_after_batch_transfer"),
    ],
)
def test_misspelled_names_on_a_data_module(name, right):
    with pytest.raises(HookNameError, match=right):
        define(lk.DataModule, name)


@pytest.mark.parametrize(
    "name",
    [
        *("train_step", "eval_step", "val_step", "shared_step", "encode_step", "decode_step"),
        *("rest_step", "best_step", "generator_step", "loss_step", "training_step_helper"),
        *("training_loss", "validation_metrics", "test_metrics", "test_dataset", "train_data"),
        *("configure_loss", "configure_metrics", "configure_scheduler", "scheduler_step"),
        *("get_dataloader", "make_dataloader", "dataloader", "setup_model", "setup_data"),
        *("prepare_batch", "predict", "predict_proba", "validate", "fit", "load_state", "state"),
        *("on_policy_loss", "on_device", "on_gpu", "optimizer_state", "_on_train_epoch_ends"),
    ],
)
def test_methods_of_ones_own_are_no_hooks(name):
    for base in (lk.TaskModule, lk.Callback, lk.DataModule):
        define(base, name)


@pytest.mark.parametrize(
    ("base", "names"), [(lk.TaskModule, TASK_NAMES), (lk.Callback, CALLBACK_NAMES)]
)
def test_every_hook_is_allowed(base, names):
    for name in names:
        define(base, name)


def test_the_decorator_allows_a_name():
    define(lk.TaskModule, "on_train_epoch_ends", lk.not_a_hook(lambda self: None))


def test_what_is_no_method_is_left_alone():
    define(lk.TaskModule, "training_steps", 5)
    define(lk.TaskModule, "on_epoch_end", property(lambda self: 1))


def test_names_are_checked_in_classes_that_are_mixed_in():
    class Mixin:
        def validaton_step(self):
            pass

    with pytest.raises(HookNameError, match="Mixin.validaton_step looks like"):
        type("Mine", (Mixin, lk.TaskModule), {"__module__": __name__})


def test_classes_of_other_packages_are_left_alone():
    foreign = type("Foreign", (), {"__module__": "elsewhere.x", "on_epoch_end": lambda self: None})
    type("Mine", (foreign, lk.TaskModule), {"__module__": __name__})
    with pytest.raises(HookNameError):
        check_hook_names(foreign, TASK_NAMES)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("training_step", "TaskModule. "),
        ("validation_step", "TaskModule. "),
        ("optimizer_step", "TaskModule. "),
        ("configure_optimizers", "TaskModule. "),
        ("prepare_data", "TaskModule or the DataModule. "),
        ("train_dataloader", "TaskModule or the DataModule. "),
        ("transfer_batch_to_device", "TaskModule or the DataModule. "),
        ("on_after_batch_transfer", "TaskModule or the DataModule. "),
    ],
)
def test_what_belongs_to_the_task_is_no_hook_of_a_callback(name, owner):
    with pytest.raises(HookNameError, match=f"Mine.{name} would never .*{owner}"):
        type("Mine", (lk.Callback,), {name: lambda self: None})
    own = lk.not_a_hook(lambda self: None)
    assert getattr(type("Mine", (lk.Callback,), {name: own}), name) is own
