"""Signals that ask a fit to end. A handler only takes them down; the loop acts at its next step."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightkit.flow import Flow

_log = logging.getLogger("lightkit")
#: Those that exist are watched: Ctrl-C, the usual word to end, SLURM's warning, a lost terminal.
WATCHED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
#: As short as the narrowest terminals, since a bar stands in the next line.
_AGAIN = "stopping after this step; ^C again: now\n"


@contextlib.contextmanager
def watching(flow: Flow) -> Iterator[None]:
    """Lets signals ask a fit to end instead of ending it where it stands.

    The first signal is written into ``flow.signal``, and the loop raises `ended_by` where the
    state is saved. A second SIGINT or SIGTERM raises at once. A signal that is ignored (nohup, a
    shell's ``&``) or caught outside Python stays so. At the end all former handlers are put back;
    one that the program had set is then called once for the signal that came. In other threads
    than the main one nothing can be watched.

    Args:
        flow: What the run is doing.

    Raises:
        KeyboardInterrupt: At the end, after a SIGINT that came too late for the loop.
        SystemExit: Likewise after another signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(flow)
    try:
        watch.install()
        yield
    finally:
        watch.remove()
    came = flow.signal or flow.heard
    if came is not None:
        raise ended_by(came)


def ended_by(number: int) -> BaseException:
    """Returns what a run raises that a signal asked to end; the exit code becomes 128 + number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def name(number: int) -> str:
    """Returns the name of a signal, such as "SIGTERM"."""
    return signal.Signals(number).name


class _Watch:
    """The handler of one fit. It may run between any two instructions, so it does next to nothing."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._pid = os.getpid()
        self._seen: set[int] = set()
        self._frame: FrameType | None = None
        self._before: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child has the handler, but not the run
            if number != signal.SIGINT or number in self._seen:
                signal.signal(number, self._before[number])
                os.kill(os.getpid(), number)
            self._seen.add(number)  # the first Ctrl-C is for the run, which may need the child
        elif number not in self._seen:
            self._seen.add(number)
            if self._flow.signal is None and self._flow.heard is None:
                self._frame = frame
            self._flow.hear(number)
            own = not isinstance(self._before[number], _Watch)
            if number == signal.SIGINT and own and not self._flow.silent:
                _write(_AGAIN)
        elif number in (signal.SIGINT, signal.SIGTERM):
            raise ended_by(number)

    def install(self) -> None:
        """Takes the place of the handlers that may be replaced."""
        caught = _caught()
        for number in (getattr(signal, name) for name in WATCHED if hasattr(signal, name)):
            before = signal.getsignal(number)
            outside = before is None or (before == signal.SIG_DFL and caught >> (number - 1) & 1)
            if outside:
                _log.info("%s is caught outside Python: it does not end the fit.", name(number))
            elif before != signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self)

    def remove(self) -> None:
        """Puts the former handlers back, and calls the one of the signal that came."""
        for number, before in self._before.items():
            if signal.getsignal(number) is self:  # else somebody replaced it after us
                signal.signal(number, before)
        came, frame, self._frame = self._flow.signal or self._flow.heard, self._frame, None
        former = None if came is None else self._before.get(came)
        if callable(former) and former is not signal.default_int_handler:
            former(came, frame)


def _caught() -> int:
    """Returns the signals that this process catches, a bit for each; 0 where none can tell.

    Handlers set by C code (as by ``faulthandler.register``) are unknown to Python.
    """
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"SigCgt:"):
                return int(line.split()[1], 16)
    return 0


def _write(text: str) -> None:
    """Writes to the terminal past all buffers, which the interrupted code may be filling."""
    with contextlib.suppress(OSError):
        start = "\r" if os.isatty(2) else ""  # over the ^C that the terminal shows
        os.write(2, (start + text).encode())
