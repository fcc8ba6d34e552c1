"""Measures a run, and stops it after a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightkit.errors import one_of
from lightkit.hooks import Callback
from lightkit.limits import parse_duration

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_STAGES = ("train", "validate", "test", "predict")


class Timer(Callback):
    """Measures training, validation, test and prediction, and stops a fit after ``duration``.

    The time of training holds the validations within it; the sanity check is in neither. A fit
    begins at zero, a resumed one where the checkpoint was. With several ranks the time is rank
    zero's, and in a fit it moves about once a second.

    Args:
        duration: Training time after which the fit stops: ``"00:12:00:00"`` (days, hours, minutes,
            seconds), ``"90 min"``, a timedelta or the keyword arguments of one. None only measures.
        interval: "step" looks at the clock after every batch, "epoch" after every epoch.

    Raises:
        ConfigError: For a duration or an interval that cannot be read.
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
    ) -> None:
        one_of("Timer: interval", interval, ("step", "epoch"))
        self._limit = parse_duration(duration, "Timer(duration=)")
        self._interval = interval
        self._done = dict.fromkeys(_STAGES, 0.0)
        self._started: dict[str, float] = {}
        self._clock: Callable[[], float] = time.perf_counter

    def time_elapsed(self, stage: str = "train") -> float:
        """Returns the seconds spent so far in "train", "validate", "test" or "predict"."""
        one_of("Timer.time_elapsed: stage", stage, _STAGES)
        started = self._started.get(stage)
        running = 0.0 if started is None else self._clock() - started
        return self._done[stage] + running

    def time_remaining(self, stage: str = "train") -> float | None:
        """Returns the seconds left of ``duration``; None where there is no limit."""
        return None if self._limit is None else self._limit - self.time_elapsed(stage)

    def _start(self, stage: str) -> None:
        self._started[stage] = self._clock()

    def _stop(self, stage: str) -> None:
        self._done[stage] = self.time_elapsed(stage)
        self._started.pop(stage, None)

    def _check(self, trainer: Trainer) -> None:
        if self._limit is not None and self.time_elapsed() >= self._limit:
            trainer.stop(f"the time of {timedelta(seconds=self._limit)} is over")

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Sets what this entry point measures back to zero."""
        self._clock = time.perf_counter
        for name in ("train", "validate") if stage == "fit" else (stage,):
            self._done[name] = 0.0

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Starts the clock; a resumed run whose time is over stops at once."""
        self._clock = trainer.session.flow.clock
        self._start("train")
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the clock, with ``interval="step"``."""
        if self._interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Looks at the clock, with ``interval="epoch"``."""
        if self._interval == "epoch":
            self._check(trainer)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Stops the clock of training."""
        self._stop("train")

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Starts the clock of validation."""
        if not trainer.sanity_checking:
            self._start("validate")

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Stops the clock of validation."""
        self._stop("validate")

    def on_test_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Starts the clock of test."""
        self._start("test")

    def on_test_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Stops the clock of test."""
        self._stop("test")

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Starts the clock of prediction."""
        self._start("predict")

    def on_predict_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Stops the clock of prediction."""
        self._stop("predict")

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Stops the clocks that run."""
        for stage in tuple(self._started):
            self._stop(stage)

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds per stage."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._done.update(state_dict["time_elapsed"])
