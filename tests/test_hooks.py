"""Which hooks run, in which order, and with which arguments."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.hook_names import LOOP_HOOKS
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
