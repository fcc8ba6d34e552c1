from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from lightkit.data import END, BatchStream
from lightkit.data.groups import Group, groups


class Sized:
    def __init__(self, given: int, announced: int | None = None) -> None:
        self.given = given
        self.announced = given if announced is None else announced

    def __len__(self) -> int:
        return self.announced

    def __iter__(self) -> Any:
        return iter(range(self.given))


def collect(stream: BatchStream, *args: Any) -> list[tuple[list[int], int, bool]]:
    return [(list(batches(g)), g.size, g.last) for g in groups(stream, *args)]


def batches(group: Group) -> Iterator[Any]:
    for given in range(group.size):
        if (batch := group.fetch()) is END:
            group.say_torn(given)
            return
        yield batch


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("n", [1, 6, 7])
def test_groups_cover_the_pass_with_their_true_sizes(n: int, accumulate: int, sized: bool) -> None:
    got = collect(BatchStream(Sized(n) if sized else iter(range(n))), accumulate)
    wanted = [list(range(n))[i : i + accumulate] for i in range(0, n, accumulate)]
    assert [given for given, _, _ in got] == wanted
    assert [size for _, size, _ in got] == [len(w) for w in wanted]
    known = sized or n % accumulate != 0  # else the last group is full, as all others
    assert [last for _, _, last in got] == [False] * (len(wanted) - 1) + [known]


def test_groups_keep_to_the_limit() -> None:
    assert collect(BatchStream(Sized(10), limit=5), 2)[-1] == ([4], 1, True)
    assert collect(BatchStream(iter(range(10)), limit=5), 2)[-1] == ([4], 1, True)


def test_groups_start_further_in() -> None:
    wanted = [([4, 5], 2, False), ([6], 1, True)]
    assert collect(BatchStream(Sized(7), skip=4), 2) == wanted
    assert collect(BatchStream(Sized(7), skip=4), 2, 4) == wanted
    assert collect(BatchStream(iter(range(7)), skip=4), 2) == wanted
    assert collect(BatchStream(Sized(7), skip=7), 2) == []


def test_a_batch_of_a_sized_loader_is_fetched_just_before_its_turn() -> None:
    stream = BatchStream(Sized(5))
    seen = []
    for group in groups(stream, 2):
        seen.append(("group", stream.fetched))
        seen += [(batch, stream.fetched) for batch in batches(group)]
    assert seen == [
        ("group", 0),
        (0, 1),
        (1, 2),
        ("group", 2),
        (2, 3),
        (3, 4),
        ("group", 4),
        (4, 5),
    ]


def test_an_unsized_loader_is_read_by_whole_groups_and_not_beyond() -> None:
    stream = BatchStream(iter(range(5)))
    assert [stream.fetched for _ in groups(stream, 2)] == [2, 4, 5]


def test_fewer_batches_than_announced_inside_a_group(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightkit"):
        got = collect(BatchStream(Sized(3, announced=8)), 2)
    assert got == [([0, 1], 2, False), ([2], 2, False)]
    assert "ended after 1 of the 2 batches of an accumulated step" in caplog.text
    assert "gave 3 batches although its len() says 8" in caplog.text


def test_fewer_batches_than_announced_between_groups(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightkit"):
        got = collect(BatchStream(Sized(2, announced=8)), 2)
    assert got == [([0, 1], 2, False), ([], 2, False)]
    assert len(caplog.records) == 1


def test_more_batches_than_announced_all_come(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lightkit"):
        got = collect(BatchStream(Sized(7, announced=4)), 2)
    assert got == [
        ([0, 1], 2, False),
        ([2, 3], 2, True),
        ([4, 5], 2, False),
        ([6], 1, True),
    ]
    assert "gave 7 batches although its len() says 4" in caplog.text
