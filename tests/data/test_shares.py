from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from lightkit.data import BatchStream, Feed, Share
from lightkit.data.shares import Together
from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.ranks import Ranks
from lightkit.errors import DataError
from tests.data.members import Member, Samples, divided, feed_of, numbers


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [0, 1, 7, 8, 21])
def test_shares_hold_everything_once(world: int, total: int) -> None:
    for even in (True, False):
        shares = [Share(rank, world, even) for rank in range(world)]
        found = sorted(s.number(i) for s in shares for i in range(s.length(total) or 0))
        assert found == list(range(total // world * world if even else total))
        assert len({s.length(total) for s in shares}) == 1 or not even
        assert shares[0].length(None) is None


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("done", range(1, 17))
def test_a_moved_share_goes_on_exactly_there(world: int, done: int) -> None:
    shares = [Share(rank, world, True) for rank in range(world)]
    begun = {share.move(done) for share in shares}
    assert len(begun) == 1
    (first,) = begun
    assert first > 0
    found = sorted(s.number(i) for s in shares for i in range(first, s.length(40) or 0))
    assert found == list(range(done, done + (40 - done) // world * world))
    assert {s.before(first) for s in shares} == {done}
    assert sum(shares[0].width(i) for i in range(first)) == done


# --- loaders that divide their data themselves -----------------------------------------------------


def test_a_distributed_sampler_is_taken_as_it_is() -> None:
    for batched in (False, True):
        found = []
        for rank in range(2):
            loader = divided(rank, 2)
            if batched:
                sampler = BatchSampler(loader.sampler, 2, False)
                loader = DataLoader(loader.dataset, batch_sampler=sampler)
            feed = feed_of(loader, Member(rank, 2, []))
            assert feed.own
            assert not feed.reads
            assert feed.share == Share(even=True)
            assert feed.global_index(3) is None
            assert len(loader) == feed.length() == 6
            stream = BatchStream(loader, feed=feed, epoch=3)
            found += [number for batch in stream for number in numbers(batch)]
            same = divided(rank, 2)
            same.sampler.set_epoch(3)  # type: ignore[attr-defined]
            assert found[-11:] == [n for batch in same for n in numbers(batch)]
        assert sorted(found) == list(range(22))


def test_a_distributed_sampler_of_another_number_of_processes() -> None:
    with pytest.raises(
        DataError, match="between 4 processes and takes share 1, but this is rank 1 of 2"
    ):
        feed_of(divided(1, 4), Member(1, 2, []))
    with pytest.raises(DataError, match="takes share 0, but this is rank 1 of 2"):
        feed_of(divided(0, 2), Member(1, 2, []))
    assert not Feed(divided(1, 4)).own  # one process does as it is told


def test_the_user_may_divide() -> None:
    loader = DataLoader(Samples(5))
    feed = feed_of(loader, Member(1, 2, []), divided=True)
    assert feed.own
    assert len(train_own(feed)) == 5
    assert feed.done(3) == 6
    assert feed.fresh().own
    record = {"hash": 1, "length": 2, "seed": 3}
    assert feed.go_on(record, 7, 4, None) == 4
    assert record == {"seed": 3}


def train_own(feed: Feed) -> list[Any]:
    return [numbers(batch) for batch in BatchStream(feed.loader, feed=feed)]


class Answering(Ranks):
    """A rank whose neighbour answers as it is told."""

    def __init__(self, answers: list[float]) -> None:
        super().__init__(LaunchEnv(rank=1, world_size=2))
        self.answers, self.told = answers, []

    def exchange(self, numbers: Any, what: str) -> Any:
        assert what == "is there another batch"
        self.told.append(bool(numbers[0]))
        return [[self.answers.pop(0)], [float(numbers[0])]]


def test_loaders_of_unknown_length_end_together(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightkit")
    ranks = Answering([1, 1, 0])
    loader = (torch.tensor(float(i)) for i in range(9))
    assert len(train_own(feed_of(loader, ranks, divided=True))) == 2
    assert "has ended on rank 0" in caplog.text
    ranks = Answering([1, 1, 1, 1])
    loader = (torch.tensor(float(i)) for i in range(3))
    assert len(train_own(feed_of(loader, ranks, divided=True))) == 3
    assert ranks.told == [True, True, True, False]
    assert isinstance(feed_of(loader, ranks, divided=True).iterate()[0], Together)


def test_a_wrong_length_of_one_rank_is_an_error() -> None:
    class Wrong:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            return iter([torch.ones(1)] * 3)

    with pytest.raises(DataError, match="of this process gave 3 batches although its len.. says 4"):
        train_own(feed_of(Wrong(), Member(1, 2, []), divided=True))
