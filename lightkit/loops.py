"""The loop. Plain functions over a fully built run; the only caller of the user's steps.

Five frames lie between a call of ``fit`` and the user's step: ``Trainer.fit``, `fit`,
`train_epoch`, `train_step`, ``training_step``. Whoever wants another loop imports `train_step` and
`validate` and writes a ``for``. The order of hooks is drawn in ``hooks.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit import rng
from lightkit.data import BatchStream, groups
from lightkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightkit.data import Group
    from lightkit.run import EvalRun, FitRun

_log = logging.getLogger("lightkit")
_clock = time.perf_counter


def fit(run: FitRun) -> None:
    """Trains until a limit of the run is reached or a stop was asked for."""
    hooks, flow = run.hooks, run.flow
    for hook in hooks.on_fit_start:
        hook()
    if run.sanity_batches and run.validation is not None:
        sanity_check(run)
    modes = _train_mode(run)
    run.metrics.begin_epoch()
    for hook in hooks.on_train_start:
        hook()
    try:
        while not done(run):
            train_epoch(run)
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
    flow.epoch_started, flow.data_wait = _clock(), 0.0
    stream = _open_epoch(run)
    try:
        for group in groups(stream, flow.accumulate):
            before = state.batch_idx
            train_step(run, group)
            flow.data_wait = stream.wait
            if state.batch_idx > before and validation_due(run, before):
                validate(run)
            if group.last or stream.ended:
                continue  # the end of the epoch offers the save, once its counter has moved
            flow.ending = done(run)  # within the epoch: a save holds the state before its end
            for hook in run.hooks.on_save_point:
                hook()
            if flow.ending:
                break
    finally:
        stream.close()
    state.seconds += _clock() - flow.epoch_started
    metrics.in_step = False
    metrics.reduce(training=True)
    if not flow.ending:
        run.plan.step_schedulers("epoch", state.epoch + 1)
        if run.validation is not None and run.cadence.due_after_epoch(state.epoch):
            validate(run)
    for hook in run.hooks.on_train_epoch_end:
        hook()
    if not flow.ending:
        end_epoch(run)


def end_epoch(run: FitRun) -> None:
    """Moves the epoch counter, the plateau schedules before it, and offers a save after it."""
    state, flow = run.state, run.flow
    validated = run.validation is None or state.validations > 0
    metrics = run.metrics.callback_metrics
    run.plan.step_plateau("epoch", state.epoch + 1, metrics, validated=validated)
    state.epoch += 1
    state.batch_idx = 0
    run.data.clear()
    flow.epoch_ended, flow.ending = True, done(run)
    for hook in run.hooks.on_save_point:
        hook()
    flow.epoch_ended = False


def _open_epoch(run: FitRun) -> BatchStream:
    """Starts a pass over the training loader, where the epoch begins or where it is continued."""
    state = run.state
    if run.reload is not None and state.batch_idx == 0:
        run.reload(run)
    run.metrics.begin_epoch()
    if state.batch_idx == 0:
        for hook in run.hooks.on_train_epoch_start:
            hook()
        # Where an epoch is resumed, its order is drawn again from here.
        run.data = {"rng": rng.rng_state()}
    elif "rng" in run.data:
        rng.set_rng_state(run.data["rng"])
    stream = BatchStream(
        run.train_loader,
        limit=run.train_limit,
        skip=state.batch_idx,
        epoch=state.epoch,
        sizes=run.counts,
        name="training loader",
    )
    if run.rng is not None:  # the random states of the checkpoint that this fit continues
        rng.set_rng_state(run.rng)
        run.rng = None
    return stream


def train_step(run: FitRun, group: Group) -> None:
    """Takes one optimizer step over a group of batches."""
    state, hooks, metrics, flow = run.state, run.hooks, run.metrics, run.flow
    plan, precision, size = run.plan, run.precision, group.size
    automatic = plan.automatic
    weighing = _Weighing(run, size) if size > 1 else None
    kept: list[tuple[Any, int]] | None = [] if run.keeps_batches else None
    if automatic:
        _clear_gradients(run)
    count = 0
    for batch in group:
        index = state.batch_idx
        if run.transfer is not None:
            batch = run.transfer(batch, 0)
        metrics.in_step, metrics.batch = True, batch
        metrics.size = run.counts.of(index) if run.counts is not None else None
        for hook in hooks.on_train_batch_start:
            hook(batch, index)
        if precision.autocast is None:
            outputs = run.training_step(batch, index) if run.takes_index else run.training_step(batch)
        else:
            with precision.autocast:
                outputs = (
                    run.training_step(batch, index) if run.takes_index else run.training_step(batch)
                )
        count += 1
        flow.group_open = count < size
        if automatic:
            outputs = backward(run, outputs, weighing)
            if kept is not None:
                kept.append((batch, index))
            if count == size and (outputs is not None or weighing is not None):
                step_optimizer(run, index, weighing, kept)
        else:
            outputs = _after_manual(run, outputs)
        state.batch_idx = index + 1
        state.batches_seen += 1
        for hook in hooks.on_train_batch_end:
            hook(outputs, batch, index)
    flow.group_open = False
    metrics.batch = None


def _clear_gradients(run: FitRun) -> None:
    """Clears the gradients of the step before; they stay readable until here."""
    plan = run.plan
    for hook in run.hooks.on_before_zero_grad:
        hook(plan.optimizer)
    if run.zero_grad is not None:
        run.zero_grad(run.state.batch_idx)
    else:
        for parameter in plan.current_parameters():
            parameter.grad = None


def backward(run: FitRun, outputs: Any, weighing: _Weighing | None) -> Any:
    """Differentiates what ``training_step`` returned.

    Returns:
        The outputs with the loss detached, as the hooks get them.
    """
    if type(outputs) is Tensor:
        loss, weight, extra = outputs, None, None
    else:
        loss, weight, extra = unpack(outputs)
        if loss is None:
            run.flow.skipped += 1
            return None
    if not loss.requires_grad or loss.ndim:
        loss = _checked(loss)
    if weighing is not None:
        scaled = weighing.scale(loss, weight)
    else:
        scaled = loss
    for hook in run.hooks.on_before_backward:
        hook(scaled)
    run.precision.backward(scaled)
    for hook in run.hooks.on_after_backward:
        hook()
    detached = loss.detach()
    run.metrics.add_loss(detached, weight)
    if extra is None:
        return detached
    for name, value in extra.items():
        if name not in ("loss", "weight"):
            run.metrics.add_returned("train", name, value)
    return {**extra, "loss": detached}


def unpack(outputs: Any) -> tuple[Tensor | None, Any, Mapping[str, Any] | None]:
    """Returns loss, weight and the whole mapping of what ``training_step`` returned."""
    if outputs is None:
        return None, None, None
    if isinstance(outputs, Tensor):
        return outputs, None, None
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("loss"), Tensor):
            return outputs["loss"], outputs.get("weight"), outputs
        raise UsageError(
            f"training_step returned a mapping without a tensor under 'loss' (it has: "
            f"{', '.join(map(str, outputs)) or 'nothing'}). Return {{'loss': loss}}, optionally "
            f"with 'weight' and with values to log."
        )
    raise UsageError(
        f"training_step returned {type(outputs).__name__}. Return the loss as a tensor, a mapping "
        f"with 'loss' (and perhaps 'weight'), or None to skip the batch."
    )


def _checked(loss: Tensor) -> Tensor:
    """Returns a loss of one element as a 0-dim tensor; everything else is an error."""
    if loss.numel() != 1:
        raise UsageError(
            f"training_step returned a loss of shape {tuple(loss.shape)}, but one number is "
            f"needed. Return loss.mean()."
        )
    if not loss.requires_grad:
        raise UsageError(
            "training_step returned a loss that does not depend on any trainable parameter "
            "(requires_grad is False). Look for .detach(), .item(), torch.no_grad() or numpy "
            "between the model and the loss, and for parameters that are all frozen."
        )
    return loss.reshape(())


class _Weighing:
    """Makes the gradient of a group that of the one big batch.

    Without weights each loss counts by its share of the samples where the batches are known to
    differ, else by one over the group's true length. With ``"weight"`` (tokens, samples) the
    losses are multiplied by it, and the gradients divided by the sum before the step.
    """

    def __init__(self, run: FitRun, size: int, first: int | None = None) -> None:
        self.size, self.taken = size, 0
        self.total: Any = None
        self.unit: Any = None
        self._shares: list[float] | None = None
        if run.counts is not None:
            first = run.state.batch_idx if first is None else first
            counts = [run.counts.of(i) for i in range(first, first + size)]
            known = [c for c in counts if c is not None]
            if len(known) == size and len(set(known)) > 1:
                self._shares = [c / sum(known) for c in known]
        self._scaled = run.precision.has_scaler

    def scale(self, loss: Tensor, weight: Any) -> Tensor:
        """Returns the loss to differentiate."""
        place, self.taken = self.taken, self.taken + 1
        if weight is None:
            return loss * self._shares[place] if self._shares else loss / self.size
        if self._scaled:  # sums of many tokens would leave the range of fp16
            self.unit = weight if self.unit is None else self.unit
            weight = weight / self.unit
        if isinstance(weight, Tensor):
            weight = weight.detach()
        self.total = weight if self.total is None else self.total + weight
        return loss * weight

    def finish(self, parameters: list[Tensor]) -> bool:
        """Divides the gradients by the sum of the weights; False where there is nothing to do."""
        factor: Any = None
        if self.total is not None:
            if not isinstance(self.total, Tensor) or self.total.device.type == "cpu":
                if not self.total:  # no sync: it is a number, or lies in host memory
                    return False
                factor = 1.0 / self.total
            else:  # on a device nothing is read: a group of weight 0 gets gradients of 0
                factor = torch.where(self.total > 0, 1.0 / self.total, 0.0)
        elif 0 < self.taken < self.size:  # some batches were skipped by returning None
            factor = self.size / self.taken
        gradients = [p.grad for p in parameters if p.grad is not None]
        if factor is not None and gradients:
            torch._foreach_mul_(gradients, factor)
        return self.taken > 0


def step_optimizer(
    run: FitRun, index: int, weighing: _Weighing | None, kept: list[tuple[Any, int]] | None
) -> None:
    """Unscales, clips and steps at the end of a group, and moves the schedules by steps."""
    plan, precision, state = run.plan, run.precision, run.state
    optimizer, parameters = plan.optimizer, plan.parameters
    if weighing is not None and not weighing.finish(parameters):
        return
    moved = True
    if optimizer is not None:
        if precision.has_scaler and (run.clip is not None or run.hooks.on_before_optimizer_step):
            precision.unscale(optimizer)
        for hook in run.hooks.on_before_optimizer_step:
            hook(optimizer)
        if run.clip is not None:
            run.clip(optimizer, parameters)
        if kept is None:
            moved = precision.step(optimizer)
        elif run.optimizer_step is not None:
            run.optimizer_step(state.epoch, index, optimizer, Closure(run, kept))
        else:
            moved = precision.step(optimizer, Closure(run, kept))
    state.global_step += 1
    if plan.step_entries:
        plan.step_schedulers("step", state.global_step, skip=not moved)


class Closure:
    """What an optimizer that evaluates the loss several times gets (LBFGS, SAM).

    The first call returns the loss that is there already, with its gradients; each further one
    clears them and computes the group again.
    """

    def __init__(self, run: FitRun, batches: list[tuple[Any, int]]) -> None:
        self._run, self._batches, self._first = run, batches, True

    def __call__(self) -> Tensor:
        """Returns the loss of the group, detached; the gradients are those of the weights now."""
        run, count = self._run, len(self._batches)
        if self._first:
            self._first = False
            return torch.stack([v for v in run.metrics.loss.values[-count:]]).mean()  # type: ignore[misc]
        for parameter in run.plan.parameters:
            parameter.grad = None
        weighing = _Weighing(run, count, self._batches[0][1]) if count > 1 else None
        with run.metrics.muted(), torch.enable_grad():
            losses = [self._repeat(batch, index, weighing) for batch, index in self._batches]
        if weighing is not None:
            weighing.finish(run.plan.parameters)
        if run.clip is not None:
            run.clip(run.plan.optimizer, run.plan.parameters)
        return torch.stack(losses).mean()

    def _repeat(self, batch: Any, index: int, weighing: _Weighing | None) -> Tensor:
        run = self._run
        arguments = (batch, index) if run.takes_index else (batch,)
        if run.precision.autocast is None:
            loss, weight, _ = unpack(run.training_step(*arguments))
        else:
            with run.precision.autocast:
                loss, weight, _ = unpack(run.training_step(*arguments))
        if loss is None:
            return torch.zeros(())
        run.precision.backward(loss if weighing is None else weighing.scale(loss, weight))
        return loss.detach()


def _after_manual(run: FitRun, outputs: Any) -> Any:
    """Counts the step of a task that optimizes by itself, and keeps what it returned."""
    run.state.global_step += 1
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
    if unit == "epoch" or run.validation is None:
        return False
    every = cadence.every
    if unit == "batches":
        in_turn = (state.epoch + 1) % cadence.epochs == 0
        return in_turn and state.batch_idx // every > before // every
    if unit == "total":
        seen = state.batches_seen
        return seen // every > (seen - state.batch_idx + before) // every
    if unit == "steps":
        return state.global_step % every == 0 and run.flow.validated_step != state.global_step
    return _clock() - run.flow.validated_at >= every


def validate(run: FitRun) -> None:
    """Runs the validation of a fit; training goes on afterwards as if nothing had been."""
    assert run.validation is not None
    evaluate(run.validation, sanity=run.flow.sanity_checking)
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
        with rng.preserved():
            for hook in run.hooks.on_sanity_check_start:
                hook()
            for plan in loaders:
                few = run.sanity_batches
                plan.limit = few if plan.limit is None else min(few, plan.limit)
            validate(run)
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
    for index, batch, size in _batches(plan.loader, plan.limit, name):
        if run.transfer is not None:
            batch = run.transfer(batch, number)
        metrics.in_step, metrics.batch, metrics.size = True, batch, size
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
    if isinstance(outputs, Tensor):
        run.metrics.add_returned(run.prefix, "loss", outputs)
    elif isinstance(outputs, Mapping):
        for name, value in outputs.items():
            run.metrics.add_returned(run.prefix, str(name), value)


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
