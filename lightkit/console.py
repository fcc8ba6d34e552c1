"""Shows what the "lightkit" logger says as plain lines on the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys

from lightkit import screen

_log = logging.getLogger("lightkit")

_WORDS = {logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}
_COLORS = {"warning": "\x1b[33m", "error": "\x1b[31m"}


class ConsoleHandler(logging.Handler):
    """Writes INFO as it is, and ``warning: ...`` or ``error: ...`` for what is above it.

    ``sys.stdout`` is looked up for each line, so a line goes above a progress bar and into
    whatever the output is redirected to.

    Args:
        rank: The number of this process, which is told on all but the first.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self._start = f"rank {rank}: " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        try:
            stream = sys.stdout
            if stream is None:  # a program without a console
                return
            text = self.format(record)
            word = _WORDS.get(record.levelno, "")
            if word:
                text = f"{self._start}{word}: {text}"
            text = screen.fold(text, stream, " \\" if hasattr(record, "command") else "")
            if word and _colored():
                text = f"{_COLORS[word]}{text}\x1b[0m"
            with contextlib.suppress(OSError):  # a reader that has gone must not end a training
                stream.write(text + "\n")
                stream.flush()
        except Exception:  # noqa: BLE001  as every handler of logging: never into the caller
            self.handleError(record)


def install(rank: int = 0) -> None:
    """Makes the lines of the "lightkit" logger visible, unless the user has arranged that already.

    Does nothing where the logger has handlers, or where the root logger shows INFO on the
    terminal. May be called again and again.

    Args:
        rank: The number of this process. All but the first show errors alone, with their number:
            what else they log rank zero says.
    """
    if _log.handlers:
        return
    shown_by_root = any(_writes_to_terminal(handler) for handler in logging.root.handlers)
    if shown_by_root and rank == 0 and _log.isEnabledFor(logging.INFO):
        return
    _log.addHandler(ConsoleHandler(rank))
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if shown_by_root:
        _log.propagate = False  # else its warnings would be shown twice


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and stream in (
        sys.stdout,
        sys.stderr,
        sys.__stdout__,
        sys.__stderr__,
    )


def _colored() -> bool:
    return sys.stdout.isatty() and screen.is_colored(sys.stdout)
