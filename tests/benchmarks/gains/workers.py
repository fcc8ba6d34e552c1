"""Workers that stay from epoch to epoch (`persistent_workers=True`) beside new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightkit.data import END, BatchStream, Feed
from tests.benchmarks.pairs import Pair

BASE, OTHER = "new workers", "persistent workers"


def pairs(quick: bool) -> Iterator[Pair]:
    """Passes over four batches: the start of a pass and little else."""
    data = TensorDataset(torch.randn(128, 64), torch.arange(128))
    for workers in (1,) if quick else (1, 4):
        ways = [_passes(data, workers, stay) for stay in (False, True)]
        reads, ends = [way[0] for way in ways], [way[1] for way in ways]
        word = "worker" if workers == 1 else "workers"
        yield Pair(
            f"{workers} {word}, epochs of 4 batches",
            *reads,
            unit="epoch",
            clock="wall",
            times=2,
            close=lambda ends=ends: [end() for end in ends],
        )


def _passes(
    data: Any, workers: int, stay: bool
) -> tuple[Callable[[int], None], Callable[[], None]]:
    loader = DataLoader(data, 32, shuffle=True, num_workers=workers, persistent_workers=stay)
    feed = Feed(loader, resumable=True)

    def read(times: int) -> None:
        for _ in range(times):
            stream = BatchStream(loader, feed=feed, record=feed.record(1))
            while stream.fetch() is not END:
                pass

    return read, feed.close
