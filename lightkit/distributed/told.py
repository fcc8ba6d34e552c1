"""Errors that are another process's: told in one line, where the guilty one shows its traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from lightkit.errors import PeerError

_MARK = "_lightkit_of_another_rank"


def mark(error: Exception) -> Exception:
    """Marks an error that rank zero raised, and shows, as well."""
    setattr(error, _MARK, True)
    return error


def follows(error: BaseException) -> bool:
    """Tells whether an error only follows from what another process has shown."""
    return isinstance(error, PeerError) or is_rank_zeros(error)


def is_rank_zeros(error: BaseException) -> bool:
    """Tells whether rank zero has shown the same error, and this is another rank."""
    return getattr(error, _MARK, False)


def in_a_line(error: BaseException) -> str:
    """Returns the kind and the text of an error in one line."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    first, last = lines[0][:300], lines[-1].strip()[:300]
    return first if len(lines) == 1 else f"{first} ... {last}"


def install(rank: int, failed: Callable[[BaseException], None]) -> None:
    """Lets such an error end a program with one line; all others are shown as before.

    Args:
        rank: The number of this process.
        failed: Learns of every error that ends the program.
    """
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if follows(error):
            sys.stderr.write(f"{_line(rank, error)}\n")
        elif not (rank and kind is KeyboardInterrupt):  # Ctrl-C reaches all: rank zero's is enough
            before(kind, error, trace)
        failed(error)

    sys.excepthook = show


def _line(rank: int, error: BaseException) -> str:
    if not isinstance(error, PeerError):
        return f"rank {rank} ended with rank 0: {type(error).__name__}"
    text = str(error)
    return text if text.startswith(f"rank {rank} ") else f"rank {rank}: {text}"
