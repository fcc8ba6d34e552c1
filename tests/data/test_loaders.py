from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from lightkit.data import limited, loader_length, named_loaders, sample_counts
from lightkit.errors import ConfigError, DataError


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


class Empty(Dataset[int]):
    def __len__(self) -> int:
        return 0


def loader(n: int = 10, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(n)), **{"batch_size": 4, **kwargs})


def test_one_several_and_named_loaders() -> None:
    a, b = loader(), loader()
    assert named_loaders(None, "val") == []
    assert named_loaders([], "val") == []
    assert named_loaders(a, "val") == [(None, a)]
    assert named_loaders([a], "val") == [(None, a)]
    assert named_loaders((a, b), "val") == [("dataloader_idx_0", a), ("dataloader_idx_1", b)]
    assert named_loaders({"clean": a, "noisy": b}, "val") == [("clean", a), ("noisy", b)]
    assert named_loaders({"clean": a}, "val") == [("clean", a)]


def test_any_iterable_of_batches_is_a_loader() -> None:
    generator = (i for i in range(3))
    assert named_loaders(generator, "train") == [(None, generator)]
    assert next(generator) == 0, "it was touched"
    for batches in ([(1, 2), (3, 4)], [[1, 2], [3, 4]], [{"x": 1}, {"x": 2}]):
        assert named_loaders(batches, "train") == [(None, batches)]
    batches = [torch.ones(2)] * 3
    assert named_loaders({"a": batches}, "val") == [("a", batches)]


def test_looking_at_loaders_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    named_loaders([loader(shuffle=True), loader(num_workers=2)], "val")
    sample_counts(loader(shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (TensorDataset(torch.ones(3)), "is a Dataset.*DataLoader\\(dataset, batch_size=32, shuf"),
        (Numbers(), "is a Dataset.*batch_size=None"),
        ([TensorDataset(torch.ones(3))], "is a Dataset"),
        (torch.ones(3, 2), r"Tensor of shape \(3, 2\).*TensorLoader"),
        ([torch.ones(3), torch.ones(3)], "'dataloader_idx_0' is a Tensor"),
        ("data/train", "'data/train' \\(str\\)"),
        (3, r"3 \(int\)"),
        (DataLoader, r"\(type\)"),
        ({1: loader()}, "must be non-empty strings.*got 1"),
        ({"a": None}, "'a' is None"),
        (loader(0), r"is empty: its len\(\) is 0. Its dataset has no samples"),
        (loader(3, drop_last=True), "3 samples do not fill one batch of 4.*drop_last=False"),
        ({"a": []}, "'a' is empty"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else v[:12],
)
def test_what_is_no_loader_is_refused_with_the_fix(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"The train loader.*{words}|{words}"):
        named_loaders(value, "train")


def test_length() -> None:
    assert loader_length(loader()) == 3
    assert loader_length([1, 2]) == 2
    assert loader_length(iter([1])) is None
    assert loader_length(DataLoader(Numbers())) is None


@pytest.mark.parametrize(
    ("length", "limit", "batches"),
    [
        (10, None, 10),
        (10, 1.0, 10),
        (10, 3, 3),
        (10, 1, 1),
        (10, 30, 10),
        (10, 0, 0),
        (10, 0.0, 0),
        (10, 0.25, 2),
        (100, 0.29, 29),
        (None, None, None),
        (None, 1.0, None),
        (None, 5, 5),
        (None, 0.0, 0),
    ],
)
def test_limits(length: int | None, limit: float | None, batches: int | None) -> None:
    assert limited(length, limit, "limit_val_batches") == batches


@pytest.mark.parametrize(
    ("length", "limit", "words"),
    [
        (10, -1, "is -1"),
        (10, 1.5, "is 1.5"),
        (10, -0.5, "is -0.5"),
        (10, float("nan"), "is nan"),
        (10, True, "is True"),
        (10, "3", "is '3'"),
        (10, 0.05, r"is 0.05, which leaves none of the 10 batches. Give at least 0.1,"),
        (None, 0.5, r"is 0.5, a fraction, but the loader has no len\(\)"),
    ],
)
def test_wrong_limits_name_the_argument(length: int | None, limit: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"limit_val_batches {words}"):
        limited(length, limit, "limit_val_batches")


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [3, 4, 10, 12])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sample_counts_are_those_of_the_batches(n: int, batch_size: int, drop_last: bool) -> None:
    data = loader(n, batch_size=batch_size, drop_last=drop_last, shuffle=True)
    counts = sample_counts(data)
    assert counts is not None
    assert [counts.of(i) for i in range(len(data))] == [len(x) for (x,) in data]
    assert counts.of(len(data)) is None


def test_sample_counts_of_a_sampler_with_another_length() -> None:
    dataset = TensorDataset(torch.arange(10))
    sampler = RandomSampler(dataset, num_samples=5)
    counts = sample_counts(DataLoader(dataset, batch_size=4, sampler=sampler))
    assert counts == (4, 1, 2)


class OwnBatches(BatchSampler):
    pass


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([torch.ones(3)])


def test_sample_counts_are_never_guessed() -> None:
    dataset = TensorDataset(torch.arange(10))
    own = OwnBatches(RandomSampler(dataset), 4, False)
    for data in (
        DataLoader(dataset, batch_sampler=own),
        DataLoader(dataset, batch_sampler=[[0, 1], [2]]),
        DataLoader(dataset, batch_size=None),
        DataLoader(Numbers(), batch_size=4),
        OwnLoader(dataset, batch_size=4),
        [torch.ones(4)],
    ):
        assert sample_counts(data) is None
