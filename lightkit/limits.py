"""How long a fit runs and when it validates: the numbers of the Trainer, read once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lightkit.errors import ConfigError
from lightkit.state import TrainState

DEFAULT_EPOCHS = 10
_UNITS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}
_UNITS |= {"d": 86400, "day": 86400}


@dataclass(frozen=True, slots=True)
class Limits:
    """When a fit ends. -1 means no limit.

    Attributes:
        max_epochs: Epochs after which the fit ends.
        max_steps: Optimizer steps after which it ends.
        min_epochs: A request to stop (early stopping) waits for so many epochs.
        min_steps: A request to stop waits for so many steps.
        seconds: Time after which it ends, at the next step; None for no limit.
        default_epochs: Whether nobody chose, so that ``max_epochs`` is the default.
    """

    max_epochs: int
    max_steps: int
    min_epochs: int
    min_steps: int
    seconds: float | None
    default_epochs: bool = False

    def reached(self, state: TrainState) -> bool:
        """Tells whether enough epochs or steps are done."""
        return 0 <= self.max_steps <= state.global_step or 0 <= self.max_epochs <= state.epoch

    def may_stop(self, state: TrainState) -> bool:
        """Tells whether a request to stop may be followed now."""
        return state.epoch >= self.min_epochs and state.global_step >= self.min_steps


@dataclass(frozen=True, slots=True)
class Cadence:
    """When a fit validates.

    Attributes:
        unit: "epoch" (after every ``every``-th epoch), "batches" (within an epoch), "total"
            (batches counted over epochs), "steps" or "seconds".
        every: The length of the interval in that unit.
        epochs: With "batches": only in every ``epochs``-th epoch.
    """

    unit: str
    every: float
    epochs: int = 1

    def due_after_epoch(self, epoch: int) -> bool:
        """Tells whether validation follows the epoch (counted from 0) that was just trained."""
        return self.unit == "epoch" and (epoch + 1) % int(self.every) == 0


def parse_duration(value: str | timedelta | dict[str, int] | None, argument: str) -> float | None:
    """Returns seconds.

    Args:
        value: ``"00:12:00:00"`` (days:hours:minutes:seconds), ``"90 min"``, a timedelta, or the
            keyword arguments of one.
        argument: Whose value it is, for the message.

    Raises:
        ConfigError: When it cannot be read as a positive duration.
    """
    if value is None:
        return None
    seconds: float | None = None
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, dict):
        try:
            seconds = timedelta(**value).total_seconds()
        except TypeError:
            names = "days, hours, minutes, seconds"
            raise ConfigError(
                f"{argument}={value!r}: allowed are numbers of {names} and what else a timedelta "
                f"takes, such as {{'hours': 2}}."
            ) from None
    elif isinstance(value, str):
        clock = re.fullmatch(r"\s*(\d+):(\d+):(\d+):(\d+)\s*", value)
        words = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]+?)s?\s*", value.lower())
        if clock:
            days, hours, minutes, rest = map(int, clock.groups())
            seconds = timedelta(days, rest, hours=hours, minutes=minutes).total_seconds()
        elif words and words[2] in _UNITS:
            seconds = float(words[1]) * _UNITS[words[2]]
    if seconds is None or seconds <= 0:
        raise ConfigError(
            f"{argument}={value!r} is no duration. Allowed: 'DD:HH:MM:SS' such as '00:12:00:00', "
            f"'90 min', '2 hours', a timedelta, or a dict such as {{'hours': 2}}."
        )
    return seconds


def make_limits(
    options: Any, *, max_epochs: int | None = None, max_steps: int | None = None
) -> Limits:
    """Reads the limits from the Trainer's options.

    Args:
        options: The options.
        max_epochs: What one call of fit says instead; None for nothing.
        max_steps: Likewise.

    Raises:
        ConfigError: For limits that contradict each other.
    """
    for name, value in {"max_epochs": max_epochs, "max_steps": max_steps}.items():
        if value is not None and (type(value) is not int or value < -1):
            raise ConfigError(
                f"fit({name}={value!r}): a number from 0 on is needed, or -1 for no limit."
            )
    if options.fast_dev_run:  # one epoch of a few batches, whatever else was asked for
        return Limits(1, -1, 0, 0, None)
    epochs = options.max_epochs if max_epochs is None else max_epochs
    steps = options.max_steps if max_steps is None else max_steps
    steps = -1 if steps is None else steps
    seconds = parse_duration(options.max_time, "max_time")
    default = epochs is None and steps == -1 and seconds is None
    if epochs is None:
        epochs = DEFAULT_EPOCHS if default else -1
    if default and options.min_epochs and options.min_epochs > epochs:
        epochs = options.min_epochs
    least = (options.min_epochs or 0, options.min_steps or 0)
    limits = Limits(epochs, steps, *least, seconds, default)
    for low, high, what in (
        (limits.min_epochs, epochs, "epochs"),
        (limits.min_steps, steps, "steps"),
    ):
        if high >= 0 and low > high:
            raise ConfigError(
                f"min_{what}={low} is more than max_{what}={high}. Raise max_{what} or lower "
                f"min_{what}."
            )
    return limits


def make_cadence(
    interval: int | float | str | None, every_n_epochs: int | None, batches: int | None
) -> Cadence:
    """Reads ``val_check_interval`` and ``check_val_every_n_epoch`` for loaders of known length.

    Args:
        interval: None or 1.0 (every epoch), an int of batches, a fraction of the epoch, or a
            string such as "500 steps" or "10 min".
        every_n_epochs: Epochs between validations; None counts ``interval`` over epochs.
        batches: Training batches of an epoch, None where unknown.

    Raises:
        ConfigError: When the two contradict each other or the loader's length.
    """
    if isinstance(interval, str):
        steps = re.fullmatch(r"\s*(\d+)\s*(?:steps?|st)\s*", interval)
        if steps and int(steps[1]) > 0:
            return Cadence("steps", int(steps[1]))
        return Cadence("seconds", parse_duration(interval, "val_check_interval") or 0.0)
    if interval is None or (isinstance(interval, float) and interval == 1.0):
        if every_n_epochs is None:
            raise ConfigError(
                "check_val_every_n_epoch=None counts val_check_interval over epochs, so it needs "
                "val_check_interval as a number of batches, such as val_check_interval=1000."
            )
        return Cadence("epoch", every_n_epochs)
    if isinstance(interval, float):
        if batches is None:
            raise ConfigError(
                f"val_check_interval={interval} is a fraction of an epoch, but the training loader "
                f"has no length. Give a number of batches, '500 steps' or '10 min'."
            )
        # The small addition makes 0.29 of 100 the 29 that is meant, not 28.999999999999996.
        interval = max(1, int(batches * interval + 1e-9))
    if every_n_epochs is None:
        return Cadence("total", interval)
    if batches is not None and interval > batches:
        raise ConfigError(
            f"val_check_interval={interval} batches is longer than the epoch ({batches} batches), "
            f"so no validation would ever run. Give at most {batches}, a fraction such as 0.5, or "
            f"'{interval} steps' (of the optimizer), which are counted over epochs."
        )
    return Cadence("batches", interval, every_n_epochs)
