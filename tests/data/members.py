"""Ranks that are run one after the other in one process, and loaders for them to share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
)

from lightkit import rng
from lightkit.data import BatchStream, Feed, order_of, seed_from
from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.ranks import Ranks


class Member(Ranks):
    """One rank of a run whose ranks are run one after the other, rank zero first."""

    def __init__(self, rank: int, world: int, said: list[Any]) -> None:
        super().__init__(LaunchEnv(rank=rank, world_size=world))
        self.said, self.heard = said, 0

    def share(self, value: Any, what: str) -> Any:
        if self.is_zero:
            self.said.append(value)
        self.heard += 1
        return self.said[self.heard - 1]

    def exchange(self, numbers: Any, what: str) -> Any:
        """Compares with what rank zero said."""
        found = self.share(list(numbers), what)
        return [found, list(numbers)]


class Samples(Dataset[Any]):
    """Its samples are their numbers and a little noise; ``loaded`` counts in this process."""

    def __init__(self, length: int) -> None:
        self.length, self.loaded = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        self.loaded += 1
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor(float(index)), torch.tensor(noise)


class PerIndex:
    """A sampler that draws from the global state for each index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        return (int(torch.randint(self.length, ())) for _ in range(self.length))

    def __len__(self) -> int:
        return self.length


class Batches:
    """A batch sampler of the user's own, with batches of different sizes."""

    def __init__(self, length: int, sized: bool = True) -> None:
        self.length, self.sized = length, sized

    def __iter__(self) -> Any:
        for number in range(self.length):
            yield [random.randrange(self.length) for _ in range(1 + number % 3)]

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError
        return self.length


class Shuffling(IterableDataset[Any]):
    """Draws an order when it is begun, and noise later."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in torch.randperm(self.length)[first::step]:
            yield index, torch.rand(1)


class Buffered(IterableDataset[Any]):
    """Draws which sample comes next, one by one, as a shuffle buffer does."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Any:
        left = list(range(self.length))
        while left:
            yield torch.tensor(left.pop(random.randrange(len(left))))


class Looping(DataLoader[Any]):
    """Iterates in its own way."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Any] = {
    "in turn": lambda n: DataLoader(Samples(n)),
    "shuffled": lambda n: DataLoader(Samples(n), shuffle=True),
    "generator": lambda n: DataLoader(Samples(n), shuffle=True, generator=generator()),
    "weighted": lambda n: DataLoader(
        Samples(n), sampler=WeightedRandomSampler(torch.rand(n, generator=generator()).tolist(), n)
    ),
    "per index": lambda n: DataLoader(Samples(n), sampler=PerIndex(n)),
    "batches": lambda n: DataLoader(Samples(n), batch_sampler=Batches(n)),  # type: ignore[arg-type]
    "unbatched": lambda n: DataLoader(Samples(n), batch_size=None, shuffle=True),
    "list": lambda n: [[torch.tensor(float(i))] for i in range(n)],
    "iterable": lambda n: DataLoader(Shuffling(n), batch_size=1),
    "own iter": lambda n: Looping(Samples(n), shuffle=True),
}
#: Loaders that every rank has to read, as their order is known to them alone.
READ = {"list", "iterable", "buffered", "own iter"}


def numbers(batch: Any) -> list[float]:
    """Returns the samples of a batch."""
    first = batch[0] if isinstance(batch, (list, tuple)) else batch
    return first.reshape(-1).tolist()


def feed_of(loader: Any, member: Ranks, even: bool = True, **options: Any) -> Feed:
    return Feed(loader, resumable=even, ranks=member, **options)


def train(
    feed: Feed, *, seed: int = 7, record: Any = None, skip: int = 0, limit: Any = None
) -> Any:
    """Runs one pass as a fit does: in rank zero's random states, with own ones kept on the others.

    Returns:
        The record of the pass, what came, and a number drawn after the pass had begun.
    """
    ranks, own = feed.ranks, None
    random.seed(seed + ranks.rank)
    np.random.seed(seed + ranks.rank)
    torch.manual_seed(seed + ranks.rank)
    if record is None:
        drawn = [g.get_state() for g in _generators(feed.loader)]
        state = order_of(
            {"generators": drawn, **feed.record(seed_from(torch.get_rng_state(), drawn))}
        )
        record = ranks.share(state, "order")
    if not ranks.is_zero or skip:
        own = rng.rng_state()
        if skip:  # as a fit that goes on; `Feed.load` was called before
            rng.set_rng_state(record["rng"])
            for one, state in zip(_generators(feed.loader), record["generators"], strict=True):
                one.set_state(state)
        else:
            feed.take(record)
    limits: dict[str, Any] = {"limit": limit, "skip": skip}
    stream = BatchStream(feed.loader, feed=feed, record=record, **limits)
    if own is not None:
        rng.set_rng_state(own)
    came = [numbers(batch) for batch in stream]
    return record, came, torch.rand(()).item()


def _generators(loader: Any) -> Any:
    from lightkit.data import generators

    return generators(loader)


def alone(make: Any, limit: Any = None) -> list[Any]:
    return train(Feed(make(), resumable=True), limit=limit)[1]


def together(make: Any, world: int, **options: Any) -> tuple[list[list[Any]], list[Feed]]:
    """Returns what each rank got, and its feed."""
    said: list[Any] = []
    feeds = [feed_of(make(), Member(rank, world, said)) for rank in range(world)]
    return [train(feed, **options)[1] for feed in feeds], feeds


def in_turn(parts: list[list[Any]]) -> list[Any]:
    """Returns the batches of all ranks in the order of one process."""
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def divided(rank: int, world: int, **options: Any) -> DataLoader[Any]:
    data = Samples(22)
    sampler = DistributedSampler(data, world, rank, **options)
    return DataLoader(data, 2, sampler=sampler)
