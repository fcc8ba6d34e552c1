"""Ranks that are threads of this process, for tests of what they say to each other."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.ranks import Ranks


class _Table:
    """Where everybody lays something down and takes what all have laid down."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size), [None] * size
        self.names: list[str] = [""] * size

    def swap(self, rank: int, value: Any, what: str) -> list[Any]:
        self.slots[rank], self.names[rank] = value, what
        self.barrier.wait(20)
        found = list(self.slots)
        assert len(set(self.names)) == 1, self.names
        self.barrier.wait(20)
        return found


class ThreadRanks(Ranks):
    """One of several ranks that are threads."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        super().__init__(LaunchEnv(rank=rank, world_size=size))
        self.table = table

    def gather(self, value: Any, what: str) -> list[Any]:
        return [pickle.loads(one) for one in self.table.swap(self.rank, pickle.dumps(value), what)]

    def share(self, value: Any, what: str) -> Any:
        return self.gather(value if self.is_zero else None, what)[0]

    def decide(self, call: Callable[[], Any], what: str) -> Any:
        result, error = None, None
        if self.is_zero:
            try:
                result = call()
            except Exception as raised:  # noqa: BLE001  everybody raises it
                error = raised
        sent, said = self.share((result, error), what)
        if said is not None:
            raise said
        return result if self.is_zero else sent

    def exchange(self, numbers: Any, what: str) -> list[list[float]]:
        return self.gather([float(n) for n in numbers], what)

    def wait(self, what: str) -> None:
        self.gather(None, what)


def together(size: int, call: Callable[[Ranks], Any]) -> list[Any]:
    """Calls a function on so many ranks at once, and returns what it gave on each."""
    table, results, errors = _Table(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = call(ThreadRanks(rank, size, table))
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)
            table.barrier.abort()

    members = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results
