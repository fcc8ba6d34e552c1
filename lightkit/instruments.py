"""Takes the time of everything in a run, for profilers; nothing of it is there without one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightkit.hook_names import LOOP_HOOKS
from lightkit.hooks import of_user
from lightkit.run import EvalRun, FitRun

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightkit.data import Feed
    from lightkit.timing import Part, Times


def instrument(run: FitRun | EvalRun, times: Times) -> Callable[[], None]:
    """Makes each piece of a run a part of its ``times``, with a label where a profiler records.

    Pieces are the loader, the transfer, the user's step, backward, the steps of optimizers,
    clipping, and every listener of every hook by name. What is timed anyway stays as it is.

    Args:
        run: The run of a fit or of an evaluation, built and between two steps.
        times: Those of its flow.

    Returns:
        What takes it all away again, also between two steps.
    """
    undo = contextlib.ExitStack()
    if times.instrumented:  # by another profiler, which began before and ends after this one
        return undo.close
    times.instrumented = True
    undo.callback(setattr, times, "instrumented", False)
    _time_hooks(undo, run.hooks, times)
    evaluation = run.validation if isinstance(run, FitRun) else run
    if evaluation is not None:
        stage = evaluation.stage
        _replace(undo, evaluation, "step", times.part(f"{stage}_step", "validation"), times)
        _replace(undo, evaluation, "transfer", times.part(f"{stage} transfer", "validation"), times)
        data = times.part(f"{stage} data", "validation")
        begin = times.part(f"{stage} data, begin", "validation")
        for feed in {id(plan.feed): plan.feed for plan in evaluation.loaders}.values():
            _time_feed(undo, feed, data, begin, times)
    if isinstance(run, FitRun):
        _replace(undo, run, "training_step", times.part("training_step", "step"), times)
        _replace(undo, run, "transfer", times.part("transfer", "step"), times)
        _replace(undo, run, "clip", times.part("clip gradients", "step"), times)
        _time_backward(undo, run.hooks, times)
        for optimizer in run.plan.optimizers:
            _time_optimizer(undo, optimizer, times)
        data, begin = times.part("data", "data"), times.part("data, begin", "data")
        _time_feed(undo, run.feed, data, begin, times)
    return undo.close


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, part: Part, times: Times) -> None:
    """Puts a function with its time taken in the place of another, where there is one."""
    function = getattr(owner, name)
    if function is not None:
        setattr(owner, name, times.timed(function, part))
        undo.callback(setattr, owner, name, function)


def _time_feed(
    undo: contextlib.ExitStack, feed: Feed, data: Part, begin: Part, times: Times
) -> None:
    """Takes the time of each batch of a loader and of the begin of its passes."""

    def around(wrap: Any) -> None:
        feed.wrap = wrap
        if feed.stream is not None:  # a pass that is under way
            feed.stream.around(wrap)

    around(lambda fetch: times.timed(fetch, data))
    undo.callback(around, None)
    _replace(undo, feed, "iterate", begin, times)


def _time_hooks(undo: contextlib.ExitStack, hooks: Any, times: Times) -> None:
    """Takes the time of our own listeners, each under its name."""
    for name in LOOP_HOOKS:
        before = getattr(hooks, name)
        timed = []
        for hook in before:
            owner = getattr(inspect.unwrap(getattr(hook, "func", hook)), "__self__", None)
            own = isinstance(hook, partial) and not of_user(hook)
            if own and getattr(owner, "measured", True):  # a profiler does not measure itself
                kind = "validation" if "validation" in name else "step"
                part = times.part(f"{type(owner).__name__}.{name}", kind)
                hook = partial(times.timed(hook.func, part), *hook.args)
            timed.append(hook)
        setattr(hooks, name, tuple(timed))
        undo.callback(setattr, hooks, name, before)


def _time_backward(undo: contextlib.ExitStack, hooks: Any, times: Times) -> None:
    """Takes the time between the last listener before backward and the first one after it."""
    part = times.part("backward", "step")
    before, after = hooks.on_before_backward, hooks.on_after_backward
    hooks.on_before_backward = (*before, lambda loss: times.enter(part))
    hooks.on_after_backward = (lambda: times.leave(part), *after)
    undo.callback(setattr, hooks, "on_before_backward", before)
    undo.callback(setattr, hooks, "on_after_backward", after)


def _time_optimizer(undo: contextlib.ExitStack, optimizer: Optimizer, times: Times) -> None:
    """Takes the time of ``optimizer.step``, by torch's own hooks."""
    part = times.part(f"{type(optimizer).__name__}.step", "step")
    begun = optimizer.register_step_pre_hook(lambda *_: times.enter(part))
    ended = optimizer.register_step_post_hook(lambda *_: times.leave(part))
    undo.callback(begun.remove)
    undo.callback(ended.remove)
