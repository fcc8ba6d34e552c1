"""What goes into the worker processes of a DataLoader: a seed per batch, and calm under signals."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import traceback
import weakref
from collections.abc import Callable
from multiprocessing import queues
from typing import Any

import torch

_MASK = 2**64 - 1
_PATIENCE = 30  # seconds; as long as SLURM waits between SIGTERM and SIGKILL
_serving: weakref.WeakSet[Any] = weakref.WeakSet()


def mix(*numbers: int) -> int:
    """Returns a seed made of several numbers (splitmix64), the same on every machine."""
    mixed = 0x9E3779B97F4A7C15
    for number in numbers:
        mixed = (mixed ^ (number & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        mixed ^= mixed >> 27
        mixed = mixed * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed >> 1


def seed_process(seed: int) -> None:
    """Seeds ``random``, NumPy where it is imported, and torch on the CPU."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed >> 31)
    # torch.manual_seed would look at every kind of device, which takes a hundred times as long.
    torch.default_generator.manual_seed(seed)


def seeded(seed: int, index: Any) -> Any:
    """Returns an index that seeds the worker which unpickles it, directly before it fetches."""
    if type(index) is not list:
        return _SeededIndex(seed, index)
    batch = _SeededBatch(index)
    batch.seed = seed
    return batch


class _SeededBatch(list[Any]):
    """A list of indices, also for loaders that look at it before it goes to a worker."""

    seed = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.seed, list(self))


class _SeededIndex:
    """Any other index."""

    def __init__(self, seed: int, index: Any) -> None:
        self.seed, self.index = seed, index

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.seed, self.index)


def _arrive(seed: int, index: Any) -> Any:
    seed_process(seed)
    return index


class WorkerStart:
    """The ``worker_init_fn`` of all workers: keeps them through signals, then calls the user's.

    A terminal sends Ctrl-C to every process of the group, and a cluster its warnings. The main
    process still wants batches for the step that it finishes; it ends the workers itself.
    """

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker_id: int) -> None:
        """Is called in each worker when it starts."""
        queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]
        for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
            _handle(name, signal.SIG_IGN)
        if hasattr(signal, "alarm"):
            _handle("SIGTERM", _end_soon)
        if self.own is not None:
            self.own(worker_id)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            # Killed meanwhile. torch would take whoever adopted the worker for its parent.
            os._exit(1)


def _cannot_send(error: Exception, item: Any) -> None:
    """Ends a worker that cannot send what it has, where Python goes on and nobody ever hears of it.

    An exception of a class that no other process can import, for example. The main process then
    says that the worker has ended; what is printed here says why.
    """
    result = item[1] if isinstance(item, tuple) and len(item) > 1 else None
    told = getattr(result, "exc_msg", None) or "".join(traceback.format_exception(error))
    sys.stderr.write(f"A worker process cannot send this to the main process: {told}\n")
    sys.stderr.flush()
    os._exit(1)


def _handle(name: str, handler: Any) -> None:
    number = getattr(signal, name, None)
    if number is not None:
        with contextlib.suppress(ValueError):  # not in a process's main thread
            signal.signal(number, handler)


def _end_soon(number: int, frame: Any) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_PATIENCE)


def watch(iterator: Any) -> None:
    """Sees to it that the workers of an iterator end whenever the main process wants them to."""
    workers = getattr(iterator, "_workers", ())
    for worker in workers:
        with contextlib.suppress(AttributeError):
            # SIGTERM no longer ends them at once, and torch and the interpreter would wait.
            worker._popen.terminate = worker._popen.kill
    if workers:
        _serving.add(iterator)


def why_ended(iterator: Any) -> str:
    """Returns a sentence on a worker of an iterator that has ended by itself; "" if none has."""
    for worker in getattr(iterator, "_workers", ()):
        worker.join(0.2)  # what broke its connection may be ahead of its end
        if worker.exitcode:
            return (
                f"DataLoader worker (pid {worker.pid}) exited unexpectedly with exit code "
                f"{worker.exitcode}; -9 is often the machine's memory being full."
            )
    return ""


@atexit.register
def _end_all() -> None:
    """Ends workers that nobody ended, before the interpreter kills them and torch complains."""
    for iterator in list(_serving):
        iterator._shutdown_workers()
