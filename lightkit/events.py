"""Functions as listeners: what `Trainer.on` registers, and when it is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightkit.errors import ConfigError, HookNameError, UsageError, did_you_mean
from lightkit.hook_names import LOOP_HOOKS, OLD_NAMES
from lightkit.hooks import Callback, positional_arguments

if TYPE_CHECKING:
    from lightkit.state import TrainState
    from lightkit.trainer import Trainer

_NAMES = tuple(name.removeprefix("on_") for name in LOOP_HOOKS)
#: The events of ignite and torchbearer, and those of ours that come at the same place.
PEERS = {
    "ignite": {
        "started": "train_start",
        "epoch_started": "train_epoch_start",
        "get_batch_started": "train_batch_start",
        "get_batch_completed": "train_batch_start",
        "iteration_started": "train_batch_start",
        "iteration_completed": "train_batch_end",
        "dataloader_stop_iteration": "train_epoch_end",
        "epoch_completed": "train_epoch_end",
        "terminate_single_epoch": "train_epoch_end",
        "terminate": "train_end",
        "completed": "train_end",
        "interrupt": "save_point",
        "exception_raised": "exception",
    },
    "torchbearer": {
        "init": "setup",
        "start": "fit_start",
        "start_epoch": "train_epoch_start",
        "start_training": "train_epoch_start",
        "sample": "train_batch_start",
        "forward": "loss",
        "criterion": "loss",
        "backward": "after_backward",
        "step_training": "train_batch_end",
        "end_training": "validation_start",
        "end_epoch": "train_epoch_end",
        "checkpoint": "save_point",
        "end": "fit_end",
        "start_validation": "validation_start",
        "sample_validation": "validation_batch_start",
        "forward_validation": "validation_batch_end",
        "criterion_validation": "validation_batch_end",
        "step_validation": "validation_batch_end",
        "end_validation": "validation_end",
    },
}


@dataclass(frozen=True)
class When:
    """At which of its events a function is called. They are counted from 1; see `counter`.

    Attributes:
        every: At each event whose number this divides; None for all.
        once: At the event of this number alone.
        before: At events of a smaller number.
        after: At events of a greater number.
        filter: Called with the trainer and the number; says whether the function is called.
        rank_zero: Whether it is called on the first process alone.

    Raises:
        ConfigError: For values that never let an event pass.
    """

    every: int | None = None
    once: int | None = None
    before: int | None = None
    after: int | None = None
    filter: Callable[..., Any] | None = None
    rank_zero: bool = False

    def __post_init__(self) -> None:
        for name, least in {"every": 1, "once": 1, "before": 2, "after": 0}.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(
                    f"trainer.on(..., {name}={value!r}): events are counted from 1, so a number "
                    f"from {least} on is needed{', or True for the first' if name == 'once' else ''}."
                )
        if self.filter is not None and not callable(self.filter):
            raise ConfigError(
                f"trainer.on(..., filter={self.filter!r}): a function is needed, which gets the "
                f"trainer and the number of the event."
            )
        first = self.once or ((self.after or 0) // (self.every or 1) + 1) * (self.every or 1)
        if not self._counted(first):
            given = {n: getattr(self, n) for n in ("every", "once", "before", "after")}
            text = ", ".join(f"{n}={value}" for n, value in given.items() if value is not None)
            raise ConfigError(f"trainer.on(..., {text}): no event has a number like that.")

    @property
    def counts(self) -> bool:
        """Whether the number of an event decides."""
        return (self.every, self.once, self.before, self.after) != (None,) * 4

    def passes(self, trainer: Trainer, number: int) -> bool:
        """Tells whether the function is called at the event of this number, but for the filter."""
        return (not self.rank_zero or trainer.is_global_zero) and self._counted(number)

    def _counted(self, number: int) -> bool:
        """Tells whether an event of this number is one of those that were asked for."""
        return (
            (self.every is None or number % self.every == 0)
            and (self.once is None or number == self.once)
            and (self.before is None or number < self.before)
            and (self.after is None or number > self.after)
        )


class Handler(Callback):
    """One function as a listener of one hook, after the callbacks and before the metric log.

    Args:
        event: The name of a hook, with or without its "on_".
        function: Gets what the hook gets, or its first arguments.
        when: At which events it is called.

    Attributes:
        label: What profilers and hints call it.
        function: The function as it was given.
        when: At which events it is called.

    Raises:
        ConfigError: For conditions that mean nothing at this event.
        HookNameError: For an event that does not exist.
        UsageError: For something that cannot be called, or not with what it gets.
    """

    order = 30

    def __init__(self, event: Any, function: Callable[..., Any], when: When) -> None:
        name, self.function, self.when = hook_of(event), function, when
        self.label = getattr(function, "__name__", type(function).__name__)
        if not callable(function):
            raise UsageError(
                f"trainer.on({event!r}, {function!r}): a function is needed, not "
                f"{type(function).__name__}."
            )
        if when.rank_zero and name == "on_loss":
            raise ConfigError(
                "trainer.on('loss', rank_zero=True) would give rank 0 another loss than the other "
                "ranks. Leave out rank_zero."
            )
        if when.counts and counter(name) is None:
            raise ConfigError(
                f"trainer.on({event!r}): that comes once in a call, so every=, once=, before= and "
                f"after= mean nothing there. Leave them out."
            )
        given = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        taken = _taken(self.label, function, given)
        plain = when == When() and taken == positional_arguments(function, len(given))
        setattr(self, name, function if plain else _conditional(name, function, when, taken))


def _taken(label: str, function: Callable[..., Any], given: Sequence[str]) -> int:
    """Returns how many of the given arguments a function gets.

    One with a default of its own, as in ``lambda trainer, tag=tag: ...``, keeps it, unless it has the
    name of what would come there.

    Raises:
        UsageError: The function needs more.
    """
    taken = positional_arguments(function, len(given))
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return taken
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    alone = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if needed := [p.name for p in (*named[len(given) :], *alone) if p.default is p.empty]:
        raise UsageError(
            f"{label} gets ({', '.join(given)}) or fewer, and nothing for its arguments "
            f"{', '.join(needed)}. Give them defaults, or leave them out."
        )
    pairs = enumerate(zip(named, given, strict=False))
    own = (i for i, (p, name) in pairs if p.default is not p.empty and p.name != name)
    return next(own, taken)


def _conditional(
    name: str, function: Callable[..., Any], when: When, taken: int
) -> Callable[..., Any]:
    """Returns a function that is called with all that a hook gives, and calls at its time."""
    number_of, chosen = counter(name), when.filter
    asked = 0 if chosen is None else _taken("filter", chosen, ("trainer", "number"))

    def call(trainer: Trainer, task: Any, *arguments: Any) -> Any:
        if when.counts and trainer.sanity_checking:  # a trial, which counts for nothing
            return None
        number = 1 if number_of is None else number_of(trainer.state, arguments)
        if when.passes(trainer, number) and (chosen is None or chosen(*(trainer, number)[:asked])):
            return function(*(trainer, task, *arguments)[:taken])
        return None

    call.__module__ = getattr(function, "__module__", call.__module__)  # whose code it is
    return call


def counter(name: str) -> Callable[[TrainState, Sequence[Any]], int] | None:
    """Returns what tells the number of an event, from 1 on, also in a run that is continued.

    What happens per batch counts the training batches of all epochs, per step the optimizer steps,
    per epoch the epochs, per validation the validations; a batch of an evaluation has its place in
    its loader. None for what comes once.
    """
    if name in ("on_train_batch_start", "on_loss", "on_before_backward", "on_after_backward"):
        return lambda state, _: state.batches_before + state.batch_idx + 1
    if name == "on_train_batch_end":
        return lambda state, _: state.batches_before + state.batch_idx
    if name in ("on_before_zero_grad", "on_before_optimizer_step"):
        return lambda state, _: state.global_step + 1
    if name in ("on_save_point", "on_save_checkpoint"):
        return lambda state, _: state.global_step
    if name.startswith("on_train_epoch_"):
        return lambda state, _: state.epoch + 1
    if name.endswith(("_batch_start", "_batch_end")):
        return lambda _, arguments: int(arguments[-2]) + 1
    return (lambda state, _: state.validations + 1) if name.startswith("on_validation_") else None


def hook_of(event: Any) -> str:
    """Returns the hook that an event means.

    Raises:
        HookNameError: For one that does not exist; it names the nearest, or ours for a peer's.
    """
    text = event if isinstance(event, str) else getattr(event, "name", repr(event))
    short = text.lower().removeprefix("events.").removeprefix("on_")
    for name in (f"on_{short}", short):
        if name in LOOP_HOOKS:
            return name
    for peer, names in PEERS.items():
        if short in names:
            raise HookNameError(
                f"trainer.on({text!r}): that is an event of {peer}. Here it is {names[short]!r}."
            )
    if f"on_{short}" in OLD_NAMES:
        raise HookNameError(f"trainer.on({text!r}): write {OLD_NAMES[f'on_{short}']}.")
    raise HookNameError(
        f"trainer.on({text!r}): there is no such event.{did_you_mean(short, _NAMES)} The events are "
        f"the hooks without 'on_': {', '.join(_NAMES)}."
    )


def returning(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function for ``on_loss`` that must return something to add."""

    @functools.wraps(function)
    def add(*arguments: Any) -> Any:
        more = function(*arguments)
        if more is None:
            raise UsageError(
                f"{getattr(function, '__name__', 'A function')}, given to trainer.add_to_loss, "
                f"returned None. Return the tensor to add; trainer.on('loss') may return nothing."
            )
        return more

    return add
