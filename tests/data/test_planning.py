from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightkit.data import planning
from lightkit.data.planning import Plan, fingerprint, seed_from


class PerIndex:
    """Draws from the global state for each index."""

    def __init__(self, length: int | None = 5) -> None:
        self.length, self.asked = length, 0

    def __iter__(self) -> Any:
        for _ in range(5):
            self.asked += 1
            yield int(torch.randint(1000, ()))

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError
        return self.length


def plan(inner: Any, *, workers: bool = False, skip: int = 0, seed: int = 7) -> Plan:
    found = Plan(inner, workers=workers, replay=True)
    found.begin(seed, skip)
    return found


def stock(kind: str) -> Any:
    if kind == "random":
        return BatchSampler(RandomSampler(range(10)), 3, False)
    if kind == "weighted":
        return BatchSampler(WeightedRandomSampler([0.1, 0.9, 0.5], 10), 3, True)
    return SequentialSampler(range(10))


@pytest.mark.parametrize("kind", ["random", "weighted", "sequential"])
def test_gives_what_the_sampler_gives_and_draws_what_it_draws(kind: str) -> None:
    torch.manual_seed(1)
    wanted, after = list(stock(kind)), torch.rand(2)
    torch.manual_seed(1)
    assert list(plan(stock(kind))) == wanted
    assert torch.equal(torch.rand(2), after)


@pytest.mark.parametrize("skip", [1, 3, 4])
def test_a_walk_goes_on_after_what_is_skipped_with_the_same_marks(skip: int) -> None:
    torch.manual_seed(1)
    whole = plan(stock("random"))
    batches = list(whole)
    torch.manual_seed(1)
    rest = plan(stock("random"), skip=skip)
    indices = iter(rest)
    assert rest.walked()
    assert len(rest.marks) == skip
    torch.manual_seed(2)  # the state of the checkpoint
    assert list(indices) == batches[skip:]
    assert rest.marks == whole.marks
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(2)))


def test_a_walk_needs_a_loader_that_asks() -> None:
    assert not plan(stock("random"), skip=2).walked()


def test_one_that_draws_for_each_index_is_drawn_whole() -> None:
    sampler = PerIndex()
    indices = iter(plan(sampler))
    assert sampler.asked == 0
    torch.manual_seed(1)
    got = [next(indices)]
    assert sampler.asked == 5
    torch.manual_seed(2)  # whatever is drawn in between
    got += indices
    torch.manual_seed(1)
    assert got == list(PerIndex())


def test_an_endless_sampler_is_not_drawn_for_ever() -> None:
    def endless() -> Any:
        while True:
            yield 1

    class Endless(PerIndex):
        def __iter__(self) -> Any:
            return endless()

    indices = iter(plan(Endless()))
    assert [next(indices) for _ in range(9)] == [1] * 9


def test_one_without_a_length_draws_from_a_state_of_its_own() -> None:
    first = iter(plan(PerIndex(None)))
    torch.manual_seed(1)
    got = [next(first), next(first)]
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    got += first
    assert len(set(got)) > 1
    assert list(plan(PerIndex(None))) == got
    assert list(plan(PerIndex(None), seed=8)) != got


def test_it_is_drawn_as_far_as_the_pass_goes_only() -> None:
    found = plan(PerIndex())
    found.begin(7, 0, 2)
    indices = iter(found)
    torch.manual_seed(1)
    got = [next(indices)]
    assert found.inner.asked == 2
    torch.manual_seed(2)
    got.append(next(indices))
    torch.manual_seed(1)
    assert got == list(PerIndex())[:2]


@pytest.mark.parametrize("batched", [False, True])
def test_a_long_one_is_drawn_in_pieces_from_a_state_of_its_own(
    monkeypatch: pytest.MonkeyPatch, batched: bool
) -> None:
    monkeypatch.setattr(planning, "_LONG", 4)
    monkeypatch.setattr(planning, "_PIECE", 2 - batched)
    found = plan(BatchSampler(PerIndex(), 2, False) if batched else PerIndex())  # type: ignore[arg-type]
    torch.manual_seed(1)
    indices = iter(found)
    got = [next(indices)]
    sampler = found.inner.sampler if batched else found.inner
    assert sampler.asked == 2
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    got += indices
    assert sampler.asked == 5
    found.begin(7, 0)
    assert list(found) == got
    found.begin(7, 1)
    rest = iter(found)
    assert found.walked()
    assert list(rest) == got[1:]


def test_a_silent_one_leaves_the_sampler_alone() -> None:
    found = plan(PerIndex())
    found.silent = True
    assert list(found) == []
    assert found.inner.asked == 0


def test_it_looks_like_the_sampler_but_has_no_state() -> None:
    class Stateful(BatchSampler):
        def state_dict(self) -> Any:
            return {}

    found = plan(Stateful(SequentialSampler(range(10)), 3, False))
    assert (len(found), found.batch_size, found.drop_last) == (4, 3, False)
    assert not hasattr(found, "state_dict")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[1, 2], [3]], [[1], [2, 3]]),
        ([[1, 2]], [[2, 1]]),
        ([5], [6]),
        ([(1, 2)], [(1, 3)]),
        ([np.int64(5)], [np.int64(6)]),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])]),
        (["a"], ["b"]),
        ([2**70], [2**71]),
    ],
)
def test_marks_tell_orders_apart(one: Any, other: Any) -> None:
    def mark(indices: Any) -> int:
        found = plan(indices)
        list(found)
        return found.marks[-1]

    assert mark(one) == mark([*one])
    assert mark(one) != mark(other)


def test_marks_do_not_hold_addresses() -> None:
    class Key:
        pass

    first, second = plan([Key()]), plan([Key()])
    list(first)
    list(second)
    assert first.marks == second.marks


def test_seeds_come_from_states_and_draw_nothing() -> None:
    torch.manual_seed(1)
    state, own = torch.get_rng_state(), torch.Generator().manual_seed(2).get_state()
    seeds = [seed_from(state, []), seed_from(state, [own]), seed_from(state, [own], 1)]
    assert len(set(seeds)) == 3
    assert seeds[0] == seed_from(state, [torch.zeros(16, dtype=torch.uint8)])  # another device's
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert seed_from(torch.get_rng_state(), []) != seeds[0]
    random.seed(1)
    assert seed_from(state, []) == seeds[0]


def test_fingerprints_of_data() -> None:
    data = TensorDataset(torch.arange(6))
    splits = [
        Subset(data, [0, 1, 2]),
        Subset(data, [0, 1, 3]),
        Subset(Subset(data, [0, 1, 3]), [0, 1, 2]),
    ]
    prints = [fingerprint(d) for d in (data, data[:3], *splits, ConcatDataset(splits[:2]))]
    assert len(set(prints)) == 6
    assert fingerprint(ConcatDataset(splits[:1])) != fingerprint(ConcatDataset(splits[1:2]))
    assert fingerprint(Subset(data, [0, 1, 2])) == prints[2]
    assert fingerprint(object()) is None
