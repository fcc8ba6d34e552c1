"""Learning rate schedules: when one moves, how long it lasts, and the line that tells it."""

from __future__ import annotations

import copy
import logging
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lightkit.errors import OptimizerError, did_you_mean

_log = logging.getLogger("lightkit")

Interval = Literal["step", "epoch"]
#: Longer schedules are not simulated for their line (20,000 moves take about 0.1 s).
SIMULATED = 20_000


@dataclass
class SchedulerEntry:
    """A schedule and when it moves.

    Attributes:
        scheduler: Anything with ``step()``.
        optimizer: The optimizer whose rates it sets.
        interval: "step" moves it after optimizer steps, "epoch" after epochs.
        frequency: It moves after every so many of them.
        monitor: The metric that a plateau schedule reads.
        name: The name of its curve; None for ``lr-<optimizer class>``.
        strict: Whether a missing monitor is an error (else a warning).
        reduce_on_plateau: Whether ``step`` wants the monitored value, as ReduceLROnPlateau does.
    """

    scheduler: Any
    optimizer: Optimizer
    interval: Interval = "epoch"
    frequency: int = 1
    monitor: str | None = None
    name: str | None = None
    strict: bool = True
    reduce_on_plateau: bool = False

    @property
    def is_plateau(self) -> bool:
        """Whether its ``step`` is given the monitored value."""
        return self.reduce_on_plateau or isinstance(self.scheduler, ReduceLROnPlateau)

    def check_horizon(self, planned: int | None) -> None:
        """Compares the length of a one-cycle schedule with the run.

        Args:
            planned: Steps or epochs (by `interval`) from 0 to the end of the run; None if unknown.

        Raises:
            OptimizerError: When the run is longer, where torch would raise near its end.
        """
        if planned is None or not isinstance(self.scheduler, OneCycleLR):
            return
        moves, total = planned // self.frequency, self.scheduler.total_steps
        text = (
            f"{type(self.scheduler).__name__} was made for total_steps={total}, but this run of "
            f"{planned} {self.interval}s moves it {moves} times ({_unit(self)}). Make it with "
            f"total_steps={moves}"
        )
        if self.interval == "step":
            text += " (self.trainer.estimated_stepping_batches)"
        if moves > total:
            if getattr(self.scheduler, "last_epoch", 0) > 0:
                text += ". A checkpoint brings the length of its own run, which cannot be extended"
            raise OptimizerError(f"{text}.")
        if moves < total:
            other = ", or set interval='step'" if self.interval == "epoch" else ""
            _log.warning("%s%s: as it is, its last part is never reached.", text, other)

    def describe(self, planned: int | None, *, automatic: bool = True) -> str:
        """Returns one line: its unit, and its first, highest and last rate over the run.

        The rates come from moving a copy; nothing real is touched.

        Args:
            planned: As in `check_horizon`. If unknown, or above 20,000 moves, only the first rate
                is told.
            automatic: False where the task moves its schedules itself.
        """
        name = type(self.scheduler).__name__
        first = float(self.optimizer.param_groups[0]["lr"])
        if not automatic:
            return f"{name} moved by the task: lr {first:.4g} at the start"
        start = f"{name} {_unit(self)}: lr {first:.4g}"
        if self.is_plateau:
            return f"{start}, lowered when {self.monitor!r} stays on a plateau"
        done = max(getattr(self.scheduler, "last_epoch", 0), 0) * self.frequency
        left = 0 if planned is None else planned - done
        moves = -(-left // self.frequency)
        rates = _simulate(self, moves) if 0 < moves <= SIMULATED else []
        if not rates:
            return f"{start} at the start"
        top = max(range(moves), key=rates.__getitem__)
        peak = ""
        if rates[top] > 1.0001 * max(rates[0], rates[-1]):
            peak = f" -> {rates[top]:.4g} ({self.interval} {done + top * self.frequency + 1})"
        return f"{start}{peak} -> {rates[-1]:.4g} ({self.interval} {planned})"


def no_such_metric(who: str, monitor: str, names: Iterable[str]) -> str:
    """Returns the text for a monitored metric that does not exist, with the names there are."""
    there = sorted(names)
    listed = ", ".join(repr(n) for n in there) or "none yet"
    return (
        f"{who} monitors {monitor!r}, which is not among the metrics: {listed}."
        f"{did_you_mean(monitor, there)}"
    )


def _unit(entry: SchedulerEntry) -> str:
    if entry.frequency == 1:
        return f"per {entry.interval}"
    return f"every {entry.frequency} {entry.interval}s"


def _methods(value: Any) -> Iterator[types.MethodType]:
    if isinstance(value, types.MethodType):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _methods(one)
    elif isinstance(value, LRScheduler):
        yield from _methods(list(vars(value).values()))


def _simulate(entry: SchedulerEntry, moves: int) -> list[float]:
    """Returns the first group's rate before each of ``moves`` moves; empty if it cannot be told."""
    groups: list[dict[str, Any]] = []
    # Shared, not copied: a schedule made from a method must not copy the task behind it.
    memo: dict[int, Any] = {id(m): m for m in _methods(entry.scheduler)}
    for group in entry.optimizer.param_groups:
        values = {k: v for k, v in group.items() if k != "params"}
        groups.append({"params": [nn.Parameter(torch.zeros(1))], **copy.deepcopy(values)})
    memo[id(entry.optimizer)] = dummy = SGD(groups, lr=0.0)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moves without optimizer steps are meant here
        try:
            scheduler = copy.deepcopy(entry.scheduler, memo)
            for _ in range(moves):
                rates.append(float(dummy.param_groups[0]["lr"]))
                scheduler.step()
        except Exception:  # noqa: BLE001 - a user's schedule may refuse copies: then no numbers
            return rates if len(rates) == moves else []
    return rates
