"""The loop. Plain functions over a fully built run; the only caller of the user's steps.

Five frames lie between a call of ``fit`` and the user's step: ``Trainer.fit``, `fit`,
`train_epoch`, `train_step`, ``training_step``. Whoever wants another loop imports `train_step` and
`validate` and writes a ``for``. The order of hooks is drawn in ``hooks.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightkit import rng
from lightkit.closure import Closure
from lightkit.data import END, BatchStream, generators, groups
from lightkit.errors import UsageError
from lightkit.losses import Weighing, checked, is_zero, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightkit.data import Group
    from lightkit.run import EvalRun, FitRun

_log = logging.getLogger("lightkit")
_clock = time.perf_counter
_NO_SKIP = (
    "on_train_batch_start returned -1, which skips the rest of an epoch elsewhere. Here return None "
    "from training_step to skip a batch, set limit_train_batches, or call trainer.stop(reason)."
)


def fit(run: FitRun) -> None:
    """Trains until a limit of the run is reached or a stop was asked for."""
    hooks, flow = run.hooks, run.flow
    flow.counted = _clock()
    for hook in hooks.on_fit_start:
        hook()
    if run.sanity_batches and run.validation is not None:
        sanity_check(run)
    modes = _train_mode(run)
    run.metrics.begin_epoch()
    try:
        for hook in hooks.on_train_start:
            hook()
        while not done(run):
            train_epoch(run)
        run.set_rng()  # a checkpoint after which nothing was left to train
    finally:
        run.metrics.close("after training")
        _restore_modes(modes)
    for hook in hooks.on_train_end:
        hook()
    for hook in hooks.on_fit_end:
        hook()
    if flow.stop_reason is not None:
        _log.info("stopped: %s", flow.stop_reason)
    if flow.skipped:
        _log.warning("training_step returned None for %d batches: skipped", flow.skipped)


def done(run: FitRun) -> bool:
    """Tells whether the run is over: limits, time, or a request to stop."""
    flow, limits = run.flow, run.limits
    if limits.reached(run.state):
        return True
    if flow.deadline is not None and _clock() >= flow.deadline and flow.stop_reason is None:
        flow.stop_reason = "max_time is over"
    return flow.stop_reason is not None and limits.may_stop(run.state)


def train_epoch(run: FitRun) -> None:
    """Trains one epoch, or the rest of one that a checkpoint left in the middle."""
    state, flow, metrics = run.state, run.flow, run.metrics
    flow.epoch_started, flow.data_wait, flow.ending = _clock(), 0.0, False
    stream = _open_epoch(run)
    metrics.begin_steps()
    within = run.validation is not None and run.cadence.unit != "epoch"
    try:
        for group in groups(stream, flow.accumulate):
            before, steps = state.batch_idx, state.global_step
            train_step(run, group)
            flow.data_wait = stream.wait
            if within and state.batch_idx > before and validation_due(run, before):
                validate(run)
                metrics.begin_steps()
            if run.plan.plateau_entries and state.global_step > steps:
                _step_plateau(run, "step", state.global_step)
            if group.last or stream.ended:
                continue  # the end of the epoch offers the save, once its counter has moved
            asked = flow.stop_reason is not None or flow.deadline is not None
            if asked or state.global_step == run.limits.max_steps:
                flow.ending = done(run)  # within the epoch: a save holds the state before its end
                _count_time(run)
            for hook in run.hooks.on_save_point:
                hook()
            if flow.ending:
                break
    finally:
        stream.close()
    metrics.end_steps()
    metrics.reduce(training=True)
    if not flow.ending and run.validation and run.cadence.due_after_epoch(state.epoch):
        validate(run)
    for hook in run.hooks.on_train_epoch_end:
        hook()
    if not flow.ending:
        end_epoch(run)


def end_epoch(run: FitRun) -> None:
    """Moves the schedules, then the epoch counter, and offers a save after it."""
    state, flow = run.state, run.flow
    run.plan.step_schedulers("epoch", state.epoch + 1)
    _step_plateau(run, "epoch", state.epoch + 1)
    if run.cadence.unit == "batches" and state.batch_idx < run.cadence.every and not state.epoch:
        _log.warning(
            "The epoch had %d batches, so val_check_interval=%d never comes. Lower it, or count "
            "over epochs with check_val_every_n_epoch=None.",
            state.batch_idx,
            run.cadence.every,
        )
    state.batches_before += state.batch_idx
    state.epoch += 1
    state.batch_idx = 0
    run.data.clear()
    _count_time(run)
    flow.epoch_ended, flow.ending = True, done(run)
    for hook in run.hooks.on_save_point:
        hook()
    if not flow.ending and done(run):  # one of them asked for the end: now it is the last save
        flow.ending = True
        for hook in run.hooks.on_save_point:
            hook()
    flow.epoch_ended = False


def _count_time(run: FitRun) -> None:
    """Adds the time since the last call to what a checkpoint says the run has taken."""
    now = _clock()
    run.state.seconds += now - run.flow.counted
    run.flow.counted = now


def _step_plateau(run: FitRun, interval: Literal["step", "epoch"], count: int) -> None:
    """Moves the schedules that read a metric."""
    validated = run.validation is None or run.state.validations > 0
    metrics = run.metrics.callback_metrics
    run.plan.step_plateau(interval, count, metrics, validated=validated)


def _open_epoch(run: FitRun) -> BatchStream:
    """Starts a pass over the training loader, where the epoch begins or where it is continued."""
    state = run.state
    if state.batch_idx == 0:
        run.set_rng()  # the random states of the checkpoint that this fit continues
        if run.reload is not None:
            run.reload(run)
    run.metrics.begin_epoch()
    if state.batch_idx == 0:
        for hook in run.hooks.on_train_epoch_start:
            hook()
        # Where an epoch is resumed, its order is drawn again from here.
        run.data = run.order_state()
    elif run.data:
        run.set_order_state(run.data)
    stream = BatchStream(
        run.train_loader,
        limit=run.train_limit,
        skip=state.batch_idx,
        epoch=state.epoch,
        sizes=run.counts,
        name="training loader",
    )
    run.set_rng()  # in the middle of an epoch: after its order was drawn again
    return stream


def train_step(run: FitRun, group: Group) -> None:
    """Takes one optimizer step over a group of batches.

    Its cost is that of the Python between the user's code and torch, so what a fit does not use is
    passed over by a test of a local variable.
    """
    state, hooks, now, fetch, size = run.state, run.hooks, run.metrics.now, group.fetch, group.size
    automatic, counts, transfer, autocast = run.automatic, run.counts, run.transfer, run.autocast
    step, takes_index = run.training_step, run.takes_index
    weighing = Weighing(run, size) if size > 1 else None
    closure = Closure(run) if run.keeps_batches else None
    if automatic:
        for hook in hooks.on_before_zero_grad:
            hook(run.optimizer)
        if run.zero_grad is None:
            for parameter in run.plan.current_parameters():
                parameter.grad = None
        else:
            run.zero_grad(state.batch_idx)
    for count in range(1, size + 1):
        batch = fetch()
        if batch is END:
            group.say_torn(count - 1)
            if automatic and count > 1:
                step_optimizer(run, state.batch_idx - 1, weighing, closure)
            break
        index = state.batch_idx
        if transfer is not None:
            batch = transfer(batch, 0)
        now.batch = batch
        now.size = None if counts is None else counts.of(index)
        for hook in hooks.on_train_batch_start:
            if hook(batch, index) == -1:
                raise UsageError(_NO_SKIP)
        if autocast is None:
            outputs = step(batch, index) if takes_index else step(batch)
        else:
            with autocast:
                outputs = step(batch, index) if takes_index else step(batch)
        if automatic:
            outputs = backward(run, outputs, weighing)
            if closure is not None and outputs is not None:
                losses = run.metrics.loss
                closure.add(batch, index, losses.values[-1], losses.weights[-1])
            if count == size and (outputs is not None or weighing is not None):
                step_optimizer(run, index, weighing, closure)
        else:
            outputs = _after_manual(run, outputs)
            state.global_step += 1  # one per batch, whatever the number of optimizers
        state.batch_idx = index + 1
        if weighing is not None:
            run.flow.group_open = count < size
        for hook in hooks.on_train_batch_end:
            hook(outputs, batch, index)
    run.flow.group_open = False


def backward(run: FitRun, outputs: Any, weighing: Weighing | None) -> Any:
    """Differentiates what ``training_step`` returned.

    Returns:
        The outputs with the loss detached, as the hooks get them; None for a batch that is skipped.
    """
    hooks, weight, extra = run.hooks, None, None
    loss = outputs
    if type(outputs) is not Tensor:
        loss, weight, extra = unpack(outputs)
        if loss is None:
            run.flow.skipped += 1
            return None
        if weighing is None and is_zero(weight):  # nothing in the batch counts
            return None
    if loss.ndim or not loss.requires_grad:
        loss = checked(loss)
    scaled = loss
    if weighing is not None:
        scaled = weighing.scale(loss, weight, run.metrics.samples())
    for hook in hooks.on_before_backward:
        hook(scaled)
    if run.scaled:
        run.precision.backward(scaled)
    else:
        scaled.backward()
    for hook in hooks.on_after_backward:
        hook()
    detached = loss.detach()
    run.metrics.add_loss(detached, weight)
    if extra is None:
        return detached
    for name, value in extra.items():
        if name not in ("loss", "weight"):
            run.metrics.add_returned("train", name, value)
    return {**extra, "loss": detached}


def step_optimizer(
    run: FitRun, index: int, weighing: Weighing | None, closure: Closure | None
) -> None:
    """Unscales, clips and steps at the end of a group, and moves the schedules by steps."""
    hooks, optimizer, moved = run.hooks, run.optimizer, True
    if weighing is not None and not weighing.finish(run.plan.parameters):
        return
    if optimizer is not None:
        if run.scaled and (run.clip or closure or hooks.on_before_optimizer_step):
            run.precision.unscale(optimizer)
        for hook in hooks.on_before_optimizer_step:
            hook(optimizer)
        if run.clip is not None:
            run.clip(optimizer, run.plan.parameters)
        if closure is not None:
            moved = _step_with_closure(run, index, closure)
        elif run.scaled:
            moved = run.precision.step(optimizer)
        else:
            optimizer.step()
    run.state.global_step += 1
    if run.plan.step_entries:
        run.plan.step_schedulers("step", run.state.global_step, skip=not moved)


def _step_with_closure(run: FitRun, index: int, closure: Closure) -> bool:
    """Steps an optimizer that needs a closure, or as the task's ``optimizer_step`` says."""
    optimizer = run.optimizer
    if run.optimizer_step is not None:
        run.optimizer_step(run.state.epoch, index, optimizer, closure)
        return run.precision.moved
    assert optimizer is not None
    return run.precision.step(optimizer, closure)


def _after_manual(run: FitRun, outputs: Any) -> Any:
    """Keeps what the step of a task that optimizes by itself returned."""
    if outputs is None:
        return None
    if isinstance(outputs, Mapping):
        loss, extra = outputs.get("loss"), outputs
    else:
        loss, extra = outputs, None
    if isinstance(loss, Tensor):
        loss = loss.detach()
        run.metrics.add_loss(loss.reshape(()), None)
    if extra is None:
        return loss
    for name, value in extra.items():
        if name != "loss":
            run.metrics.add_returned("train", name, value)
    return {**extra, "loss": loss}


def validation_due(run: FitRun, before: int) -> bool:
    """Tells whether an interval of ``val_check_interval`` ends with this step.

    Args:
        run: The run.
        before: ``batch_idx`` before the step.
    """
    cadence, state = run.cadence, run.state
    unit = cadence.unit
    every = cadence.every
    if unit == "batches":
        in_turn = (state.epoch + 1) % cadence.epochs == 0
        return in_turn and state.batch_idx // every > before // every
    if unit == "total":
        done_before = state.batches_before
        return (done_before + state.batch_idx) // every > (done_before + before) // every
    if unit == "steps":
        return state.global_step % every == 0 and run.flow.validated_step != state.global_step
    return _clock() - run.flow.validated_at >= every


def validate(run: FitRun) -> None:
    """Runs the validation of a fit; training goes on afterwards as if nothing had been."""
    assert run.validation is not None
    run.flow.validating = True
    try:
        evaluate(run.validation, sanity=run.flow.sanity_checking)
    finally:
        run.flow.validating = False
    if not run.flow.sanity_checking:
        run.state.validations += 1
        run.flow.validated_step = run.state.global_step
        run.flow.validated_at = _clock()
    run.metrics.begin_epoch()


def sanity_check(run: FitRun) -> None:
    """Tries a few validation batches before training, on a copy of the random states."""
    run.flow.sanity_checking = True
    assert run.validation is not None
    loaders = run.validation.loaders
    limits = [plan.limit for plan in loaders]
    try:
        with rng.preserved(*(g for plan in loaders for g in generators(plan.loader))):
            for hook in run.hooks.on_sanity_check_start:
                hook()
            for plan in loaders:
                few = run.sanity_batches
                plan.limit = few if plan.limit is None else min(few, plan.limit)
            validate(run)
            run.metrics.close("before training")
            for hook in run.hooks.on_sanity_check_end:
                hook()
    finally:
        for plan, limit in zip(loaders, limits, strict=True):
            plan.limit = limit
        run.flow.sanity_checking = False


def evaluate(run: EvalRun, *, sanity: bool = False) -> None:
    """Runs one evaluation over all its loaders, in eval mode and without gradients."""
    metrics = run.metrics
    modes = [(module, module.training) for module in run.task.modules()]
    run.task.eval()
    try:
        if run.prefix is None:
            metrics.close("in predict")
        else:
            metrics.begin_eval(sanity=sanity)
        _fire(run, "start", "epoch_start")
        for number in range(len(run.loaders)):
            if run.prefix is not None:
                metrics.begin_eval(run.rename[number], loader=number, sanity=sanity)
            _evaluate_loader(run, number)
        if run.prefix is not None:
            metrics.begin_eval_hooks()
            metrics.reduce(training=False)
        _fire(run, "epoch_end")
        metrics.close(f"in or after on_{run.stage}_end")
        _fire(run, "end")
    finally:
        _restore_modes(modes)


def _fire(run: EvalRun, *places: str) -> None:
    """Calls the hooks ``on_<stage>_<place>``."""
    for place in places:
        for hook in getattr(run.hooks, f"on_{run.stage}_{place}"):
            hook()


def _evaluate_loader(run: EvalRun, number: int) -> None:
    """Runs the user's step over one loader."""
    plan, metrics, autocast = run.loaders[number], run.metrics, run.autocast
    starts = getattr(run.hooks, f"on_{run.stage}_batch_start")
    ends = getattr(run.hooks, f"on_{run.stage}_batch_end")
    no_grad = torch.no_grad()
    name = f"{run.stage} loader" if plan.name is None else f"{run.stage} loader {plan.name!r}"
    metrics.begin_steps()
    for index, batch, size in _batches(plan.loader, plan.limit, name):
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


def _batches(loader: Any, limit: int | None, name: str) -> Iterator[tuple[int, Any, int | None]]:
    """Yields (batch_idx, batch, samples in it if known) of one pass."""
    if limit == 0:
        return
    stream = BatchStream(loader, limit=limit, name=name)
    try:
        for batch in stream:
            yield stream.fetched - 1, batch, stream.size
    finally:
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


def _train_mode(run: FitRun) -> list[tuple[torch.nn.Module, bool]]:
    """Puts the task into train mode, but for what is frozen in eval mode on purpose."""
    modes = [(module, module.training) for module in run.task.modules()]
    kept = [
        name
        for name, module in run.task.named_modules()
        if not module.training and name and run.task.training
    ]
    if not run.task.training:  # as a whole in eval mode, perhaps from an earlier evaluation
        run.task.train()
    elif kept:
        _log.info("%d modules stay in eval mode, as they were: %s", len(kept), ", ".join(kept[:5]))
    return modes


def _restore_modes(modes: list[tuple[torch.nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training is not training:
            module.training = training
