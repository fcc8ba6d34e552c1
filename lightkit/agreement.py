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
        self._steps, self._batches = _Pace(), _Pace()
        self._now = 0.0
        flow.shared, flow.silent, flow.clock = True, not ranks.is_zero, self._clock
        self.reach("the start of the run")

    def __call__(self) -> None:
        """Counts a step, and exchanges wishes if it is time to."""
        if self._steps.due():
            self._reach("agreement between steps", self._steps)

    def in_evaluation(self) -> None:
        """Counts a batch of an evaluation that every rank has, and exchanges wishes if it is time to."""
        if self._batches.due():
            self._reach("agreement in an evaluation", self._batches)

    def reach(self, what: str) -> None:
        """Exchanges wishes now, where something else than a step has come between. A collective."""
        self._steps.pause()
        self._batches.pause()
        self._reach(what, self._steps)

    def _reach(self, what: str, pace: _Pace) -> None:
        flow, ranks = self._flow, self._ranks
        every = pace.propose() if ranks.is_zero else 0
        asked = flow.asked is not None
        rows = ranks.exchange([time.perf_counter(), every, flow.heard or 0, asked], what)
        self._now = rows[0][0]
        pace.follow(int(rows[0][1]))
        signal = int(max(row[2] for row in rows))
        if signal and flow.signal is None:
            flow.signal = signal
        if any(row[3] for row in rows):
            reasons = ranks.gather(flow.asked, "reasons to stop")
            flow.stop_reason = flow.stop_reason or next(r for r in reasons if r is not None)
            flow.asked = None

    def _clock(self) -> float:
        return self._now


class _Pace:
    """After how many steps, or batches, wishes are exchanged: about a second's worth."""

    def __init__(self) -> None:
        self._every = self._left = 1
        self._count, self._since, self._settled = 0, 0.0, False

    def due(self) -> bool:
        """Counts one; returns whether it is time to exchange wishes."""
        if self._count == 0:  # what comes before the end of the first one tells nothing
            self._since = time.perf_counter()
        self._count += 1
        self._left -= 1
        return self._left <= 0

    def pause(self) -> None:
        """Takes in that something else comes between, whose time is not that of a step."""
        self._count = 0

    def propose(self) -> int:
        """Returns after how many to exchange wishes again; rank zero's counts."""
        if self._settled or self._count < 2:
            return self._every
        took = time.perf_counter() - self._since
        if took < _SECOND:
            return self._count  # twice as far as it has come
        self._settled = True
        return max(1, round((self._count - 1) / took))

    def follow(self, every: int) -> None:
        """Goes on with what rank zero has proposed."""
        self._every = self._left = every
