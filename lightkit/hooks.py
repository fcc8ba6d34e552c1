"""Hooks: where user code may run, in which order, and how their names are checked.

The order of one fit, printed as the loop runs it (``docs/loop.md`` has the same page, a test
compares both with a recorded run)::

    setup("fit"), prepare_data before it, configure_model, configure_optimizers
    on_fit_start
    [on_sanity_check_start, the validation hooks below, on_sanity_check_end]
    on_train_start
    for each epoch:
        on_train_epoch_start
        for each group of batches (one optimizer step):
            on_before_zero_grad
            for each batch:
                on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer
                on_train_batch_start
                training_step
                on_loss, on_before_backward, (backward), on_after_backward
                the last batch of the group: on_before_optimizer_step, (clip, step, schedulers)
                on_train_batch_end
            validation, if due at this step
            on_save_point
        validation, if due at this epoch
        on_train_epoch_end
        on_save_point                      # instead of the last step's, not after it
    on_train_end
    on_fit_end
    teardown("fit")

    validation:
        on_validation_start, on_validation_epoch_start
        for each loader, for each batch: (transfer hooks), on_validation_batch_start,
            validation_step, on_validation_batch_end
        on_validation_epoch_end, on_validation_end

For one hook the listeners are called in one order: the task, the callbacks in the order given,
functions of `Trainer.on`, the metric log, the progress display, the checkpoints (`Callback.order`).
Every hook runs on every rank unless its text says otherwise, and never inside a context manager of
the loop, with two exceptions: the hooks of the sanity check run on random states that are put back
after it, and in manual optimization on_loss and on_before_optimizer_step run within autocast, where
the user's own ``manual_backward`` and ``optimizer.step()`` call them.

In manual optimization every batch is a step of its own, without on_before_zero_grad and the hooks
of backward; on_loss comes with each ``manual_backward``, on_before_optimizer_step with each
``optimizer.step()``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightkit.elsewhere import refuses_unknown
from lightkit.errors import did_you_mean
from lightkit.hook_names import CALLBACK_NAMES, LOOP_HOOKS, check_hook_names
from lightkit.task_hooks import TaskHooks

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from lightkit.task import TaskModule
    from lightkit.timing import Times
    from lightkit.trainer import Trainer


class Callback:
    """Code that runs at named places of the loop. Override what you need.

    Every hook gets the trainer and the task first. The task has the same hooks without these two
    arguments. A method whose name is close to a hook's but is none raises `HookNameError` when the
    class is made.

    Attributes:
        order: Place among the listeners of one hook: 0 user callbacks, 30 the functions of
            `Trainer.on`, 40 the metric log (which takes in what those before it logged), 50 the
            progress display, 100 checkpoints, 120 profilers. Equal numbers keep the order given;
            the task always comes first.
    """

    order: ClassVar[int] = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_hook_names(cls, CALLBACK_NAMES)
        refuses_unknown(cls)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; two of one class need two keys."""
        return type(self).__qualname__

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Called when an entry point begins, before the model is on its device."""

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Called when an entry point ends, also after an exception."""

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called once per fit, when everything is built and a checkpoint is loaded."""

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called once per fit, last, when no exception was raised."""

    def on_sanity_check_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called before the validation batches that are tried before training."""

    def on_sanity_check_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after them; what they logged is discarded."""

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called once per fit, after the sanity check."""

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called once per fit, after the last epoch."""

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called before the first batch of an epoch (not when an epoch is continued)."""

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when an epoch's batches and its validation are done; epoch means are known."""

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        """Called with the batch on its device, before ``training_step``."""

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after the step that the batch belongs to (if it is the last of its group).

        ``outputs["loss"]`` is the detached loss, beside what else ``training_step`` returned;
        ``outputs`` is None for a batch that was skipped. The gradients of the step are still there.
        """

    def on_save_point(self, trainer: Trainer, task: TaskModule) -> None:
        """Called where everything about a step, or about an epoch, is known: save here.

        ``trainer.epoch_ended`` tells whether an epoch ended with this step.
        """

    def on_before_zero_grad(self, trainer: Trainer, task: TaskModule, optimizer: Optimizer) -> None:
        """Called before the gradients of the last step are cleared, at the start of a step."""

    def on_loss(self, trainer: Trainer, task: TaskModule, loss: Tensor) -> Tensor | None:
        """Called with the loss of a training batch; a tensor that is returned is added to it.

        The sum is what is differentiated, logged as ``train_loss`` and given to later hooks. The
        next listener gets it with what was added before. Accumulation, weights, the scale of
        16-mixed and the mean over ranks come after it. Optimizers that evaluate the loss several
        times call it each time. In manual optimization it is called by ``manual_backward``, and
        ``train_loss`` stays what the step returns.
        """
        return None

    def on_before_backward(self, trainer: Trainer, task: TaskModule, loss: Tensor) -> None:
        """Called with the loss as it is differentiated (divided by the group's length)."""

    def on_after_backward(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after backward; under fp16 the gradients are still scaled."""

    def on_before_optimizer_step(
        self, trainer: Trainer, task: TaskModule, optimizer: Optimizer
    ) -> None:
        """Called with the gradients of the whole group, unscaled, before they are clipped."""

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a validation begins; the model is in eval mode."""

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a validation is over; its means are known.

        A signal breaks a validation off without this call, unless code of yours listens to its start
        and so waits for it.
        """

    def on_validation_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after ``on_validation_start``."""

    def on_validation_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after the last validation batch; logging is still possible."""

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        task: TaskModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with the batch on its device, before ``validation_step``."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with what ``validation_step`` returned."""

    def on_test_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a test begins; the model is in eval mode."""

    def on_test_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a test is over; its means are known."""

    def on_test_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after ``on_test_start``."""

    def on_test_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after the last test batch; logging is still possible."""

    def on_test_batch_start(
        self,
        trainer: Trainer,
        task: TaskModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with the batch on its device, before ``test_step``."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with what ``test_step`` returned."""

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a prediction begins; the model is in eval mode."""

    def on_predict_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called when a prediction is over."""

    def on_predict_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after ``on_predict_start``."""

    def on_predict_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Called after the last batch to predict."""

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        task: TaskModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with the batch on its device, before ``predict_step``."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called with what ``predict_step`` returned."""

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Called when an entry point ends by an exception, Ctrl-C included."""

    def on_save_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called with a checkpoint before it is written; plain types and tensors may be added."""

    def on_load_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called with a checkpoint before its parts are restored."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint should keep of this callback: plain types and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""


def positional_arguments(function: Callable[..., Any], offered: int) -> int:
    """Returns how many of ``offered`` positional arguments ``function`` takes (0 to offered)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return offered
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return offered
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(offered, sum(p.kind in kinds for p in parameters))


class HookTable:
    """For every hook of the loop the bound callables of those who really listen, in order.

    Made once per run, so that a hook nobody overrides costs an empty ``for``. A callable takes the
    hook's arguments without trainer and task: ``for hook in table.on_train_batch_start:
    hook(batch, batch_idx)``. The time that the user's own hooks take goes into ``times``.
    """

    __slots__ = LOOP_HOOKS

    def __init__(
        self,
        trainer: Trainer,
        task: TaskModule,
        callbacks: Sequence[Callback],
        times: Times | None = None,
    ) -> None:
        for name in LOOP_HOOKS:
            offered = _arguments_after_self(getattr(Callback, name))
            found: list[Callable[..., Any]] = []
            for owner in listeners(name, task, callbacks):
                mine = owner is task
                method = _trimmed(getattr(owner, name), offered - 2 * mine)
                method = _timed(method, owner, name, times)
                found.append(method if mine else functools.partial(method, trainer, task))
            setattr(self, name, tuple(found))

    def __getattr__(self, name: str) -> tuple[Callable[..., Any], ...]:  # for type checkers only
        raise AttributeError(f"{name!r} is no hook.{did_you_mean(name, LOOP_HOOKS)}")


def listeners(name: str, task: TaskModule, callbacks: Sequence[Callback]) -> list[Any]:
    """Returns who listens to a hook, in order: the task first, then by `Callback.order`."""
    ordered = sorted(callbacks, key=lambda callback: callback.order)
    return [owner for owner in (task, *ordered) if listens(owner, name)]


def of_user(hook: Any) -> bool:
    """Tells whether a function of the table of hooks is none of ours."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return not module.startswith("lightkit.")


def _timed(
    method: Callable[..., Any], owner: object, name: str, times: Times | None
) -> Callable[..., Any]:
    """Returns a hook with its time taken, where it is the user's own; others stay as they are."""
    if times is None or not of_user(method):
        return method
    label = getattr(owner, "label", type(owner).__name__)
    return times.timed(method, times.part(f"{label}.{name}", "callbacks"))


def listens(owner: Any, name: str) -> bool:
    """Tells whether a task or callback defines a hook itself, in its class or on the object."""
    nothing = getattr(Callback if isinstance(owner, Callback) else TaskHooks, name)
    return getattr(type(owner), name, nothing) is not nothing or name in (
        getattr(owner, "__dict__", ())
    )


def _arguments_after_self(function: Callable[..., Any]) -> int:
    return len(inspect.signature(function).parameters) - 1


def _trimmed(method: Callable[..., Any], offered: int) -> Callable[..., Any]:
    """Returns ``method``, or a wrapper that drops the trailing arguments it does not take."""
    taken = positional_arguments(method, offered)
    if taken == offered:
        return method
    return functools.wraps(method)(lambda *arguments: method(*arguments[:taken]))
