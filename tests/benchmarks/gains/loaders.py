"""`TensorLoader` beside a DataLoader over a TensorDataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.data import END, BatchStream, Feed
from tests.benchmarks.pairs import Pair

BASE, OTHER = "DataLoader", "TensorLoader"
#: Samples, numbers in each, samples in a batch.
SIZES = (
    (1437, 64, 32),
    (20_000, 20, 32),
    (20_000, 20, 256),
    (20_000, 20, 50),
    (20_000, 784, 64),
)


def pairs(quick: bool) -> Iterator[Pair]:
    """Whole passes over tensors of inputs and labels, shuffled, without a step."""
    for samples, width, size in SIZES[:1] if quick else SIZES:
        x, y = torch.randn(samples, width), torch.randint(10, (samples,))
        both = (
            DataLoader(TensorDataset(x, y), size, shuffle=True),
            lk.TensorLoader(x, y, batch_size=size, shuffle=True),
        )
        what = f"{samples:,} samples of {width} numbers, batches of {size}"
        times = len(both[0])
        yield Pair(what, *map(_plain, both), unit="batch", clock="thread", times=times)
        if (samples, width, size) == SIZES[0]:
            what = "the same, as a fit reads them"
            yield Pair(what, *map(_in_fit, both), unit="batch", clock="thread", times=times)


def _plain(loader: Any) -> Callable[[int], None]:
    def read(batches: int) -> None:
        for _ in range(0, batches, len(loader)):
            for _ in loader:
                pass

    return read


def _in_fit(loader: Any) -> Callable[[int], None]:
    feed = Feed(loader, resumable=True)

    def read(batches: int) -> None:
        for _ in range(0, batches, len(loader)):
            stream = BatchStream(loader, feed=feed, record=feed.record(1))
            while stream.fetch() is not END:
                pass

    return read
