"""How several processes share the batches of one loader: checked rank by rank in this process."""

from __future__ import annotations

import logging
import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightkit import rng
from lightkit.data import BatchStream, Feed, order_of, sample_counts
from lightkit.data.comparing import compare_first
from lightkit.errors import DataError
from tests.data.members import (
    LOADERS,
    READ,
    Buffered,
    Looping,
    Member,
    Samples,
    Shuffling,
    alone,
    feed_of,
    in_turn,
    numbers,
    together,
    train,
)

# --- one order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [21, 23])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", LOADERS)
def test_each_batch_comes_once_and_in_turn(kind: str, world: int, length: int) -> None:
    make = lambda: LOADERS[kind](length)  # noqa: E731
    whole = alone(make)
    parts, feeds = together(make, world)
    assert {len(part) for part in parts} == {length // world}
    assert in_turn(parts) == whole[: length // world * world]
    assert [feed.reads for feed in feeds] == [kind in READ] * world
    if kind not in READ:  # nobody loads what is not his
        sizes = [len(batch) for part in parts for batch in part]
        assert sum(feed.loader.dataset.loaded for feed in feeds) == sum(sizes)


@pytest.mark.parametrize("kind", ["in turn", "shuffled", "generator", "list", "iterable"])
def test_an_evaluation_gets_everything(kind: str) -> None:
    for length, world in ((21, 2), (23, 4), (3, 4), (499, 4)):
        torch.manual_seed(7)
        random.seed(7)
        make = LOADERS[kind]
        loader = make(length)
        whole = [numbers(batch) for batch in BatchStream(loader, feed=Feed(loader))]
        said: list[Any] = []
        parts = []
        for rank in range(world):
            torch.manual_seed(7 + rank)
            random.seed(7 + rank)
            loader = make(length)
            feed = feed_of(loader, Member(rank, world, said), even=False)
            before = torch.get_rng_state()
            stream = BatchStream(loader, feed=feed)
            assert not rank or torch.equal(torch.get_rng_state(), before)
            parts.append([numbers(batch) for batch in stream])
            assert len(parts[-1]) == -(-(length - rank) // world)
            assert stream.length in (None, len(parts[-1]))
        assert in_turn(parts) == whole
        assert len(said) == 1 + (kind != "list")  # at most two words of rank zero for the pass


@pytest.mark.parametrize("kind", [k for k in LOADERS if k not in ("iterable", "own iter")])
def test_rank_zero_is_where_one_process_is(kind: str) -> None:
    """Behind a pass over as many batches the random states are those of one process."""
    if kind != "list":
        torch.manual_seed(1)
    make = lambda: LOADERS[kind](24)  # noqa: E731
    one = make()
    states = []
    for world in (1, 4):
        feed = feed_of(one if world == 1 else make(), Member(0, world, []))
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        state = order_of({"generators": [], **feed.record(1)})
        stream = BatchStream(feed.loader, feed=feed, record=state)
        first = stream.fetch()
        states.append((torch.get_rng_state(), random.getstate(), numbers(first)))
        stream.close()
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


def test_ranks_with_parts_of_one_model_get_the_same_batches() -> None:
    """As in tensor parallelism: 4 ranks, of which two and two have one share."""
    make = lambda: LOADERS["shuffled"](22)  # noqa: E731
    whole = alone(make)
    said: list[Any] = []
    parts = []
    for rank in range(4):
        feed = feed_of(make(), Member(rank, 4, said), place=(rank // 2, 2))
        parts.append(train(feed)[1])
        assert feed.world == 2
    assert parts[0] == parts[1]
    assert parts[2] == parts[3]
    assert in_turn(parts[::2]) == whole
    said = []
    for rank in range(2):  # both of them have all
        feed = feed_of(make(), Member(rank, 2, said), place=(0, 1))
        assert train(feed)[1] == whole


def test_generators_of_a_loader_end_alike_on_all_ranks() -> None:
    make = lambda: LOADERS["generator"](22)  # noqa: E731
    one = make()
    train(Feed(one, resumable=True))
    _, feeds = together(make, 4)
    for feed in feeds:
        assert torch.equal(feed.loader.generator.get_state(), one.generator.get_state())


def test_samplers_of_other_weights_are_an_error() -> None:
    said: list[Any] = []
    for rank in range(2):
        sampler = WeightedRandomSampler([1.0] * 20 + [1.0 + 9 * rank] * 22, 42)
        feed = feed_of(DataLoader(Samples(42), 2, sampler=sampler), Member(rank, 2, said))
        if rank:
            with pytest.raises(DataError, match="gives other samples on rank 1 than on rank 0"):
                train(feed)
        else:
            train(feed)


def test_states_of_samplers_are_those_of_rank_zero() -> None:
    class Own:
        def __init__(self, seed: int) -> None:
            self.random = np.random.default_rng(seed)

        def __iter__(self) -> Any:
            return iter(self.random.permutation(12).tolist())

        def __len__(self) -> int:
            return 12

    said: list[Any] = []
    parts = []
    for rank in range(3):
        loader = DataLoader(Samples(12), sampler=Own(rank))  # other seeds by mistake
        parts.append(train(feed_of(loader, Member(rank, 3, said)))[1])
    assert sorted(chain.from_iterable(in_turn(parts))) == list(range(12))


@pytest.mark.parametrize("kind", ["buffered", "own iter"])
def test_what_draws_while_it_is_read_gives_the_same_to_all(kind: str) -> None:
    def make() -> Any:
        if kind == "buffered":
            return DataLoader(Buffered(23), batch_size=1)
        return Looping(Samples(23), shuffle=True)

    said: list[Any] = []
    parts = []
    for rank in range(4):
        loader = make()
        feed = feed_of(loader, Member(rank, 4, said))
        assert feed.reads
        torch.manual_seed(rank)
        random.seed(rank)
        record = feed.ranks.share(order_of({"generators": [], **feed.record(1)}), "order")
        own = rng.rng_state()
        feed.take(record)
        stream = BatchStream(loader, feed=feed, record=record)
        if rank:
            rng.set_rng_state(own)
        part = []
        for batch in stream:
            part += numbers(batch)
            random.random()  # what the steps of this rank draw
            torch.rand(rank + 1)
        parts.append(part)
    assert len(set(chain.from_iterable(parts))) == 20
    assert {len(part) for part in parts} == {5}


@pytest.mark.parametrize(
    "options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
)
@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_workers_draw_for_a_batch_whoever_gets_it(kind: str, options: Any) -> None:
    def passes(feed: Feed) -> list[Any]:
        found = []
        for epoch in (0, 1):
            torch.manual_seed(epoch + feed.ranks.rank)
            record = feed.ranks.share(order_of({"generators": [], **feed.record(epoch)}), "order")
            feed.take(record)
            stream = BatchStream(feed.loader, feed=feed, record=record)
            found.append([[t.tolist() for t in batch] for batch in stream])
        feed.close()
        return found

    def make() -> Any:
        if kind == "map":
            return DataLoader(Samples(11), 2, shuffle=True, **options)
        return DataLoader(Shuffling(11), 2, **options)

    whole = passes(Feed(make(), resumable=True))
    said: list[Any] = []
    parts = [passes(feed_of(make(), Member(rank, 2, said))) for rank in range(2)]
    for epoch in (0, 1):
        assert (
            in_turn([part[epoch] for part in parts]) == whole[epoch][: len(whole[epoch]) // 2 * 2]
        )


# --- limits and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shuffled", "per index", "list", "iterable"])
def test_a_limit_is_one_of_all_batches(kind: str) -> None:
    make = lambda: LOADERS[kind](23)  # noqa: E731
    whole = alone(make, limit=9)
    parts, feeds = together(make, 2, limit=9)
    assert in_turn(parts) == whole[:8]
    assert feeds[0].length(9) in (4, None)
    assert feeds[0].at_most(2, None) == 4
    assert feeds[0].at_most(2, 3) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_samples_in_the_batches_of_a_rank(world: int) -> None:
    for length in range(2 * world, 40):
        for even in (True, False):
            loader = DataLoader(TensorDataset(torch.arange(length)), 2)
            said: list[Any] = []
            for rank in range(world):
                feed = feed_of(loader, Member(rank, world, said), even=even)
                counts = sample_counts(loader, feed.share)
                assert counts is not None
                stream = BatchStream(loader, feed=feed)
                for batch in stream:
                    assert stream.size == len(batch[0]) == counts.of(stream.fetched - 1)
                assert counts.batches == stream.fetched


def test_an_evaluation_rank_without_a_batch() -> None:
    loader = DataLoader(Samples(2))
    said: list[Any] = []
    for rank, wanted in ((0, 1), (2, 0), (3, 0)):
        feed = feed_of(loader, Member(rank, 4, said), even=False)
        assert len(list(BatchStream(loader, feed=feed))) == wanted
    empty = DataLoader(Shuffling(0))
    stream = BatchStream(empty, feed=feed_of(empty, Member(0, 4, []), even=False))
    with pytest.raises(DataError, match="gave no batch"):
        stream.fetch()


def test_too_few_batches_to_train_on() -> None:
    loader = DataLoader(Shuffling(3))
    feed = feed_of(loader, Member(0, 4, []))
    with pytest.raises(DataError, match=r"fewer batches than there are processes \(4\)"):
        train(feed)


# --- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["shuffled", "generator", "per index", "batches", "list", "iterable", "own iter"]
)
def test_other_numbers_of_ranks_go_on_in_the_same_order(kind: str) -> None:
    """4 ranks do a part of an epoch, then 2, 1 and 8; nothing is lost or comes twice."""
    length = 61
    make = lambda: LOADERS[kind](length)  # noqa: E731
    whole = alone(make)
    done, got, record, marks = 0, [], None, {}
    one = Feed(make(), resumable=True)
    train(one)
    for world, rounds in ((4, 2), (3, 3), (2, 6), (1, 3), (8, 2), (4, 99)):
        said: list[Any] = []
        feeds = [feed_of(make(), Member(rank, world, said)) for rank in range(world)]
        skips = {feed.go_on(dict(record or {}), done, 4, None) if done else 0 for feed in feeds}
        (skip,) = skips
        parts, hashes = [], set()
        for feed in feeds:
            feed.load(record or {}, {}, "loader") if record else None
            found, part, _ = train(feed, record=record, skip=skip)
            rounds_done = min(skip + rounds, skip + len(part))
            parts.append(part[: rounds_done - skip])
            hashes.add(feed.mark(rounds_done))
            total = feed.done(rounds_done)
        got += in_turn(parts)
        record = record or found
        (mark,) = hashes
        assert mark == one.mark(total)  # all agree with one process
        assert total == done + world * len(parts[0])
        done = total
        if mark is not None:
            record["hash"] = marks[done] = mark
    assert got == whole[:done]
    assert length - done < 4
    if kind not in ("list", "iterable"):
        assert len(marks) == 6
        record["hash"] = 1
        with pytest.raises(DataError, match="gives other samples"):
            train(feeds[0], record=record, skip=rounds_done)


def test_what_is_said_where_another_number_of_ranks_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lightkit")
    feed = feed_of(LOADERS["list"](23), Member(0, 4, []))
    assert feed.go_on({}, 8, 2, None) == 2
    assert feed.length() == 5
    assert caplog.messages[-1] == (
        "8 of 23 batches of the epoch were done by 2 processes; 4 processes take the rest: 3 left "
        "out at its end"
    )
    assert feed.go_on({}, 6, 1, 20) == 2  # the first 6 count as 2 rounds
    assert feed.length(20) == 5
    assert "6 of 20 batches of the epoch were done by 1 process;" in caplog.text
    alone = Feed(LOADERS["list"](23), resumable=True)
    assert alone.go_on({}, 6, 4, None) == 6
    assert caplog.messages[-1].endswith("one takes the rest: 0 left out at its end")
    said = len(caplog.messages)
    assert alone.go_on({}, 6, 1, None) == 6
    assert len(caplog.messages) == said
    # Fewer batches than are done, as a limit of each process may say: the epoch is over.
    assert feed.go_on({}, 21, 2, 16) == 6
    record = order_of({"generators": [], **feed.record(1)})
    stream = BatchStream(feed.loader, feed=feed, record=record, skip=6, limit=16)
    assert list(stream) == []


def test_one_that_knows_where_it_is_goes_on_elsewhere() -> None:
    class Stateful(Buffered):
        left: list[int]

        def __init__(self, length: int) -> None:
            super().__init__(length)
            self.left, self.read = [], 0

        def __iter__(self) -> Any:
            self.left = self.left or list(range(self.length))
            while self.left:
                self.read += 1
                yield torch.tensor(self.left.pop(random.randrange(len(self.left))))

        def state_dict(self) -> dict[str, Any]:
            return {"left": list(self.left)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.left = list(state["left"])

    make = lambda: DataLoader(Stateful(40), batch_size=1)  # noqa: E731
    whole, _ = together(make, 4)
    said: list[Any] = []
    for rank in range(4):
        feed = feed_of(make(), Member(rank, 4, said))
        record, _, _ = train(feed, limit=12)
        feed.stream.ended = False  # type: ignore[union-attr]
        now = feed.now(3)
    got = []
    for rank in range(2):
        feed = feed_of(make(), Member(rank, 2, []))
        skip = feed.go_on(record, 12, 4, None)
        feed.load(record, now, "loader")
        got.append(train(feed, record=record, skip=skip)[1])
        assert feed.loader.dataset.read == 28  # nothing was read again
    assert in_turn(got) == in_turn(whole)[12:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_sees_the_same_samples_with_fewer_ranks_and_more_accumulation(
    accumulate: int,
) -> None:
    steps = []
    for world in (4, 2, 1):
        parts, _ = together(lambda: LOADERS["shuffled"](32), world)
        group = accumulate * 4 // world
        steps.append(
            [
                sorted(n for part in parts for batch in part[i : i + group] for n in batch)
                for i in range(0, len(parts[0]), group)
            ]
        )
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) == 8 // accumulate


class Divided(Shuffling):
    """Divides its data by rank itself, as many iterable data sets do."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        super().__init__(length)
        self.rank, self.world = rank, world

    def __iter__(self) -> Any:
        return (torch.tensor([float(i)]) for i in range(self.rank, self.length, self.world))


@pytest.mark.parametrize("divided", [False, True])
def test_a_loader_that_divides_its_data_unasked_is_noticed(
    divided: bool, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[Any] = []
    with caplog.at_level(logging.WARNING, "lightkit"):
        for rank in range(2):
            data = Divided(12, rank, 2) if divided else Shuffling(12)
            torch.manual_seed(rank)
            train(feed_of(DataLoader(data), Member(rank, 2, said)))
    assert ("gives other batches on rank 1 than on rank 0" in caplog.text) is divided
    assert ("say Trainer(use_distributed_sampler=False)" in caplog.text) is divided


def test_batches_of_all_kinds_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    kinds = [torch.bool, torch.int16, torch.bfloat16, torch.complex64, torch.float64]
    batch = {"x": [torch.ones(2, 3).to(kind).t() for kind in kinds], "name": ("a", 1), "o": object}
    other = {**batch, "name": ("b", 1)}
    with caplog.at_level(logging.WARNING, "lightkit"):
        for second, told in ((batch, False), (other, True), (None, True)):
            said: list[Any] = []
            for rank, one in enumerate((batch, second)):
                compare_first(Member(rank, 2, said), "Loader", one)
            assert bool(caplog.records) is told
            caplog.clear()
