"""Which hooks run, in which order, with which arguments, and which names are refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.errors import HookNameError
from lightkit.hook_names import (
    CALLBACK_NAMES,
    LOOP_HOOKS,
    OLD_NAMES,
    TASK_NAMES,
    check_hook_names,
)
from lightkit.hooks import HookTable, positional_arguments
from lightkit.task_hooks import TaskHooks

#: What is called on a task beside the hooks of the loop.
OTHERS = (
    "prepare_data",
    "configure_model",
    "configure_optimizers",
    "configure_callbacks",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
)


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        if self.automatic_optimization:
            return self(batch).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch).mean())
        optimizer.step()
        return None

    def validation_step(self, batch):
        return self(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recording(calls, base=Net):
    """Returns a class of tasks that note the name of everything that is called on them."""

    def noting(name):
        inherited = getattr(base, name, None)

        def method(self, *arguments):
            calls.append(name)
            if inherited is not None:
                offered = positional_arguments(inherited, len(arguments) + 1)
                return inherited(self, *arguments[: offered - 1])
            return None

        return method

    return type("Recording", (base,), {name: noting(name) for name in (*LOOP_HOOKS, *OTHERS)})


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        defaults = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
        }
        return lk.Trainer(**defaults | options)

    return make


def data(batches):
    return DataLoader(torch.ones(batches, 1), 1)


# --- the order of one fit: the pseudocode of lightkit/hooks.py as code -------------------------------

TRANSFER = ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"]


def evaluation(stage, batches):
    step = [*TRANSFER, f"on_{stage}_batch_start", f"{stage}_step", f"on_{stage}_batch_end"]
    if stage == "test":  # test_step falls back on validation_step
        step.insert(-1, "validation_step")
    return [
        *(f"on_{stage}_start", f"on_{stage}_epoch_start"),
        *(step * batches),
        *(f"on_{stage}_epoch_end", f"on_{stage}_end"),
    ]


def one_fit(*, epochs, groups, val, sanity, manual=False, val_after_group=(), val_after_epoch=True):
    """Yields the names of a fit as the pseudocode has them.

    Args:
        epochs: Their number.
        groups: Batches in each group of an epoch.
        val: Validation batches.
        sanity: Of the sanity check.
        manual: Whether the task optimizes by itself.
        val_after_group: The groups of an epoch that a validation follows.
        val_after_epoch: Whether one follows the epoch.
    """
    yield from ("configure_callbacks", "prepare_data", "setup", "configure_model")
    yield from ("configure_optimizers", "on_fit_start")
    yield from ("on_sanity_check_start", *evaluation("validation", sanity), "on_sanity_check_end")
    yield "on_train_start"
    for _ in range(epochs):
        yield "on_train_epoch_start"
        for number, size in enumerate(groups):
            if not manual:
                yield "on_before_zero_grad"
            for batch in range(size):
                yield from (*TRANSFER, "on_train_batch_start", "training_step")
                yield "on_loss"
                if not manual:
                    yield from ("on_before_backward", "on_after_backward")
                if manual or batch == size - 1:
                    yield "on_before_optimizer_step"
                yield "on_train_batch_end"
            if number in val_after_group:
                yield from evaluation("validation", val)
            if number < len(groups) - 1:
                yield "on_save_point"
        if val_after_epoch:
            yield from evaluation("validation", val)
        yield from ("on_train_epoch_end", "on_save_point")
    yield from ("on_train_end", "on_fit_end", "teardown")


def test_the_order_of_a_fit(trainer):
    calls = []
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 2}
    trainer(**options).fit(recording(calls)(), data(5), data(3))
    assert calls == list(one_fit(epochs=2, groups=(2, 2, 1), val=3, sanity=2))


def test_the_order_of_a_fit_with_validation_within_the_epoch(trainer):
    calls = []
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 1, "val_check_interval": 4}
    trainer(max_epochs=2, **options).fit(recording(calls)(), data(5), data(3))
    middle = {"val_after_group": (1,), "val_after_epoch": False}
    assert calls == list(one_fit(epochs=2, groups=(2, 2, 1), val=3, sanity=1, **middle))


def test_the_order_of_a_fit_that_optimizes_by_itself(trainer):
    calls = []
    task = recording(calls)()
    task.automatic_optimization = False
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(task, data(2), data(1))
    assert calls == list(one_fit(epochs=2, groups=(1, 1), val=1, sanity=1, manual=True))


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_the_order_of_an_evaluation(trainer, stage):
    calls = []
    call = getattr(trainer(), {"validation": "validate"}.get(stage, stage))
    call(recording(calls)(), data(2))
    begin = ["configure_callbacks", "prepare_data", "setup", "configure_model"]
    assert calls == [*begin, *evaluation(stage, 2), "teardown"]


def test_every_hook_of_the_class_is_in_the_pseudocode():
    import lightkit.hooks

    page = inspect.getdoc(lightkit.hooks)
    elsewhere = ("exception", "checkpoint", "test", "predict")  # not in every fit
    missing = [n for n in LOOP_HOOKS if n not in page and not any(e in n for e in elsewhere)]
    assert missing == []


def test_an_exception_is_told_before_the_end(trainer):
    calls = []

    class Failing(Net):
        def training_step(self, batch):
            raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        trainer().fit(recording(calls, Failing)(), data(1))
    assert calls[-3:] == ["training_step", "on_exception", "teardown"]


# --- listeners -----------------------------------------------------------------------------------


def test_listeners_come_in_one_order(trainer):
    calls = []

    class Say(lk.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_start(self, trainer, task):
            calls.append(self.name)

    class Early(Say):
        order = -60

    class Late(Say):
        order = 70

    class Task(Net):
        def on_train_start(self):
            calls.append("task")

    trainer(callbacks=[Late("late"), Say("a"), Early("early"), Say("b")]).fit(Task(), data(1))
    assert calls == ["task", "early", "a", "b", "late"]


def test_trailing_arguments_may_be_left_out(trainer):
    seen = []

    class Short(lk.Callback):
        def on_train_batch_start(self, trainer):
            seen.append(type(trainer).__name__)

        def on_train_batch_end(self, trainer, task, outputs):
            seen.append(outputs["loss"].ndim)

        def on_train_epoch_end(self):
            seen.append("end")

        def on_validation_batch_end(self, *arguments):
            seen.append(len(arguments))

        def teardown(self, trainer, task, stage):
            seen.append(stage)

    class Task(Net):
        def on_train_batch_start(self, batch):
            seen.append(tuple(batch.shape))

        def on_validation_batch_start(self):
            seen.append("start")

        def setup(self):
            seen.append("setup")

    options = {"callbacks": [Short()], "num_sanity_val_steps": 0}
    trainer(**options).fit(Task(), data(1), data(1))
    assert seen == ["setup", (1, 1), "Trainer", 0, "start", 6, "end", "fit"]


def test_hooks_may_come_from_a_class_that_is_mixed_in(trainer):
    calls = []

    class Mixin:
        def on_train_start(self, *arguments):
            calls.append((type(self).__name__, len(arguments)))

    class Mixed(Mixin, lk.Callback):
        pass

    class Task(Mixin, Net):
        pass

    trainer(callbacks=[Mixed()]).fit(Task(), data(1))
    assert calls == [("Task", 0), ("Mixed", 2)]


def test_hooks_may_be_put_on_an_object(trainer):
    calls = []
    callback, task = lk.Callback(), Net()
    callback.on_train_start = lambda trainer, task: calls.append("callback")
    task.on_train_start = lambda: calls.append("task")
    trainer(callbacks=[callback]).fit(task, data(1))
    assert calls == ["task", "callback"]


def test_only_what_is_overridden_is_called():
    class Some(lk.Callback):
        def on_fit_start(self, trainer, task):
            pass

    table = HookTable(None, Net(), [Some(), lk.Callback()])
    assert len(table.on_fit_start) == 1
    assert table.on_train_start == table.on_train_batch_end == ()
    with pytest.raises(AttributeError, match="Did you mean 'on_fit_start'"):
        _ = table.on_fit_strat


# --- names ---------------------------------------------------------------------------------------


def define(base, name, member=None):
    return type("Mine", (base,), {name: member or (lambda self: None)})


WRONG_ON_TASKS = {
    "on_train_epoch_ends": "on_train_epoch_end",
    "on_training_epoch_end": "on_train_epoch_end",
    "on_trian_strat": "on_train_start",
    "on_train_begin": "on_train_",
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


def test_a_task_has_every_hook_of_a_callback_to_call_by_super():
    ours = {n: inspect.signature(m) for n, m in vars(TaskHooks).items() if not n.startswith("_")}
    assert set(ours) == set(LOOP_HOOKS)
    for name, signature in ours.items():
        full = list(inspect.signature(getattr(lk.Callback, name)).parameters.values())
        given = [p for p in full if p.name not in ("trainer", "task")]
        assert list(signature.parameters.values()) == given, name


def test_super_of_a_hook_does_nothing_and_what_is_not_overridden_is_not_called(tmp_path):
    class Calls(Net):
        def on_train_start(self):
            super().on_train_start()

        def setup(self, stage):
            super().setup(stage)

    task = Calls()
    table = HookTable(None, task, [])
    assert len(table.setup) == len(table.on_train_start) == 1
    assert table.on_train_end == table.on_train_batch_start == ()


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
