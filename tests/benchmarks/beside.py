"""A loader that runs a loop by hand between chunks of a fit: both in one process, in turn.

Where a difference is small, this is better than processes: whatever else the machine does meets
both, and the quotient of neighbours stays. A round is a chunk by hand, two of the fit, one by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Rounds before those that count.
WARMUP = 5


class Beside:
    """Hands out one batch again and again, and measures at chosen steps.

    Args:
        hand: Runs the loop by hand for so many steps.
        batch: What is handed out.
        chunk: Steps in a chunk.
        rounds: Rounds at each place.
        at: Steps of the fit before which rounds begin, ascending.
        clock: Which clock; that of the thread alone by default.

    Attributes:
        hand_seconds: By place, the time of two chunks by hand, for each round.
        fit_seconds: The same of the fit.
        memory: By place, MiB of memory that the process held there.
    """

    def __init__(
        self,
        hand: Callable[[int], None],
        batch: Any,
        *,
        chunk: int = 20,
        rounds: int = 60,
        at: tuple[int, ...] = (0,),
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.hand, self.batch, self.chunk, self.rounds = hand, batch, chunk, rounds
        self.at, self.clock = at, clock
        self.hand_seconds: dict[int, list[float]] = {}
        self.fit_seconds: dict[int, list[float]] = {}
        self.memory: dict[int, float] = {}

    def __len__(self) -> int:
        return self.at[-1] + (WARMUP + self.rounds) * 2 * self.chunk

    def __iter__(self) -> Iterator[Any]:
        given, batch = 0, self.batch
        for place in self.at:
            for _ in range(place - given):
                yield batch
            given = max(given, place)
            self.memory[place] = held()
            for _ in self._rounds(place):
                yield batch
                given += 1

    def _rounds(self, place: int) -> Iterator[None]:
        by_hand = self.hand_seconds.setdefault(place, [])
        by_fit = self.fit_seconds.setdefault(place, [])
        hand, clock, chunk = self.hand, self.clock, self.chunk
        for number in range(WARMUP + self.rounds):
            start = clock()
            hand(chunk)
            middle = clock()
            for _ in range(2 * chunk):
                yield None
            end = clock()
            hand(chunk)
            if number >= WARMUP:
                by_hand.append(middle - start + clock() - end)
                by_fit.append(end - middle)

    def ratios(self, place: int = 0) -> list[float]:
        """Returns the time of the fit to that by hand, for each round."""
        pairs = zip(self.fit_seconds[place], self.hand_seconds[place], strict=True)
        return [ours / hand for ours, hand in pairs]

    def beyond(self, place: int = 0) -> list[float]:
        """Returns the microseconds that a step takes beyond one by hand, for each round."""
        pairs = zip(self.fit_seconds[place], self.hand_seconds[place], strict=True)
        return [(ours - hand) / (2 * self.chunk) * 1e6 for ours, hand in pairs]


def held() -> float:
    """Returns the MiB of memory that this process holds; Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20
