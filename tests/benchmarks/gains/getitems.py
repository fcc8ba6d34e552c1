"""A data set that gives whole batches (`__getitems__`) beside one that gives samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightkit.data import END, BatchStream, Feed
from tests.benchmarks.pairs import Pair

BASE, OTHER = "__getitem__", "__getitems__"


class Samples(Dataset[Any]):
    """Gives samples one by one."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Batches(Samples):
    """Gives whole batches, which ``collate_fn`` has nothing more to do with."""

    def __getitems__(self, indices: list[int]) -> Any:
        return self.x[indices], self.y[indices]


def pairs(quick: bool) -> Iterator[Pair]:
    """Whole passes as a fit reads them: through the plan of the order."""
    for samples, width, size in ((1437, 64, 32),) if quick else ((1437, 64, 32), (20_000, 20, 256)):
        x, y = torch.randn(samples, width), torch.randint(10, (samples,))
        for part in (False, True):
            both: list[Any] = [Samples(x, y), Batches(x, y)]
            if part:
                both = [Subset(data, range(samples)) for data in both]
            one = _read(DataLoader(both[0], size, shuffle=True))
            two = _read(DataLoader(both[1], size, shuffle=True, collate_fn=_as_it_is))
            what = f"{width} numbers, batches of {size}" + (", a Subset" if part else "")
            yield Pair(what, one, two, unit="batch", clock="thread", times=-(-samples // size))


def _as_it_is(batch: Any) -> Any:
    return batch


def _read(loader: DataLoader[Any]) -> Callable[[int], None]:
    feed = Feed(loader, resumable=True)

    def read(batches: int) -> None:
        for _ in range(0, batches, len(loader)):
            stream = BatchStream(loader, feed=feed, record=feed.record(1))
            while stream.fetch() is not END:
                pass

    return read
