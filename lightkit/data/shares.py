"""Which batches of a loader are this process's, and loaders that have to be read to know it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightkit import rng
from lightkit.data.loaders import parts
from lightkit.errors import DataError, ranks_named

if TYPE_CHECKING:
    from lightkit.distributed import Ranks

_log = logging.getLogger("lightkit")


@dataclass(slots=True)
class Share:
    """The batches of one process: every ``world``-th one of an order that is the same for all.

    Batch ``offset + i * world + rank`` of that order is batch ``i`` of the process. So in each
    round the processes take ``world`` batches that follow each other. By itself the share of a
    process that is alone: everything.

    Attributes:
        rank: Which share, from 0.
        world: The number of shares.
        even: Whether only whole rounds count, so that all processes get equally many batches. Else
            those with a low number may get one more.
        offset: Number, at most 0 and above ``-world``, at which the first round begins. It is not 0
            in an epoch only that another number of processes began, whose done batches are not
            divided by ``world``: they are counted as the first rounds.
    """

    rank: int = 0
    world: int = 1
    even: bool = False
    offset: int = 0

    def length(self, total: int | None) -> int | None:
        """Returns how many of ``total`` batches are this process's; None for None."""
        if total is None:
            return None
        left = total - self.offset
        if not self.even:
            left += self.world - 1 - self.rank
        return max(left // self.world, 0)

    def number(self, index: int) -> int:
        """Returns the number that this process's batch ``index`` has in the order of all."""
        return self.offset + index * self.world + self.rank

    def before(self, index: int) -> int:
        """Returns how many batches of the order of all come before round ``index``."""
        return max(self.offset + index * self.world, 0)

    def width(self, index: int) -> int:
        """Returns how many batches round ``index`` has if it is whole."""
        return self.before(index + 1) - self.before(index)

    def move(self, done: int) -> int:
        """Makes so many batches of the order the first ones, whoever has done them.

        Returns:
            As how many batches of this process they count.
        """
        rounds = -(-done // self.world)
        self.offset = done - rounds * self.world
        return rounds


def divider(loader: Any) -> Any | None:
    """Returns the part of a loader that divides the data between processes already, or None.

    That is what has ``num_replicas`` and ``rank``, as a ``DistributedSampler``.
    """
    found = parts(loader)
    del found["dataset"]
    for part in found.values():
        if all(isinstance(getattr(part, name, None), int) for name in ("num_replicas", "rank")):
            return part
    return None


def check_divider(part: Any, rank: int, world: int) -> None:
    """Raises `DataError` unless a sampler divides the data between the processes that there are."""
    if (part.num_replicas, part.rank) != (world, rank):
        kind = type(part).__name__
        raise DataError(
            f"The {kind} of a loader divides the data between {part.num_replicas} processes and "
            f"takes share {part.rank}, but this is rank {rank} of {world}. Make it without "
            f"num_replicas and rank in setup() or in a data module, where the processes know each "
            f"other; or leave it out: lightkit divides any loader by itself."
        )


class Reading:
    """Reads all batches of a pass and gives those of one process.

    What the loader draws from random states meanwhile comes from states of its own, as on the other
    ranks: they go on from those in which the first round was read, or from ``state``.

    Args:
        iterator: The pass.
        share: Which batches are given.
        done: Rounds that are over already, so that they do not come.
        limit: How many batches of the order of all are read at most; None for all.
        state: Random states in which the next round is read; None for the present ones.
        draws: Whether the loader may draw in this process at all; changing states takes its time.
        first: Is told of the first batch of all, None where there is none.

    Attributes:
        state: Random states after what was read; None where nothing is drawn.
    """

    def __init__(
        self,
        iterator: Any,
        share: Share,
        done: int = 0,
        limit: int | None = None,
        state: dict[str, Any] | None = None,
        draws: bool = True,
        first: Callable[[Any], None] | None = None,
    ) -> None:
        self._iterator, self._share, self._limit, self._draws = iterator, share, limit, draws
        self._round, self._read = done, share.before(done)
        self._end: StopIteration | None = None
        self._first = first
        self.state = state

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._end is not None:
            raise self._end
        if not self._draws:
            return self._next()
        if self.state is None:
            batch = self._next()
            self.state = rng.rng_state()
            return batch
        with rng.preserved():
            rng.set_rng_state(self.state)
            try:
                return self._next()
            finally:
                self.state = rng.rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)  # its workers

    def _next(self) -> Any:
        """Reads one round and returns this process's batch of it."""
        share = self._share
        found: list[Any] = []
        mine = False  # whether this process's place in the round was reached
        first = self._round * share.world + share.offset
        for _ in range(share.width(self._round)):
            if self._read == self._limit:
                self._end = StopIteration()
                break
            batch = None
            try:
                batch = next(self._iterator)
            except StopIteration as error:
                self._end = error
            tell, self._first = self._first, None
            if tell is not None:
                tell(batch)
            if self._end is not None:
                break
            if not found or self._read - first == share.rank:
                found = [batch]
            mine = self._read - first >= share.rank
            self._read += 1
        else:
            self._round += 1
            return found[0]
        if share.even or not found or not mine:
            raise self._end
        return found[0]


class Together:
    """Ends a pass on all ranks when it ends on one of them, for loaders whose length nobody knows.

    One small collective for each batch, on the CPU.
    """

    def __init__(self, iterator: Any, ranks: Ranks) -> None:
        self._iterator, self._ranks = iterator, ranks

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch, end = None, None
        try:
            batch = next(self._iterator)
        except StopIteration as error:
            end = error
        told = self._ranks.exchange([end is None], "is there another batch")
        ended = [rank for rank, (has,) in enumerate(told) if not has]
        if end is not None:
            raise end
        if ended:
            _log.info(
                "The epoch ends here on all ranks, because the training loader has ended on %s.",
                ranks_named(ended),
            )
            raise StopIteration
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)  # its workers
