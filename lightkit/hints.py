"""What is told of a run without being asked: each with a name, a section of a page, and a switch.

The logger "lightkit.hints" logs it on rank zero: at level WARNING what will spoil the result, at INFO
what costs time. A record has the name as ``record.hint``, the word in brackets at its end; it is a
section of the page "Hints and alarms".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit.hints")

#: All names: before the first batch, in the first steps, during the fit, at its end.
NAMES = (
    *("foreign-parameters", "no-optimizer", "two-optimizers", "same-data", "wrong-mode"),
    *("precision", "workers-for-memory"),
    *("no-gradient", "zero-gradient", "no-change", "eval-mode", "high-loss", "probabilities"),
    *("slow-data", "slow-validation", "slow-checkpoints", "slow-callbacks"),
    "overfit",
)


def check(asked: Any) -> None:
    """Raises `ConfigError` for what ``Trainer(hints=)`` cannot be."""
    if isinstance(asked, bool):
        return
    if not isinstance(asked, (list, tuple)):
        raise ConfigError(
            f"hints={asked!r}: allowed are True, False, or a list of names that are not told."
        )
    for name in asked:
        if name not in NAMES:
            raise ConfigError(
                f"hints: no hint has the name {name!r}.{did_you_mean(str(name), NAMES)} There are "
                f"{', '.join(sorted(NAMES))}."
            )


def wanted(trainer: Trainer, names: Iterable[str]) -> bool:
    """Tells whether one of these is told, and by this process."""
    asked = trainer.options.hints
    if isinstance(asked, bool):
        return asked and trainer.is_global_zero
    return trainer.is_global_zero and any(name not in asked for name in names)


def say(
    trainer: Trainer, name: str, text: str, *, warn: bool = False, label: str = "hint:"
) -> None:
    """Logs a hint, if the trainer tells it.

    Args:
        trainer: The trainer of the run.
        name: One of `NAMES`.
        text: The sentence, without a full stop; sentences with one where it is a warning.
        warn: Whether it spoils the result.
        label: What a line begins with that is no warning.
    """
    if not wanted(trainer, [name]):
        return
    if warn:
        _log.warning("%s [%s]", text, name, extra={"hint": name})
    else:
        _log.info("%-9s %s [%s]", label, text, name, extra={"hint": name})
