"""What a run is doing at the moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lightkit.timing import Times


@dataclass(slots=True)
class Flow:
    """What a run is doing at the moment; never saved. The loop and ``Trainer.stop`` write it.

    Attributes:
        stop_reason: Why the run shall end at the next step; None to go on.
        sanity_checking: Whether the validation before training runs.
        validating: Whether a validation runs within the fit.
        epoch_ended: At a save point: whether an epoch ended with this step.
        ending: At a save point: whether it is the last of the run.
        accumulate: Batches per optimizer step from the next epoch on.
        data_wait: Seconds of this epoch spent waiting for its loader.
        epoch_started: ``perf_counter`` at the start of the epoch.
        deadline: ``clock()`` after which the run ends; None for never.
        counted: ``perf_counter`` when the time of the run was last added to its state.
        validated_at: ``clock()`` at the last validation's end.
        validated_step: ``global_step`` of the last validation, -1 before the first.
        group_open: Whether gradients of a group that did not step yet are there.
        skipped: Batches that ``training_step`` skipped by returning None.
        signal: Number of the signal that asked the run to end; a handler sets it.
        group_start: ``batch_idx`` when the group of batches under way, or the last one, began.
        group_step: ``global_step`` at that moment.
        clock: Seconds as ``perf_counter`` counts them; with several ranks those of rank zero at the
            last agreement, so that what depends on time is decided alike.
        shared: Whether several ranks must agree before a wish of one of them is followed.
        silent: Whether another rank says what there is to say.
        heard: A signal that came to this rank and is not agreed on yet.
        asked: Why this rank shall stop, where that is not agreed on yet.
        first_batch: ``batch_idx`` at which the running epoch began here; more than 0 in one that is
            continued.
        times: Where the time goes.
    """

    accumulate: int = 1
    stop_reason: str | None = None
    sanity_checking: bool = False
    validating: bool = False
    epoch_ended: bool = False
    ending: bool = False
    data_wait: float = 0.0
    epoch_started: float = 0.0
    deadline: float | None = None
    counted: float = 0.0
    validated_at: float = 0.0
    validated_step: int = -1
    group_open: bool = False
    skipped: int = 0
    signal: int | None = None
    group_start: int = 0
    group_step: int = 0
    clock: Callable[[], float] = time.perf_counter
    shared: bool = False
    silent: bool = False
    heard: int | None = None
    asked: str | None = None
    first_batch: int = 0
    times: Times = field(default_factory=Times)

    def begin_epoch(self, batch_idx: int, *, ending: bool = False) -> None:
        """Takes down that an epoch begins, or goes on at a batch; ``ending``: only to end."""
        now = time.perf_counter()
        self.times.begin_epoch(now, self.data_wait)
        self.epoch_started, self.data_wait = now, 0.0
        self.first_batch, self.ending = batch_idx, ending

    def hear(self, number: int) -> None:
        """Takes a signal down; called by a handler, between any two instructions."""
        if self.shared:
            self.heard = number
        elif self.signal is None:
            self.signal = number

    def ask(self, reason: str) -> None:
        """Takes down that the run shall stop, and why."""
        if self.shared:
            self.asked = self.asked or reason
        elif self.stop_reason is None:
            self.stop_reason = reason
