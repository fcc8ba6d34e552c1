"""Errors that are another process's: told in one line, where the guilty one shows its traceback."""

from __future__ import annotations

import sys
from types import TracebackType

from lightkit.errors import PeerError

_MARK = "_lightkit_of_another_rank"


def mark(error: Exception) -> Exception:
    """Marks an error that rank zero raised, and shows, as well."""
    setattr(error, _MARK, True)
    return error


def follows(error: BaseException) -> bool:
    """Tells whether an error only follows from what another process has shown."""
    return isinstance(error, PeerError) or getattr(error, _MARK, False)


def install(rank: int) -> None:
    """Lets such an error end a program with one line; all others are shown as before."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not follows(error):
            before(kind, error, trace)
            return
        text = (
            str(error) if isinstance(error, PeerError) else f"{kind.__name__} of rank 0, see there"
        )
        start = "" if text.startswith(f"rank {rank} ") else f"rank {rank}: "
        sys.stderr.write(f"{start}{text}\n")

    sys.excepthook = show
