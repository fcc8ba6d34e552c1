"""One evaluation: a validation within a fit or alone, a test, a prediction."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightkit.data import BatchStream
from lightkit.errors import some
from lightkit.freezing import modes_kept
from lightkit.hooks import Callback, of_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightkit.flow import Flow
    from lightkit.run import EvalRun, FitRun, LoaderPlan
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")


def evaluate(
    run: EvalRun,
    *,
    sanity: bool = False,
    flow: Flow | None = None,
    agree: Callable[[], None] | None = None,
) -> bool:
    """Runs one evaluation over all its loaders, in eval mode and without gradients.

    Args:
        run: The evaluation.
        sanity: Whether what is logged is to be dropped.
        flow: Where a signal is taken down that breaks the evaluation off at its next batch; None for
            one that is always completed.
        agree: Makes signals of single ranks common; called at every batch that all of them have.

    Returns:
        Whether it was completed; otherwise no hook of its end was called.
    """
    metrics = run.metrics
    with modes_kept(run.task):
        run.task.eval()
        if run.prefix is None:
            metrics.close("in predict")
        else:
            metrics.begin_eval(sanity=sanity)
        _fire(run, "start", "epoch_start")
        for number in range(len(run.loaders)):
            if run.prefix is not None:
                metrics.begin_eval(run.rename[number], loader=number, sanity=sanity)
            if not _evaluate_loader(run, number, flow, agree):
                return False
        if run.prefix is not None:
            metrics.begin_eval_hooks()
            metrics.reduce(training=False)
        _fire(run, "epoch_end")
        metrics.close(f"in or after on_{run.stage}_end")
        _fire(run, "end")
        return True


def listening(fit: FitRun, run: EvalRun) -> dict[str, Any]:
    """Returns the arguments by which `evaluate` hears of signals in a validation of a fit."""
    if not may_break_off(run):
        return {}
    if fit.agree is None:
        return {"flow": fit.flow}
    if fit.strategy.sharded:  # ranks that share a model go on to the end together
        return {}
    return {"flow": fit.flow, "agree": fit.agree.in_evaluation}


def may_break_off(run: EvalRun) -> bool:
    """Tells whether an evaluation can be ended between two batches as if it had not begun.

    Not where the user's code listens to its start: what is done there is undone at the end, as by a
    callback that evaluates averaged weights. Nor where a callback with a state of its own listens to
    its batches.
    """
    hooks, stage = run.hooks, run.stage
    starts = (f"on_{stage}_start", f"on_{stage}_epoch_start")
    batches = (f"on_{stage}_batch_start", f"on_{stage}_batch_end")
    return not any(of_user(hook) for name in starts for hook in getattr(hooks, name)) and not any(
        of_user(hook) and _has_state(hook) for name in batches for hook in getattr(hooks, name)
    )


def _has_state(hook: Any) -> bool:
    """Tells whether it belongs to a callback that has something to save."""
    owner = getattr(inspect.unwrap(getattr(hook, "func", hook)), "__self__", None)
    return isinstance(owner, Callback) and type(owner).state_dict is not Callback.state_dict


def _fire(run: EvalRun, *places: str) -> None:
    """Calls the hooks ``on_<stage>_<place>``."""
    for place in places:
        for hook in getattr(run.hooks, f"on_{run.stage}_{place}"):
            hook()


def _evaluate_loader(
    run: EvalRun, number: int, flow: Flow | None, agree: Callable[[], None] | None
) -> bool:
    """Runs the user's step over one loader; returns False where a signal broke it off."""
    plan, metrics, autocast = run.loaders[number], run.metrics, run.autocast
    starts = getattr(run.hooks, f"on_{run.stage}_batch_start")
    ends = getattr(run.hooks, f"on_{run.stage}_batch_end")
    no_grad = torch.no_grad()
    name = f"{run.stage} loader" if plan.name is None else f"{run.stage} loader {plan.name!r}"
    metrics.begin_steps()
    common = 0 if agree is None else plan.of_all()
    for index, batch, size in run.in_step(_batches(plan, name)):
        if agree is not None and index < common:
            agree()  # now and then a collective, on the CPU
        if flow is not None and flow.signal is not None:
            return False
        if run.transfer is not None:
            batch = run.transfer(batch, number)
        metrics.now.batch, metrics.now.size = batch, size
        for hook in starts:
            hook(batch, index, number)
        arguments = (batch, index, number)[: run.arguments]
        with no_grad:  # around the user's step only: no hook runs inside a context manager
            if autocast is None:
                outputs = run.step(*arguments)
            else:
                with autocast:
                    outputs = run.step(*arguments)
        if run.prefix is not None and outputs is not None:
            _log_returned(run, outputs)
        if run.outputs is not None:
            run.outputs[number].append(outputs)
        for hook in ends:
            hook(outputs, batch, index, number)
        if index == 0:
            metrics.seen.add(number)
    return True


def _batches(plan: LoaderPlan, name: str) -> Iterator[tuple[int, Any, int | None]]:
    """Yields (batch_idx, batch, samples in it if known) of one pass."""
    if plan.limit == 0:
        return
    stream = BatchStream(plan.loader, limit=plan.limit, feed=plan.feed, name=name)
    try:
        for batch in stream:
            yield stream.fetched - 1, batch, stream.size
    finally:
        plan.waited += stream.wait
        stream.close()


def _log_returned(run: EvalRun, outputs: Any) -> None:
    """Logs the scalars that a validation or test step returned and did not log itself."""
    assert run.prefix is not None
    if isinstance(outputs, Mapping):
        weight = outputs.get("weight")
        for name, value in outputs.items():
            if name != "weight":
                own = weight if name == "loss" else None
                run.metrics.add_returned(run.prefix, str(name), value, own)
    else:  # what is no number is passed over
        run.metrics.add_returned(run.prefix, "loss", outputs)


def train_mode(task: TaskModule) -> None:
    """Puts a task into train mode, but for what is frozen in eval mode on purpose."""
    kept = [
        name
        for name, module in task.named_modules()
        if not module.training and name and task.training
    ]
    if not task.training:  # as a whole in eval mode, perhaps from an earlier evaluation
        task.train()
    elif kept:
        tops = [name for name in kept if name.rpartition(".")[0] not in kept]
        _log.info("%d modules stay in eval mode, as they were: %s", len(kept), some(tops))
