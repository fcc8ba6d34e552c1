"""What ``configure_optimizers`` returned, read once, and kept for one fit.

`OptimizerPlan` holds the optimizers, their schedules and the list of their parameters.
`ManualOptimizer` is what a task steps itself in manual optimization.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightkit.errors import CheckpointError, OptimizerError, did_you_mean, one_of
from lightkit.fused import FusedChoice
from lightkit.schedules import Interval, SchedulerEntry, no_such_metric

if TYPE_CHECKING:
    from lightkit.precision import Precision
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")

_OUTER_KEYS = ("optimizer", "lr_scheduler", "monitor")
_INNER_KEYS = (
    "scheduler",
    "interval",
    "frequency",
    "monitor",
    "strict",
    "name",
    "reduce_on_plateau",
)
_SHAPES = (
    "It may return an optimizer; a list of optimizers; [optimizers], [schedulers]; "
    '{"optimizer": ..., "lr_scheduler": scheduler} or {"optimizer": ..., "lr_scheduler": '
    '{"scheduler": ..., "interval": "step"}}; a list of such dicts; or None.'
)
# How an update is computed belongs to the run, not to the checkpoint that it continues.
_HOW = ("foreach", "fused", "capturable", "differentiable")


class OptimizerPlan:
    """The optimizers and schedules of one fit; made by `OptimizerPlan.build`.

    Attributes:
        optimizers: As returned by ``configure_optimizers``, in that order.
        schedulers: Their schedules.
        step_entries: Those that move by optimizer steps without a monitor. Empty in manual
            optimization, where the task moves its schedules itself; so are the next two.
        epoch_entries: Those that move by epochs without a monitor.
        plateau_entries: Those that read a monitor.
        parameters: Every parameter of every group once; see `current_parameters`.
        needs_closure: Whether an optimizer computes the loss again within its step, as LBFGS does.
        automatic: Whether the loop steps (``task.automatic_optimization``).
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        schedulers: list[SchedulerEntry],
        *,
        automatic: bool = True,
        scheduler_step: Callable[[Any, Any], None] | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.automatic = automatic
        self._scheduler_step = scheduler_step
        moved = schedulers if automatic else []
        plain = [e for e in moved if not e.is_plateau]
        self.step_entries = tuple(e for e in plain if e.interval == "step")
        self.epoch_entries = tuple(e for e in plain if e.interval == "epoch")
        self.plateau_entries = tuple(e for e in moved if e.is_plateau)
        self.needs_closure = any(_needs_closure(o) for o in optimizers)
        self._fused: FusedChoice | None = None
        self._warned: set[str] = set()
        self.parameters: list[Parameter] = []
        self.refresh()

    @classmethod
    def build(cls, task: TaskModule, *, fused: bool | None, device: torch.device) -> OptimizerPlan:
        """Calls ``task.configure_optimizers()`` once and reads what it returned.

        Args:
            task: The task, on its device and sharded.
            fused: True runs every optimizer fused, False none, None those that were measured and
                whose ``foreach`` and ``fused`` were left alone.
            device: Where the run computes.

        Raises:
            OptimizerError: For anything that cannot be used, with what to write instead.
        """
        try:
            optimizers, raw = read(task.configure_optimizers())
        except ValueError as error:
            if "empty parameter list" not in str(error):
                raise
            raise OptimizerError(
                f"configure_optimizers: {error}. {nothing_to_train(task)}"
            ) from error
        _check_optimizers(optimizers, automatic=task.automatic_optimization)
        entries = [_entry(config, owner, optimizers, monitor) for config, owner, monitor in raw]
        if len({id(e.scheduler) for e in entries}) < len(entries):
            raise OptimizerError("configure_optimizers returned the same scheduler twice.")
        for entry in entries if task.automatic_optimization else ():
            if entry.is_plateau and entry.monitor is None:
                name = type(entry.scheduler).__name__
                raise OptimizerError(
                    f"{name} needs the metric it reads. Give {{'scheduler': ..., 'monitor': "
                    f"'val_loss'}} for it, as 'lr_scheduler' or from the function scheduler=."
                )
        method = getattr(type(task), "lr_scheduler_step", None)
        own = method is not None and method.__module__ != "lightkit.task"
        plan = cls(
            optimizers,
            entries,
            automatic=task.automatic_optimization,
            scheduler_step=task.lr_scheduler_step if own else None,
        )
        if fused is not False:
            plan._fused = FusedChoice(optimizers, task, device, strict=fused is True)
        return plan

    @property
    def optimizer(self) -> Optimizer | None:
        """The one optimizer of automatic optimization; None where there is not exactly one."""
        return self.optimizers[0] if len(self.optimizers) == 1 else None

    @property
    def fused(self) -> list[Optimizer]:
        """The optimizers that lightkit runs fused."""
        return [] if self._fused is None else list(self._fused.chosen)

    def refresh(self) -> None:
        """Reads the parameter groups again; `current_parameters` calls it when they changed."""
        unique: dict[int, Parameter] = {}
        groups = [(o, o.param_groups, len(o.param_groups)) for o in self.optimizers]
        members: list[tuple[dict[str, Any], list[Parameter], int]] = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                members.append((group, group["params"], len(group["params"])))
                unique.update((id(p), p) for p in group["params"])
        self._groups, self._members = tuple(groups), tuple(members)
        self.parameters = list(unique.values())
        if self._fused is not None:
            self._fused.apply()

    def current_parameters(self) -> list[Parameter]:
        """Returns the parameters of all groups, for clearing and clipping; cheap in every step.

        A group that was added, a list that was replaced or grew is noticed. An element put in the
        place of another in the same list is not: call `refresh` after that.
        """
        for optimizer, groups, count in self._groups:
            if optimizer.param_groups is not groups or len(groups) != count:
                self.refresh()
                return self.parameters
        for group, params, count in self._members:
            if group["params"] is not params or len(params) != count:
                self.refresh()
                break
        return self.parameters

    def step_schedulers(self, interval: Interval, count: int) -> None:
        """Moves the schedules without a monitor.

        It is not called for a step that the scaler of 16-mixed skipped. Nor does anything move
        after epochs whose steps were all skipped, from the first one on.

        Args:
            interval: "step" after an optimizer step, "epoch" after an epoch.
            count: Completed steps or epochs, this one and skipped ones included.
        """
        for entry in self.step_entries if interval == "step" else self.epoch_entries:
            if count % entry.frequency:
                continue
            if interval == "step" or _has_stepped(entry.optimizer):
                self._move(entry, None)

    def step_plateau(
        self,
        interval: Interval,
        count: int,
        metrics: Mapping[str, Tensor],
        *,
        validated: bool = True,
        reduced: Callable[[str], Tensor | None] | None = None,
    ) -> None:
        """Moves the schedules that read a monitor.

        Args:
            interval: "epoch" after an epoch with its validation, "step" after a step with its.
            count: Completed epochs or steps, this one included.
            metrics: ``trainer.callback_metrics``.
            validated: Whether a validation has run so far, or none ever will. Before the first
                one a missing monitor is passed over.
            reduced: Gives a metric as it is over all ranks; a collective. None reads ``metrics``.

        Raises:
            OptimizerError: When the monitor is not among the metrics and the entry is strict.
        """
        for entry in self.plateau_entries:
            if entry.interval != interval or count % entry.frequency:
                continue
            value = (metrics.get if reduced is None else reduced)(entry.monitor or "")
            if value is not None:
                self._move(entry, value)  # host sync: ReduceLROnPlateau compares the number
                continue
            text = no_such_metric(type(entry.scheduler).__name__, entry.monitor or "", metrics)
            if validated and entry.strict:
                raise OptimizerError(text)
            if validated and text not in self._warned:
                self._warned.add(text)
                _log.warning("%s The rate stays as it is.", text)

    def _move(self, entry: SchedulerEntry, metric: Tensor | None) -> None:
        if self._scheduler_step is not None:
            self._scheduler_step(entry.scheduler, metric)
        elif metric is None:
            entry.scheduler.step()
        else:
            entry.scheduler.step(metric)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all optimizers and schedules."""
        return {
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [e.scheduler.state_dict() for e in self.schedulers],
            "stepped": [_has_stepped(o) for o in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned; torch moves it to the parameters' devices.

        Whether updates are fused stays as this run decided it.

        Raises:
            CheckpointError: When the checkpoint has other optimizers, groups or schedules.
        """
        self.refresh()  # groups may have come since; what has taken steps is not changed any more
        saved, plans = state["optimizers"], state["schedulers"]
        _same_count("optimizers", len(saved), len(self.optimizers))
        _same_count("schedules", len(plans), len(self.schedulers))
        for i, (optimizer, one) in enumerate(zip(self.optimizers, saved, strict=True)):
            who = f"groups in optimizer {i} ({type(optimizer).__name__})"
            _same_count(who, len(one["param_groups"]), len(optimizer.param_groups))
            pairs = list(zip(one["param_groups"], optimizer.param_groups, strict=True))
            for j, (old, new) in enumerate(pairs):
                who = f"parameters in group {j} of optimizer {i} ({type(optimizer).__name__})"
                _same_count(who, len(old["params"]), len(new["params"]))
            groups = [{**old, **{k: new[k] for k in _HOW if k in new}} for old, new in pairs]
            optimizer.load_state_dict({**one, "param_groups": groups})
        for entry, one in zip(self.schedulers, plans, strict=True):
            entry.scheduler.load_state_dict(one)
        for optimizer, stepped in zip(self.optimizers, state.get("stepped", ()), strict=False):
            optimizer._opt_called = stepped  # type: ignore[attr-defined]  # see `_has_stepped`
        self.refresh()

    def check_horizon(self, planned_steps: int | None, planned_epochs: int | None) -> None:
        """Compares the length of one-cycle schedules with the planned run.

        Call it again after a checkpoint was loaded, which brings its own length.

        Args:
            planned_steps: Optimizer steps from 0 to the end of the run; None if unknown.
            planned_epochs: Epochs likewise.

        Raises:
            OptimizerError: When the run is longer, where torch would raise near its end.
        """
        for entry in (*self.step_entries, *self.epoch_entries):
            entry.check_horizon(planned_steps if entry.interval == "step" else planned_epochs)

    def describe(self, planned_steps: int | None, planned_epochs: int | None) -> list[str]:
        """Returns one line per schedule: its unit, and its first, highest and last rate.

        For example ``OneCycleLR per step: lr 0.004 -> 0.1 (step 30) -> 4e-07 (step 100)``.
        Nothing real is moved; see `SchedulerEntry.describe`.
        """
        planned = {"step": planned_steps, "epoch": planned_epochs}
        return [e.describe(planned[e.interval], automatic=self.automatic) for e in self.schedulers]


# --- reading what configure_optimizers returned ------------------------------------------------

# A schedule as it was written, the optimizer it was written beside, the monitor beside both.
_Raw = tuple[Any, Optimizer | None, str | None]


def read(value: Any) -> tuple[list[Any], list[_Raw]]:
    """Returns the optimizers and the schedules, as they were written."""
    if value is None:
        return [], []
    if isinstance(value, Optimizer):
        return [value], []
    if isinstance(value, Mapping):
        _check_keys(value, _OUTER_KEYS, "optimizer")
        plans = value.get("lr_scheduler")
        plans = list(plans) if isinstance(plans, (list, tuple)) else [plans]
        owner, monitor = value["optimizer"], value.get("monitor")
        return [owner], [(p, owner, monitor) for p in plans if p is not None]
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(part, (list, tuple)) for part in value):
            owner = value[0][0] if len(value[0]) == 1 else None
            return list(value[0]), [(plan, owner, None) for plan in value[1]]
        optimizers: list[Any] = []
        raw: list[_Raw] = []
        for item in value:
            if not isinstance(item, (Optimizer, Mapping)):
                raise OptimizerError(_unusable(item, "an element of its result"))
            more, plans = read(item)
            optimizers += more
            raw += plans
        return optimizers, raw
    raise OptimizerError(_unusable(value, "its result"))


def _unusable(value: Any, where: str) -> str:
    text = f"configure_optimizers: {where} is of type {type(value).__name__}."
    if isinstance(value, type):
        text = f"configure_optimizers: {where} is the class {value.__name__}, not an object of it."
    if callable(getattr(value, "step", None)) and not isinstance(value, type):
        text += " A scheduler goes into the second list: return [optimizer], [scheduler]."
    return f"{text} {_SHAPES}"


def _check_keys(value: Mapping[str, Any], keys: tuple[str, ...], needed: str) -> None:
    for key in value:
        if key in keys:
            continue
        if needed == "optimizer" and key in _INNER_KEYS[1:]:
            raise OptimizerError(
                f"configure_optimizers: {key!r} belongs into the dict of the scheduler, where it "
                f"is read: 'lr_scheduler': {{'scheduler': ..., {key!r}: {value[key]!r}}}."
            )
        raise OptimizerError(
            f"configure_optimizers: the key {key!r} is not known. The keys are "
            f"{', '.join(keys)}.{did_you_mean(str(key), keys)}"
        )
    if needed not in value:
        raise OptimizerError(f"configure_optimizers: a dict without the key {needed!r}. {_SHAPES}")


def _check_optimizers(optimizers: list[Any], *, automatic: bool) -> None:
    if not optimizers:
        _log.warning("configure_optimizers returned no optimizer: no parameter will be trained.")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise OptimizerError(_unusable(optimizer, "what stands for an optimizer"))
    if len({id(o) for o in optimizers}) < len(optimizers):
        raise OptimizerError("configure_optimizers returned the same optimizer twice.")
    if automatic and len(optimizers) > 1:
        raise OptimizerError(
            f"configure_optimizers returned {len(optimizers)} optimizers, and automatic "
            f"optimization steps one. Set self.automatic_optimization = False in __init__ and, in "
            f"training_step, use self.optimizers(), self.manual_backward(loss) and "
            f"optimizer.step(). Parameters with different rates need groups, not optimizers."
        )


def _entry(
    config: Any, owner: Optimizer | None, optimizers: list[Optimizer], monitor: str | None
) -> SchedulerEntry:
    """Returns the checked entry of one schedule as it was written."""
    values: dict[str, Any] = {"scheduler": config}
    if isinstance(config, Mapping):
        _check_keys(config, _INNER_KEYS, "scheduler")
        values = dict(config)
    values.setdefault("monitor", monitor)
    scheduler = values["scheduler"]
    name = type(scheduler).__name__
    if isinstance(scheduler, (type, Optimizer)) or not callable(getattr(scheduler, "step", None)):
        raise OptimizerError(_unusable(scheduler, "what stands for a scheduler"))
    by_step = isinstance(scheduler, (OneCycleLR, CyclicLR))
    interval = values.setdefault("interval", "step" if by_step else "epoch")
    one_of(f"{name}: interval", interval, ("step", "epoch"), OptimizerError)
    frequency = values.get("frequency", 1)
    if type(frequency) is not int or frequency < 1:
        raise OptimizerError(
            f"{name}: frequency={frequency!r} is not possible. It is a whole number of "
            f"{interval}s, at least 1."
        )
    watched = values["monitor"]
    if watched is not None and not isinstance(watched, str):
        raise OptimizerError(
            f"{name}: monitor={watched!r} is no name of a metric, such as 'val_loss'."
        )
    moved = getattr(scheduler, "optimizer", owner)
    if moved is None:
        raise OptimizerError(
            f"{name} does not say which optimizer it moves. Return it beside its optimizer: "
            f"{{'optimizer': ..., 'lr_scheduler': ...}}."
        )
    if not any(moved is o for o in optimizers):
        raise OptimizerError(
            f"{name} moves an optimizer ({type(moved).__name__}) that configure_optimizers did not "
            f"return, so the rates of the returned one would stay. Return the one it was made with."
        )
    return SchedulerEntry(optimizer=moved, **values)


def nothing_to_train(task: nn.Module) -> str:
    """Returns the text for an optimizer that has nothing to train."""
    trainable = sum(1 for p in task.parameters() if p.requires_grad)
    if trainable:
        return (
            f"{type(task).__name__} has {trainable} parameters that can be trained, but none of "
            f"them was given to it: look at how they are chosen."
        )
    why = "all of them are frozen" if any(True for _ in task.parameters()) else "there is none"
    return (
        f"No parameter of {type(task).__name__} can be trained: {why}. Store the layers as "
        f"attributes (lists of layers in a ModuleList) and set requires_grad_(True) on what "
        f"shall learn, or return None from configure_optimizers."
    )


def _needs_closure(optimizer: Optimizer) -> bool:
    first = list(inspect.signature(type(optimizer).step).parameters.values())[1:2]
    return bool(first) and first[0].default is inspect.Parameter.empty


def _has_stepped(optimizer: Optimizer) -> bool:
    # Torch's own mark, set where a torch schedule was made; it warns of the wrong order by it.
    marked = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    return not marked or getattr(optimizer, "_opt_called", False)


def _same_count(what: str, saved: int, here: int) -> None:
    if saved != here:
        raise CheckpointError(
            f"The checkpoint has {saved} {what}, this run has {here}. Resume with the same "
            f"configure_optimizers, or load the weights alone."
        )


# --- manual optimization -----------------------------------------------------------------------


class ManualOptimizer:
    """What ``self.optimizers()`` returns in manual optimization.

    It is the optimizer in every respect (``isinstance`` included), but `step` unscales, runs the
    hooks and clips first, and goes through the precision of the run.

    Attributes:
        raw_optimizer: The optimizer itself; also as ``optimizer``.

    Args:
        optimizer: The optimizer as ``configure_optimizers`` returned it.
        precision: The precision of the run.
        on_step: Called with the optimizer before each step, with true gradients: hooks, clipping.
    """

    def __init__(
        self, optimizer: Optimizer, precision: Precision, on_step: Callable[[Optimizer], None]
    ) -> None:
        self.raw_optimizer = self.optimizer = optimizer
        self._precision, self._update = precision, precision.bind_update(optimizer)
        self._on_step = on_step

    @property  # type: ignore[misc]
    def __class__(self) -> type[Optimizer]:  # type: ignore[override]
        return type(self.raw_optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step and returns what ``closure`` returned the first time, if there is one."""
        if closure is None:
            self._precision.unscale(self.raw_optimizer)
            self._on_step(self.raw_optimizer)
            self._update()
            return None
        losses: list[Any] = []

        def run() -> Any:
            with torch.enable_grad():
                losses.append(closure())
            self._precision.unscale(self.raw_optimizer)
            self._on_step(self.raw_optimizer)
            return losses[-1]

        self._precision.step(self.raw_optimizer, run)
        return losses[0] if losses else None

    def __repr__(self) -> str:
        return repr(self.raw_optimizer)
