"""How several processes come to want the same: when to end, and what time it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightkit.distributed import Ranks
    from lightkit.flow import Flow

_SECOND = 1.0


class Agreement:
    """Makes the wishes of single ranks common: a signal that came, a stop that was asked for.

    The loop calls it after every step. Every so many steps, about a second's worth, it exchanges a
    few numbers; so a wish takes about a second to be followed, by all ranks at the same step. The
    number of steps is found by rank zero in the first second that is nothing but steps, and stays.
    Between two exchanges ``flow.clock()`` stands still, and it is rank zero's on all ranks: what
    depends on time is decided alike.

    Args:
        flow: What the run is doing; from now on it takes wishes down instead of following them.
        ranks: The processes.
    """

    def __init__(self, flow: Flow, ranks: Ranks) -> None:
        self._flow, self._ranks = flow, ranks
        self._every = self._left = 1
        self._steps, self._since, self._settled = 0, 0.0, False
        self._now = 0.0
        flow.shared, flow.silent, flow.clock = True, not ranks.is_zero, self._clock
        self.reach("the start of the run")

    def __call__(self) -> None:
        """Counts a step, and exchanges wishes if it is time to."""
        if self._steps == 0:  # what comes before the end of the first one tells nothing
            self._since = time.perf_counter()
        self._steps += 1
        self._left -= 1
        if self._left <= 0:
            self._reach("agreement between steps")

    def reach(self, what: str) -> None:
        """Exchanges wishes now, where something else than a step has come between. A collective."""
        self._steps = 0  # the time that it took is none of the steps'
        self._reach(what)

    def _reach(self, what: str) -> None:
        flow, ranks = self._flow, self._ranks
        every = self._propose() if ranks.is_zero else 0
        asked = flow.asked is not None
        rows = ranks.exchange([time.perf_counter(), every, flow.heard or 0, asked], what)
        self._now, self._every = rows[0][0], int(rows[0][1])
        self._left = self._every
        signal = int(max(row[2] for row in rows))
        if signal and flow.signal is None:
            flow.signal = signal
        if any(row[3] for row in rows):
            reasons = ranks.gather(flow.asked, "reasons to stop")
            flow.stop_reason = flow.stop_reason or next(r for r in reasons if r is not None)
            flow.asked = None

    def _propose(self) -> int:
        """Returns after how many steps to exchange wishes again; rank zero's counts."""
        if self._settled or self._steps < 2:
            return self._every
        took = time.perf_counter() - self._since
        if took < _SECOND:
            return self._steps  # twice as far as it has come
        self._settled = True
        return max(1, round((self._steps - 1) / took))

    def _clock(self) -> float:
        return self._now
