from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightkit.data import Feed
from lightkit.data.comparing import batch_of_all, compared, how_divided
from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.ranks import Ranks
from lightkit.errors import DataError
from tests.data.members import Member, Samples, Shuffling, divided, feed_of


class Gathering(Ranks):
    """Rank zero of two, of which the other one has the loaders it is told."""

    def __init__(self, others: list[tuple[str, Feed]]) -> None:
        super().__init__(LaunchEnv(rank=0, world_size=2))
        self.others = others

    def gather(self, value: Any, what: str) -> Any:
        from lightkit.data import comparing

        return [value, [comparing._likeness(feed) for _, feed in self.others]]


def compare(own: Any, other: Any, **options: Any) -> Any:
    there = feed_of(other, Member(1, 2, []), **options)
    ranks = Gathering([("training loader", there)])
    return compared(ranks, [("training loader", feed_of(own, ranks, **options))])


def split(seed: int, lengths: list[int]) -> Any:
    parts = torch.utils.data.random_split(
        Samples(20), lengths, generator=torch.Generator().manual_seed(seed)
    )
    return DataLoader(parts[0], 2)


def test_loaders_that_are_alike() -> None:
    assert compared(Ranks(), [("training loader", Feed([1]))]) == [None]
    assert compare(split(1, [12, 8]), split(1, [12, 8])) == [None]
    assert compare([1, 2], [1, 2]) == [None]
    assert compare(split(1, [12, 8]), split(2, [10, 10]), divided=True) == [5]
    unsized = (i for i in range(3)), (i for i in range(4))
    assert compare(*unsized, divided=True) == [None]


@pytest.mark.parametrize(
    ("own", "other", "options", "word"),
    [
        (split(1, [12, 8]), split(2, [12, 8]), {}, "other data than that of rank 0 .12 and 12 sam"),
        (split(1, [12, 8]), split(1, [10, 10]), {}, "random_split"),
        ([1, 2], [1, 2, 3], {}, "other data"),
        (DataLoader(Samples(8), 2), DataLoader(Samples(8), 4), {}, "rank 1 has batch size 4"),
        (DataLoader(Samples(8), 2), [1], {}, "rank 1 is a list, that of rank 0 is a DataLoader"),
        (
            DataLoader(Shuffling(4), 2),
            DataLoader(Samples(4), 2),
            {"divided": True},
            "rank 1 has a length, unlike",
        ),
    ],
)
def test_loaders_that_differ(own: Any, other: Any, options: Any, word: str) -> None:
    with pytest.raises(DataError, match=word):
        compare(own, other, **options)


def test_different_numbers_of_loaders() -> None:
    ranks = Gathering([])
    with pytest.raises(DataError, match="1 on rank 0, 0 on rank 1"):
        compared(ranks, [("validation loader", feed_of([1], ranks))])


def test_what_is_said_about_the_division() -> None:
    member = Member(0, 4, [])
    feed = feed_of(DataLoader(Samples(23)), member)
    assert how_divided(feed, None) == (
        "batches of the training loader go to 4 processes in turn: 5 of 23 for each, the last 3 of "
        "an epoch left out"
    )
    assert "2 of 8 for each" in how_divided(feed, 8)
    assert "left out" not in how_divided(feed, 8)
    reads = feed_of(DataLoader(Shuffling(23)), member)
    assert "whole rounds only. Each process reads all" in how_divided(reads, None)
    own = feed_of(divided(0, 4), member)
    assert how_divided(own, None).endswith("(it has a DistributedSampler)")
    assert batch_of_all(feed_of(DataLoader(Samples(64), 8), member), 2) == 64
    assert batch_of_all(feed_of([1], member), 2) is None
