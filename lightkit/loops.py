"""The loop. Plain functions over a fully built run; ``evaluation.py`` has one evaluation of it.

Five frames lie between a call of ``fit`` and the user's step: ``Trainer.fit``, `fit`,
`train_epoch`, `train_step`, ``training_step``. Whoever wants another loop imports `train_step` and
`validate` and writes a ``for``. The order of hooks is drawn in ``hooks.py``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from torch import Tensor

from lightkit import rng, signals
from lightkit.closure import Closure
from lightkit.data import END, generators
from lightkit.data.groups import groups
from lightkit.errors import UsageError
from lightkit.evaluation import evaluate, listening, train_mode
from lightkit.freezing import modes_kept
from lightkit.losses import (
    Weighing,
    added,
    after_manual,
    check_over_ranks,
    check_progress,
    check_skip,
    checked,
    is_zero,
    unpack,
)

if TYPE_CHECKING:
    from lightkit.data import BatchStream
    from lightkit.data.groups import Group
    from lightkit.run import FitRun

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
    with modes_kept(run.task):
        train_mode(run.task)
        run.metrics.begin_epoch()
        try:
            for hook in hooks.on_train_start:
                hook()
            run.settle_switches()
            _agree(run, "the start of training")
            if flow.signal is not None:
                _stop(run)  # nothing was trained that could be saved
            if run.state.batch_idx and over(run):
                _end_epoch_cut_off(run)
            while not over(run):
                before = run.state.global_step, flow.skipped
                train_epoch(run)
                check_progress(run, *before)
            run.set_rng()  # a checkpoint after which nothing was left to train
        finally:
            run.metrics.close("after training")
    for hook in hooks.on_train_end:
        hook()
    for hook in hooks.on_fit_end:
        hook()
    if flow.stop_reason is not None:
        _log.info("stopped: %s", flow.stop_reason)
    if flow.skipped:
        _log.warning("training_step returned None for %d batches: skipped", flow.skipped)


def over(run: FitRun) -> bool:
    """Tells whether the run is over by itself: limits, time, or a request to stop."""
    flow, limits = run.flow, run.limits
    if limits.reached(run.state):
        return True
    if flow.deadline is not None and flow.clock() >= flow.deadline and flow.stop_reason is None:
        flow.stop_reason = "max_time is over"
    return flow.stop_reason is not None and limits.may_stop(run.state)


def train_epoch(run: FitRun) -> None:
    """Trains one epoch, or the rest of one that a checkpoint left in the middle."""
    state, flow, metrics = run.state, run.flow, run.metrics
    flow.begin_epoch(state.batch_idx)
    stream = _open_epoch(run)
    metrics.begin_steps()
    within = run.validation is not None and run.cadence.unit != "epoch"
    pending, state.pending_validation = state.pending_validation, ""
    try:
        if pending in ("step", "batch"):
            _finish_step(run, stream, stepped=pending == "step")
        batches_over = pending == "epoch" or flow.ending
        for group in () if batches_over else groups(stream, flow.accumulate):
            flow.group_start = before = state.batch_idx
            flow.group_step = steps = state.global_step
            train_step(run, group)
            flow.data_wait = stream.wait
            if within and state.batch_idx > before and validation_due(run, before):
                validate(run)
                metrics.begin_steps()
            if run.plan.plateau_entries and state.global_step > steps:
                _step_plateau(run, "step", state.global_step)
            if run.agree is not None:
                run.agree()  # now and then a collective, on the CPU
            if group.last or stream.ended:
                continue  # the end of the epoch offers the save, once its counter has moved
            asked = flow.stop_reason is not None or flow.signal is not None
            if asked or flow.deadline is not None or state.global_step == run.limits.max_steps:
                _last_save(run)  # within the epoch: a save holds the state before its end
                if flow.ending:
                    break
            else:
                for hook in run.hooks.on_save_point:
                    hook()
    finally:
        stream.close()
    _close_epoch(run)


def _close_epoch(run: FitRun) -> None:
    """Does what follows the last batch of an epoch, or the last one before the run ended in it."""
    state, flow = run.state, run.flow
    run.precision.settle()
    run.metrics.end_steps()
    run.metrics.reduce(training=True)
    if not flow.ending and run.validation and run.cadence.due_after_epoch(state.epoch):
        validate(run, batches_over=True)
    for hook in run.hooks.on_train_epoch_end:
        hook()
    if not flow.ending:
        end_epoch(run)


def _agree(run: FitRun, what: str) -> None:
    """Makes the wishes of single ranks common, now. With several ranks a collective, on the CPU."""
    if run.agree is not None:
        run.agree.reach(what)


def _end_epoch_cut_off(run: FitRun) -> None:
    """Goes on with a run that is over at a checkpoint within an epoch, and did not come to its end.

    All that is missing is what followed the checkpoint: a validation that a signal broke off, the
    epoch's means, its entry in the history.
    """
    state, flow = run.state, run.flow
    if state.pending_validation or state.batch_idx == run.train_length:
        train_epoch(run)
        return
    run.set_rng()
    flow.begin_epoch(state.batch_idx, ending=True)
    _close_epoch(run)


def _finish_step(run: FitRun, stream: BatchStream, *, stepped: bool) -> None:
    """Does what was left of a step when a signal broke its validation off."""
    state, flow = run.state, run.flow
    flow.group_step = state.global_step - stepped
    if run.validation is not None:
        validate(run)
    run.metrics.begin_steps()
    if stepped:
        _step_plateau(run, "step", state.global_step)
    if stream.length is None or state.batch_idx < stream.length:
        _last_save(run)


def _last_save(run: FitRun) -> None:
    """Offers a save that may be the last of the run; ends the run where a signal asked for it."""
    flow = run.flow
    flow.ending = over(run) or flow.signal is not None
    _count_time(run)
    for hook in run.hooks.on_save_point:
        hook()
    if flow.ending and flow.signal is not None and not over(run):  # else it ends as usual
        _stop(run)


def _stop(run: FitRun) -> NoReturn:
    """Ends the run for a signal."""
    number = run.flow.signal
    assert number is not None
    place = run.state.global_step, run.state.epoch + 1, run.state.batch_idx
    _log.info("%s: stopped after step %d (epoch %d, batch %d)", signals.name(number), *place)
    raise signals.ended_by(number)


def end_epoch(run: FitRun) -> None:
    """Moves the schedules, then the epoch counter, and offers a save after it."""
    state, flow = run.state, run.flow
    run.plan.step_schedulers("epoch", state.epoch + 1)
    _step_plateau(run, "epoch", state.epoch + 1)
    missed = run.cadence.unit == "batches" and state.batch_idx < run.cadence.every
    if missed and not state.epoch and run.validation is not None:
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
    flow.epoch_ended = True
    _agree(run, "the end of the epoch")
    _last_save(run)
    _agree(run, "the save at the end of the epoch")
    if not flow.ending and (over(run) or flow.signal is not None):
        _last_save(run)  # one of the listeners asked for the end, or a signal came meanwhile
    flow.epoch_ended = False


def _count_time(run: FitRun) -> None:
    """Adds the time since the last call to what a checkpoint says the run has taken."""
    now = _clock()
    run.state.seconds += now - run.flow.counted
    run.flow.counted = now


def _step_plateau(run: FitRun, interval: Literal["step", "epoch"], count: int) -> None:
    """Moves the schedules that read a metric."""
    if run.plan.plateau_entries:
        run.precision.settle()  # they move after those of the step before, as without a scaler
    validated = run.validation is None or run.state.validations > 0
    metrics, reduced = run.metrics.callback_metrics, run.metrics.reduced
    run.plan.step_plateau(interval, count, metrics, validated=validated, reduced=reduced)


def _open_epoch(run: FitRun) -> BatchStream:
    """Starts a pass over the training loader, where the epoch begins or where it is continued."""
    state = run.state
    run.reopen()
    if state.batch_idx == 0:
        run.set_rng()  # the random states of the checkpoint that this fit continues
        if run.reload is not None:
            run.reload(run)
    run.metrics.begin_epoch()
    if state.batch_idx == 0:
        for hook in run.hooks.on_train_epoch_start:
            hook()
    run.strategy.begin_epoch(run.task)
    return run.open_pass()


def train_step(run: FitRun, group: Group) -> None:
    """Takes one optimizer step over a group of batches.

    Its cost is that of the Python between the user's code and torch, so what a fit does not use is
    passed over by a test of a local variable.
    """
    state, hooks, now, fetch, size = run.state, run.hooks, run.metrics.now, group.fetch, group.size
    automatic, counts, transfer, autocast = run.automatic, run.counts, run.transfer, run.autocast
    step, takes_index, sync = run.training_step, run.takes_index, run.sync
    weighing = Weighing(run, size) if size > 1 or run.agree is not None else None
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
                run.strategy.average_gradients(run.plan.parameters)  # nobody knew it was the last
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
        if sync is not None:
            sync(count == size)
        if autocast is None:
            outputs = step(batch, index) if takes_index else step(batch)
        else:
            with autocast:
                outputs = step(batch, index) if takes_index else step(batch)
        if automatic:
            outputs = backward(run, outputs, weighing)
            if closure is not None and outputs is not None:
                losses = run.metrics.loss
                alike = weighing is not None and run.several and not weighing.weighted
                weight = 1 if alike else losses.weights[-1]
                closure.add(batch, index, losses.values[-1], weight)
            if count == size and (outputs is not None or weighing is not None):
                step_optimizer(run, index, weighing, closure)
        else:
            outputs = after_manual(run, outputs)
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
        What the hooks get: a mapping with the detached loss and what else was returned; None for a
        batch that is skipped.
    """
    hooks, weight, extra = run.hooks, None, None
    loss = outputs
    if type(outputs) is not Tensor:
        loss, weight, extra = unpack(outputs)
        if loss is None:
            check_skip(run)
            run.flow.skipped += 1
            return None
        if weighing is None and is_zero(weight):  # nothing in the batch counts
            return None
    for hook in hooks.on_loss:
        loss = added(loss, hook(loss))
    if loss.ndim or not loss.requires_grad:
        loss = checked(loss)
    scaled = loss
    if weighing is not None:
        scaled = weighing.scale(loss, weight, run.metrics.samples())
    for hook in hooks.on_before_backward:
        hook(scaled)
    run.differentiate(scaled)
    for hook in hooks.on_after_backward:
        hook()
    detached = loss.detach()
    run.metrics.add_loss(detached, weight)
    if extra is None:
        return {"loss": detached}
    for name, value in extra.items():
        if name not in ("loss", "weight"):
            run.metrics.add_returned("train", name, value)
    return {**extra, "loss": detached}


def step_optimizer(
    run: FitRun, index: int, weighing: Weighing | None, closure: Closure | None
) -> None:
    """Unscales, clips and steps at the end of a group, and moves the schedules by steps."""
    hooks, optimizer = run.hooks, run.optimizer
    if run.agree is not None and weighing is not None:
        check_over_ranks(run, weighing)
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
            _step_with_closure(run, index, closure)
        elif run.update is not None:
            run.update()
    run.state.global_step += 1
    if run.scaled:  # the schedules follow when it is known that the step was not skipped
        run.precision.end_step(partial(run.plan.step_schedulers, "step", run.state.global_step))
    elif run.plan.step_entries:
        run.plan.step_schedulers("step", run.state.global_step)


def _step_with_closure(run: FitRun, index: int, closure: Closure) -> None:
    """Steps an optimizer that needs a closure, or as the task's ``optimizer_step`` says."""
    optimizer = run.optimizer
    if run.optimizer_step is not None:
        run.optimizer_step(run.state.epoch, index, optimizer, closure)
        return
    assert optimizer is not None
    run.precision.step(optimizer, closure)


def validation_due(run: FitRun, before: int) -> bool:
    """Tells whether an interval of ``val_check_interval`` ends with this step.

    Args:
        run: The run.
        before: ``batch_idx`` before the step.
    """
    cadence, state, clock = run.cadence, run.state, run.flow.clock
    unit, every = cadence.unit, cadence.every
    if unit == "batches":
        in_turn = (state.epoch + 1) % cadence.epochs == 0
        return in_turn and state.batch_idx // every > before // every
    if unit == "total":
        done_before = state.batches_before
        return (done_before + state.batch_idx) // every > (done_before + before) // every
    if unit == "steps":
        return state.global_step % every == 0 and run.flow.validated_step != state.global_step
    return bool(clock() - run.flow.validated_at >= every)


def validate(run: FitRun, *, batches_over: bool = False) -> None:
    """Runs the validation of a fit; training goes on afterwards as if nothing had been.

    A signal breaks it off, if `may_break_off` allows it: the run ends in the state of before, and
    begins with the validation when it goes on.

    Args:
        run: The run.
        batches_over: Whether the epoch has no more batches.
    """
    assert run.validation is not None
    flow, sanity = run.flow, run.flow.sanity_checking
    before = None if sanity else (run.before_validation(), run.metrics.eval_state())
    if run.early and batches_over:
        run.begin_next()
    flow.validating = True
    flow.times.enter(flow.times.validation)
    run.strategy.before_evaluation(run.task)  # over ranks a collective: buffers
    try:
        complete = flow.signal is None and evaluate(
            run.validation, sanity=sanity, **listening(run, run.validation)
        )
    finally:
        flow.times.leave(flow.times.validation)
        flow.validating = False
    run.metrics.begin_epoch()
    if not complete:
        _break_off(run, before, batches_over)
    if not sanity:
        run.state.validations += 1
        flow.validated_step = run.state.global_step
        flow.validated_at = flow.clock()
    _agree(run, "the end of a validation")


def _break_off(run: FitRun, before: Any, batches_over: bool) -> NoReturn:
    """Ends the run for a signal that came in a validation, as if that had not begun."""
    state, flow = run.state, run.flow
    if before is not None:  # else it is the sanity check, before which there is nothing to save
        loaders, metrics = before
        run.undo_validation(loaders)
        run.metrics.set_eval_state(metrics)
        stepped = state.global_step > flow.group_step
        state.pending_validation = "epoch" if batches_over else "step" if stepped else "batch"
        _last_save(run)
    _stop(run)


def sanity_check(run: FitRun) -> None:
    """Tries a few validation batches before training, on a copy of the random states."""
    assert run.validation is not None
    loaders, most = run.validation.loaders, run.sanity_batches
    results = run.metrics.callback_metrics.results
    before = dict(results)
    run.flow.sanity_checking = True
    # With feeds of their own: persistent workers that start here would have drawn nothing.
    run.validation.loaders = [
        replace(
            plan,
            limit=plan.feed.at_most(most, plan.limit),
            feed=plan.feed.fresh(),
        )
        for plan in loaders
    ]
    try:
        with rng.preserved(*(g for plan in loaders for g in generators(plan.loader))):
            for hook in run.hooks.on_sanity_check_start:
                hook()
            validate(run)
            run.metrics.close("before training")
            for hook in run.hooks.on_sanity_check_end:
                hook()
    finally:
        results.clear()
        results.update(before)
        run.validation.close_feeds()
        run.validation.loaders = loaders
        run.flow.sanity_checking = False
