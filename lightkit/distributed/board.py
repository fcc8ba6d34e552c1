"""What a process tells the others without waiting for them, so that an error can say who is missing.

It stands in the store that the processes met by. Nothing here is a collective, nothing waits for
long, and nothing raises: what cannot be read is unknown.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lightkit.distributed.env import LaunchEnv

T = TypeVar("T")
#: Seconds after which the store counts as gone.
PATIENCE = 3.0
#: How the record of an end begins that followed from another's.
FOLLOWED = "followed: "


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one process.

    Attributes:
        count: How many named collectives it has begun.
        place: The name of the last one.
        end: How its run ended; "" while nothing has ended it.
        beat: Changes all the time while the process lives.
        waits: Whether it waited in a collective at its last beat.
    """

    count: int
    place: str
    end: str
    beat: str
    waits: bool


class Board:
    """One line for each process, in a store that all can reach.

    Args:
        env: This process.
        timeout: How long the store is waited for at the beginning.
    """

    def __init__(self, env: LaunchEnv, timeout: timedelta) -> None:
        self._rank, self._world = env.rank, env.world_size
        # What one thread asks must not hold up what the other writes: two connections.
        self._written, self._read = _connect(env, timeout), _connect(env, timeout)
        self._beats, self._failed, self._gone = 0, False, False
        self.at(0, "the start")
        self.beat(waits=False)
        self._put("end", "")

    def at(self, count: int, place: str) -> None:
        """Says which collective this process begins; 3 us."""
        self._put("at", f"{count} {place}")

    def beat(self, waits: bool) -> None:
        """Says that this process lives, and whether it waits for others."""
        self._beats += 1
        self._put("beat", f"{self._beats} {waits:d}")

    def fail(self, end: str) -> None:
        """Says how the run of this process ended."""
        self._put("end", end)
        if not self._failed:
            self._failed = True
            with contextlib.suppress(RuntimeError):
                self._written.add("failures", 1)

    def leave(self, end: str) -> None:
        """Says how this process ended where that is no failure."""
        self._put("end", end)

    def recover(self) -> None:
        """Takes back that this process failed, when it begins another run."""
        if self._failed:
            self._failed = False
            self._put("end", "")
            with contextlib.suppress(RuntimeError):
                self._written.add("failures", -1)

    def another_failed(self) -> bool:
        """Tells whether the run of another process has ended by an error."""
        found = self._ask(lambda: self._read.add("failures", 0))
        return found is not None and found > self._failed

    def look(self) -> dict[int, Seen]:
        """Returns what is known of the other processes; nothing where the store does not answer."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        keys = [f"{kind}/{rank}" for rank in others for kind in ("at", "end", "beat")]
        values = self._ask(lambda: self._read.multi_get(keys))
        if values is None:
            return {}
        found = {}
        for i, rank in enumerate(others):
            at, end, beat = (value.decode(errors="replace") for value in values[3 * i : 3 * i + 3])
            count, _, place = at.partition(" ")
            number, _, waits = beat.partition(" ")
            found[rank] = Seen(int(count), place, end, number, waits == "1")
        return found

    def _put(self, kind: str, text: str) -> None:
        with contextlib.suppress(RuntimeError):  # whoever served the store may have ended
            self._written.set(f"{kind}/{self._rank}", text)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Returns an answer of the store, or None where it does not come soon."""
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        if self._gone:
            return None
        thread = threading.Thread(target=ask, name="lightkit-board", daemon=True)
        thread.start()
        thread.join(PATIENCE)
        self._gone = thread.is_alive()  # a machine that vanished never answers
        return answers[0] if answers else None


def connect(env: LaunchEnv, timeout: timedelta, *, server: bool = False) -> Any:
    """Returns the store by which all processes meet.

    In the launcher's store it is named after the attempt: what the one before left there would be
    taken for this one's. One that rank zero serves is new with every attempt, and a machine that
    came back counts attempts from zero.

    Args:
        env: This process.
        timeout: How long the store is waited for, and what is asked of it.
        server: Whether this process serves it.
    """
    dist: Any = torch.distributed
    store = dist.TCPStore(
        env.master_address,
        env.master_port,
        env.world_size,
        is_master=server,
        timeout=timeout,
        wait_for_workers=False,  # the process group waits for all of them
    )
    return dist.PrefixStore(f"lightkit/{env.restart if env.agent_store else 0}", store)


def _connect(env: LaunchEnv, timeout: timedelta) -> Any:
    dist: Any = torch.distributed
    store = dist.PrefixStore("board", connect(env, timeout))
    store.set_timeout(timedelta(seconds=PATIENCE))
    return store
