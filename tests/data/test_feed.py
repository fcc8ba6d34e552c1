from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightkit.data import BatchStream, Feed
from lightkit.errors import DataError
from tests.data.members import Member, feed_of, in_turn

DATA = TensorDataset(torch.arange(12))


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, 2, shuffle=True, **options)


def read(feed: Feed, record: Any = None, skip: int = 0) -> list[list[int]]:
    stream = BatchStream(feed.loader, feed=feed, record=record, skip=skip)
    return [batch[0].tolist() for batch in stream]


def test_the_users_loader_stays_as_it_is() -> None:
    class Mine(DataLoader[Any]):
        pass

    loader = Mine(DATA, 2, shuffle=True)
    before = dict(vars(loader))
    feed = Feed(loader, resumable=True)
    read(feed)
    assert vars(loader) == before
    assert type(feed.view) is Mine
    assert feed.view is not loader
    assert len(feed.view) == 6


@pytest.mark.parametrize("loader", [[1, 2], shuffled(), iter([1])])
def test_what_needs_nothing_is_used_itself(loader: Any) -> None:
    assert Feed(loader).view is loader


def test_a_pass_is_continued() -> None:
    feed = Feed(shuffled(), resumable=True)
    record = feed.record(3)
    torch.manual_seed(1)
    whole = read(feed, record)
    record["hash"] = feed.mark(4)
    assert feed.mark(0) is feed.mark(7) is None
    torch.manual_seed(1)
    assert read(feed, record, 4) == whole[4:]
    torch.manual_seed(2)
    with pytest.raises(DataError, match="gives other samples.*cannot be replayed"):
        read(feed, record, 4)


def test_reopened_workers_draw_nothing_and_load_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    feed = Feed(shuffled(num_workers=1, persistent_workers=True, generator=generator))
    before = generator.get_state(), torch.get_rng_state()
    feed.reopen()
    assert feed.open
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    (worker,) = feed.view._iterator._workers
    assert feed.view._iterator._send_idx == 0
    assert len(read(feed)) == 6
    assert feed.view._iterator._workers[0] is worker
    feed.close()
    assert not feed.open
    assert not worker.is_alive()
    feed.close()


def test_the_states_of_the_parts() -> None:
    class Part(list[int]):
        at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    sampler: Any = Part(range(12))
    feed = Feed(DataLoader(DATA, 2, sampler=sampler), resumable=True)
    sampler.at = 1
    record = feed.record(3)
    sampler.at = 2
    now = feed.now(0)
    feed.load({}, now, "loader")
    assert sampler.at == 2
    feed.load(record, now, "loader")
    assert sampler.at == 1


class Counting(IterableDataset[int]):
    """Knows where it is."""

    at, fails = 0, -1

    def __iter__(self) -> Any:
        while self.at < 6:
            self.at += 1
            if self.at == self.fails:
                self.fails = -1
                raise ValueError("once")
            yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_place_counts_only_if_all_that_was_fetched_is_completed() -> None:
    feed = Feed(DataLoader(Counting(), 2), resumable=True)
    assert feed.now(0)["states"] == {}  # nothing has begun
    stream = BatchStream(feed.loader, feed=feed)
    stream.fetch()
    assert feed.now(1)["states"] == {"dataset": {"at": 2}}
    assert feed.now(0)["states"] == {}
    stream.fetch()
    stream.fetch()
    stream.close()
    assert feed.now(3)["states"] == {"dataset": {"at": 6}}
    feed.loader.dataset.fails = 2
    feed.loader.dataset.at = 0
    stream = BatchStream(feed.loader, feed=feed)
    with pytest.raises(ValueError, match="once"):
        stream.fetch()
    assert feed.now(0)["states"] == {}  # a part of a batch is out


def test_a_pass_is_not_over_whose_last_batch_failed() -> None:
    feed = Feed(DataLoader(Counting(), 4), resumable=True)
    record = feed.record(3)
    stream = BatchStream(feed.loader, feed=feed, record=record)
    stream.fetch()
    assert stream.fetch().tolist() == [5, 6]  # a short one: the dataset has ended
    assert feed.now(2)["over"]
    now = feed.now(1)
    assert not now["over"]
    again = Feed(DataLoader(Counting(), 4), resumable=True)
    again.load(record, now, "loader")
    stream = BatchStream(again.loader, feed=again, record=record, skip=1)
    assert [batch.tolist() for batch in stream] == [[5, 6]]


def test_a_state_that_asks_for_more_is_none() -> None:
    class Asks(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(4))

        def state_dict(self, samples: int) -> Any:
            raise AssertionError

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError

    feed = Feed(DataLoader(Asks(), 2), resumable=True)
    assert feed.now(0)["states"] == {}


class Whole(Dataset[Any]):
    """Gives whole batches only; says for each one in which process it was asked for it."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample was asked for alone")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert type(indices) is list
        drawn = torch.rand(len(indices))
        inside = torch.utils.data.get_worker_info() is not None
        return [(i, drawn[n], len(indices), inside) for n, i in enumerate(indices)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", [False, True])
def test_batched_getitems_gets_whole_batches(workers: int, part: bool) -> None:
    data: Any = Subset(Subset(Whole(), range(2, 22)), range(1, 20, 2)) if part else Whole()
    loader = DataLoader(data, 4, shuffle=True, num_workers=workers)
    feed = Feed(loader, resumable=True)
    torch.manual_seed(1)
    plain = [*loader]
    torch.manual_seed(1)
    record = feed.record(3)
    whole = [*BatchStream(loader, feed=feed, record=record)]
    assert [batch[0].tolist() for batch in whole] == [batch[0].tolist() for batch in plain]
    if not workers:  # whose seeds are the batch's own
        assert [batch[1].tolist() for batch in whole] == [batch[1].tolist() for batch in plain]
    for indices, _, asked, inside in whole:
        assert asked.tolist() == [len(indices)] * len(indices)
        assert inside.tolist() == [bool(workers)] * len(indices)
    torch.manual_seed(1)
    rest = [*BatchStream(loader, feed=feed, record=record, skip=1)]
    assert [batch[0].tolist() for batch in rest] == [batch[0].tolist() for batch in whole[1:]]
    if workers:
        assert torch.equal(rest[0][1], whole[1][1])
    said: list[Any] = []
    parts = []
    for rank in range(2):  # each rank asks for its own batches only
        torch.manual_seed(1)
        one = feed_of(loader, Member(rank, 2, said))
        parts.append(
            [batch[0].tolist() for batch in BatchStream(loader, feed=one, record=one.record(3))]
        )
    assert in_turn(parts) == [batch[0].tolist() for batch in whole][: 2 * len(parts[0])]
