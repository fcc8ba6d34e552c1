"""Every error that lightkit raises on purpose.

    LightkitError
    ├── UsageError (ValueError)          a value or a combination of values that cannot work
    │   ├── ConfigError                  an argument, a file or a flag; names the nearest valid one
    │   ├── DataError                    a loader or a batch that cannot be used
    │   ├── LoggingError                 self.log in a wrong place or with a wrong value
    │   └── OptimizerError               what configure_optimizers returned
    ├── HookNameError (TypeError)        a method that looks like a hook and is none
    ├── CheckpointError (RuntimeError)   a checkpoint that cannot be written, read or applied
    ├── NonFiniteError (RuntimeError)    a loss or metric that became nan or inf
    ├── CompileError (RuntimeError)      torch.compile failed on the step or on a block
    ├── ExportError (RuntimeError)       a program that cannot be made, or computes something else
    ├── PeerError (RuntimeError)         another process of the run ended or did not come
    └── NotRunningError (RuntimeError)   something that exists only while fit, validate, ... run

A message says what was given, what is allowed and what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LightkitError(Exception):
    """Base of all errors that lightkit raises on purpose."""


class UsageError(LightkitError, ValueError):
    """A value, or a combination of values, that cannot work."""


class ConfigError(UsageError):
    """A wrong argument, configuration key or flag."""


class DataError(UsageError):
    """A loader or a batch that cannot be used."""


class LoggingError(UsageError):
    """``self.log`` in a place where it means nothing, or with a value that cannot be averaged."""


class OptimizerError(UsageError):
    """Something in what ``configure_optimizers`` returned cannot be used."""


class HookNameError(LightkitError, TypeError):
    """A method that looks like a hook of lightkit but is none."""


class CheckpointError(LightkitError, RuntimeError):
    """A checkpoint that cannot be written, read or applied."""


class NonFiniteError(LightkitError, RuntimeError):
    """A loss or a monitored metric is nan or inf.

    Attributes:
        step: Steps completed before the one with the first such loss; None where that is not known.
    """

    step: int | None = None


class CompileError(LightkitError, RuntimeError):
    """What ``Trainer(compile=)`` asks for cannot be compiled."""


class ExportError(LightkitError, RuntimeError):
    """A task cannot be exported, or what was exported computes something else."""


class PeerError(LightkitError, RuntimeError):
    """Another process of the run has ended, or did not come where this one waited for it."""


class NotRunningError(LightkitError, RuntimeError):
    """An attribute that exists only while an entry point of the Trainer runs."""


def one_of(
    what: str, value: object, allowed: Sequence[object], kind: type[LightkitError] = ConfigError
) -> None:
    """Raises ``kind`` unless ``value`` is one of those allowed.

    Args:
        what: Whose argument it is, and its name: "Timer: interval".
        value: What was given.
        allowed: Two values or more.
        kind: The error.
    """
    if value not in allowed:
        *first, last = map(repr, allowed)
        hint = did_you_mean(str(value), [word for word in allowed if isinstance(word, str)])
        raise kind(f"{what}={value!r}; allowed are {', '.join(first)} and {last}.{hint}")


def some(names: Iterable[object], most: int = 5) -> str:
    """Returns ``"a, b, c and 4 more"``: names in a row, no more than ``most`` of them."""
    words = [str(name) for name in names]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def ranks_named(numbers: Sequence[int]) -> str:
    """Returns ``"rank 1"`` or ``"ranks 1, 2"``."""
    return f"rank{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def did_you_mean(given: str, valid: Iterable[str]) -> str:
    """Returns ``" Did you mean 'max_epochs'?"``, or ``""`` where nothing is near.

    Args:
        given: The name that was not recognised.
        valid: The names that exist.
    """
    near = difflib.get_close_matches(given, list(valid), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
