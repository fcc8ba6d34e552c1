"""Ends a process that waits for others which never come.

A collective waits in C++, where no signal handler of Python runs: neither SIGTERM nor the news that
another process failed reaches the main thread there. So a thread hears of both, and ends the process
when nothing moves any more. A process whose main thread works is left alone, whatever it does: it
may be saving.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightkit.distributed.board import Board

#: Seconds between two looks.
TICK = 0.5
#: Seconds that nothing may move after SIGTERM or SIGINT. torchrun kills after 30.
AFTER_SIGNAL = 20.0
#: Seconds in one collective after which it is said who did not come so far.
LATE = 60.0
#: Seconds that nothing may move after another process failed.
AFTER_FAILURE = 5.0
#: Share of a processor that a thread uses at most while it waits.
_IDLE = 0.5
#: Python code of torch below which a thread may wait for other processes without a name of ours.
#: Not that of its checkpoints, where a thread waits for a disk.
_TORCH = (
    "/torch/autograd/",
    "/torch/nn/parallel/distributed.py",
    "/torch/distributed/distributed_c10d.py",
    "/torch/distributed/_functional_collectives.py",
    "/torch/distributed/fsdp/",
)
_WAKE = b"\0"  # no signal has this number
_ENDING = (signal.SIGINT, signal.SIGTERM)


class Watchdog:
    """Watches the main thread of one of several processes.

    Args:
        rank: The number of this process.
        board: What the processes tell each other.
        inside: Returns the number and name of the collective that the main thread is in; None
            outside of those that have a name.
        describe: Returns words for who did not come to a collective.
        device: Where this process computes.
    """

    def __init__(
        self,
        rank: int,
        board: Board,
        inside: Callable[[], tuple[int, str] | None],
        describe: Callable[[str], str],
        device: torch.device,
    ) -> None:
        self._rank = rank
        self._board, self._inside, self._describe = board, inside, describe
        self._device = device
        self._heard, self._deadline = 0, float("inf")
        self._beats: dict[int, str] = {}
        self._standing, self._since = _NOWHERE, 0.0
        self._thread = threading.get_ident()  # the one that trains
        self._clock, self._spent, self._looked = _clock_of(self._thread), 0.0, time.monotonic()
        self._listen, self._wake = _listen()
        self._stopped = False
        self._late: tuple[tuple[int, str], float] | None = None
        self._watcher = threading.Thread(target=self._watch, name="lightkit-watchdog", daemon=True)
        self._watcher.start()

    def begin(self) -> None:
        """Forgets a signal of before: a run begins."""
        self._heard, self._deadline = 0, float("inf")

    def stop(self) -> None:
        """Ends the thread: one that is in C++ when Python ends takes the process down by SIGABRT."""
        self._stopped = True
        self._wake()
        self._watcher.join()

    def closing(self, seconds: float) -> None:
        """Gives the process so long to end after a failure."""
        self._deadline = time.monotonic() + seconds

    def _watch(self) -> None:
        while not self._stopped:
            self._heard = self._listen(TICK) or self._heard
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Looks once; frames of the thread are held, and a GPU is asked, only if something is wrong."""
        if now >= self._deadline:
            self._say("ended: its connections to the other processes did not close\n")
            os._exit(1)
        spent, took = self._clock(), now - self._looked
        idle = (spent - self._spent) / max(took, 1e-9) < _IDLE
        self._spent, self._looked = spent, now
        failed = self._board.another_failed()
        if not (self._heard or failed):
            inside = self._inside()
            self._board.beat(waits=inside is not None)
            self._say_late(inside, now)
            self._standing = _NOWHERE
            return
        place = self._place(idle)
        self._board.beat(waits=place.name != "")
        if not place.name:
            self._standing = _NOWHERE
        elif not place.same(self._standing) or self._others_move():
            self._standing, self._since = place, now
        elif now - self._since >= (AFTER_FAILURE if failed else AFTER_SIGNAL):
            self._end(place, now - self._since)

    def _say_late(self, inside: tuple[int, str] | None, now: float) -> None:
        """Says once that a collective takes long: perhaps not all ranks are on the way to it."""
        if inside is None or self._late is None or self._late[0] != inside:
            self._late = None if inside is None else (inside, now + LATE)
        elif now >= self._late[1]:
            self._late = (inside, float("inf"))
            count, name = inside
            others = [(r, seen) for r, seen in self._board.look().items() if seen.count < count]
            said = "; ".join(f"rank {r} was last in {seen.place!r}" for r, seen in others[:4])
            self._say(
                f"has waited for {LATE:.0f} s in {name!r}: {said or 'nobody is known to be late'}. "
                f"What all ranks do together, as trainer.save_checkpoint, must not depend on the "
                f"rank.\n"
            )

    def _place(self, idle: bool) -> _Place:
        """Returns where the thread waits for others; without a name where it does not.

        Args:
            idle: Whether it has computed nothing since the last look.
        """
        inside, frame = self._inside(), sys._current_frames().get(self._thread)
        if frame is None:
            return _NOWHERE
        # On a GPU the thread may spin; there a collective that waits keeps the stream busy.
        busy = self._device.type == "cuda" and _is_busy(self._device)
        if inside is not None and (idle or busy):
            return _Place(inside, None, f"in {inside[1]!r}")
        if busy or (idle and _in_torch(frame)):
            return _Place(None, frame, f"in {frame.f_code.co_name} ({_file(frame)})")
        return _NOWHERE

    def _others_move(self) -> bool:
        """Tells whether another process has shown life since the last look, and does not wait."""
        seen = self._board.look()
        moved = any(
            not other.waits and not other.end and other.beat != self._beats.get(rank, other.beat)
            for rank, other in seen.items()
        )
        self._beats = {rank: other.beat for rank, other in seen.items()}
        return moved

    def _end(self, place: _Place, seconds: float) -> None:
        """Says where the thread stands, and ends the process."""
        why = f" after {signal.Signals(self._heard).name}" if self._heard else ""
        who = self._describe("" if place.inside is None else place.inside[1])
        frame = sys._current_frames().get(self._thread)
        stack = "".join(traceback.format_stack(frame))
        self._say(f"ended{why}: waited {place.name} for {seconds:.0f} s: {who}\n{stack}")
        os._exit(128 + self._heard if self._heard else 1)

    def _say(self, text: str) -> None:
        """Writes past all buffers, whose locks the thread may hold."""
        with contextlib.suppress(OSError):
            os.write(2, f"rank {self._rank} {text}".encode())


class _Place:
    """Where the main thread was seen.

    The frame is held only while something is wrong, so that no other one can take its identity.
    """

    __slots__ = ("_frame", "_instruction", "inside", "name")

    def __init__(self, inside: tuple[int, str] | None, frame: FrameType | None, name: str) -> None:
        self.inside, self.name = inside, name
        self._frame, self._instruction = frame, -1 if frame is None else frame.f_lasti

    def same(self, other: _Place) -> bool:
        """Tells whether the thread has not moved between the two."""
        if self.inside is not None or other.inside is not None:
            return self.inside == other.inside
        return self._frame is other._frame and self._instruction == other._instruction


_NOWHERE = _Place(None, None, "")


def _is_busy(device: torch.device) -> bool:
    """Tells whether work of a GPU is under way. Waits for nothing."""
    with contextlib.suppress(RuntimeError):  # a broken one says so to the thread that computes
        return not torch.cuda.default_stream(device).query()
    return False


def _in_torch(frame: FrameType) -> bool:
    """Tells whether a thread stands in torch's backward or in its code for several processes."""
    return any(part in _file(frame) for part in _TORCH)


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace(os.sep, "/")


def _clock_of(thread: int) -> Callable[[], float]:
    """Returns what tells the processor time of a thread, or of all where there is no such clock."""
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(thread)
        return lambda: time.clock_gettime(clock)
    return time.process_time


def _listen() -> tuple[Callable[[float], int], Callable[[], object]]:
    """Returns what waits for a signal that ends programs, and what wakes it up.

    It returns the number of the signal, 0 for none. C code writes that number into a pipe when the
    signal comes, whatever the main thread does. Who listened there before hears it still. Other
    threads than the main one cannot listen.
    """
    if threading.current_thread() is not threading.main_thread():
        event = threading.Event()
        return lambda seconds: 0 * event.wait(seconds), event.set
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: _forget(before))

    def wait(seconds: float) -> int:
        ready, _, _ = select.select([read], [], [], seconds)
        came = os.read(read, 4096) if ready else b""
        if came.strip(_WAKE) and before != -1:
            with contextlib.suppress(OSError):
                os.write(before, came.strip(_WAKE))
        return next((number for number in came if number in _ENDING), 0)

    return wait, lambda: os.write(write, _WAKE)


def _forget(before: int) -> None:
    """Keeps a worker process from telling this one of its own signals."""
    with contextlib.suppress(OSError, ValueError):
        signal.set_wakeup_fd(before)
