from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from lightkit.data import END, BatchStream
from lightkit.errors import DataError


class Noisy(Dataset[torch.Tensor]):
    """Each sample draws from the random state, as augmentation does."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


class Stops(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 5:
            next(iter([]))
        return index


class Numbers(IterableDataset[int]):
    def __init__(self, n: int, announced: int | None = None) -> None:
        self.n, self.announced = n, announced

    def __iter__(self) -> Any:
        return iter(range(self.n))

    def __len__(self) -> int:
        if self.announced is None:
            raise TypeError("no length")
        return self.announced


class Sized:
    """A loader with any length, right or wrong."""

    def __init__(self, given: int, announced: int) -> None:
        self.given, self.announced, self.ends = given, announced, 0

    def __len__(self) -> int:
        return self.announced

    def __iter__(self) -> Any:
        yield from range(self.given)
        self.ends += 1


def test_ends_once_and_for_all() -> None:
    stream = BatchStream([1, 2])
    assert (stream.length, stream.fetched, stream.ended) == (2, 0, False)
    assert [stream.fetch(), stream.fetch()] == [1, 2]
    assert not stream.ended
    assert stream.fetch() is END
    assert stream.fetch() is END
    assert (stream.fetched, stream.ended) == (2, True)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_random_state_are_those_of_a_plain_loop(workers: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=workers)

    def plain() -> list[torch.Tensor]:
        data, seen = loader(), []
        for _ in range(2):
            for batch in data:
                seen += [batch, torch.rand(3)]  # the step draws too: dropout
        return seen

    def streamed() -> list[torch.Tensor]:
        data, seen = loader(), []
        for epoch in range(2):
            stream = BatchStream(data, epoch=epoch)
            while (batch := stream.fetch()) is not END:
                seen += [batch, torch.rand(3)]
        return seen

    torch.manual_seed(7)
    wanted, state = plain(), torch.get_rng_state()
    torch.manual_seed(7)
    got = streamed()
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_persistent_workers_stay_and_serve_the_next_pass() -> None:
    data = DataLoader(
        TensorDataset(torch.arange(12)), batch_size=2, num_workers=1, persistent_workers=True
    )
    first = BatchStream(data, limit=2)
    assert [b[0].tolist() for b in first] == [[0, 1], [2, 3]]
    workers = data._iterator._workers
    assert [b[0].tolist() for b in BatchStream(data)][-1] == [10, 11]
    assert data._iterator._workers is workers
    assert all(w.is_alive() for w in workers)
    data._iterator._shutdown_workers()


def test_close_lets_go_of_the_workers() -> None:
    data = DataLoader(TensorDataset(torch.arange(12)), batch_size=2, num_workers=1)
    stream = BatchStream(data)
    stream.fetch()
    (worker,) = stream._iterator._workers  # type: ignore[union-attr]
    stream.close()
    worker.join(timeout=5)
    assert not worker.is_alive()
    assert stream.fetch() is END


@pytest.mark.parametrize("sized", [True, False])
def test_limit(sized: bool) -> None:
    data: Any = Sized(5, 5) if sized else iter(range(5))
    stream = BatchStream(data, limit=3)
    assert stream.length == (3 if sized else None)
    assert list(stream) == [0, 1, 2]
    if not sized:
        assert next(data) == 3, "a batch too many was taken"


def test_a_loader_used_whole_reaches_its_own_end() -> None:
    for limit, ends in ((None, 1), (5, 1), (9, 1), (4, 0)):
        data = Sized(5, 5)
        list(BatchStream(data, limit=limit))
        assert data.ends == ends, limit


@pytest.mark.parametrize("given", [2, 6])
def test_a_wrong_length_is_reported_and_all_batches_come(
    given: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lightkit"):
        assert list(BatchStream(Sized(given, 4), name="train loader")) == list(range(given))
    (record,) = caplog.records
    assert f"train loader gave {given} batches although its len() says 4" in record.getMessage()


def test_right_lengths_and_limits_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightkit"):
        list(BatchStream(Sized(4, 4)))
        list(BatchStream(Sized(4, 4), limit=2))
        list(BatchStream(iter([1])))
    assert not caplog.records


def test_skip_goes_further_in_with_the_same_draws(caplog: pytest.LogCaptureFixture) -> None:
    data = DataLoader(Noisy(), batch_size=3, shuffle=True)
    torch.manual_seed(3)
    wanted = list(data)[2:]
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO, "lightkit"):
        stream = BatchStream(data, skip=2)
    assert "batch 2" in caplog.text
    assert (stream.fetched, stream.size, stream.length) == (2, None, 4)
    first = stream.fetch()
    assert stream.size == 3
    assert torch.equal(first, wanted[0])
    assert torch.equal(stream.fetch(), wanted[1])
    assert stream.size == 1
    assert stream.fetch() is END


def test_skip_to_the_very_end_is_an_empty_rest() -> None:
    stream = BatchStream([1, 2], skip=2)
    assert stream.fetch() is END


def test_skip_beyond_the_end_is_an_error() -> None:
    with pytest.raises(DataError, match=r"ended after 2 batches.*had completed 3"):
        BatchStream([1, 2], skip=3)


def test_sizes_come_from_the_sampler() -> None:
    data = DataLoader(TensorDataset(torch.arange(7)), batch_size=3)
    stream, sizes = BatchStream(data), []
    while stream.fetch() is not END:
        sizes.append(stream.size)
    assert sizes == [3, 3, 1]
    stream = BatchStream([1])
    stream.fetch()
    assert stream.size is None


def test_only_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lightkit.data.stream._clock", lambda: now[0])

    def slow() -> Any:
        for i in range(3):
            now[0] += 2.0
            yield i
        now[0] += 0.5

    stream = BatchStream(slow())
    for _ in stream:
        now[0] += 100.0
    assert stream.wait == 6.5


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("workers", [0, 1])
def test_stop_iteration_inside_a_dataset_is_an_error(workers: int, batch_size: int | None) -> None:
    data = DataLoader(Stops(), batch_size=batch_size, num_workers=workers)
    if not workers:
        assert len(list(data)) < len(data), "torch ends the epoch in silence"
    with pytest.raises(DataError, match="raised StopIteration at batch") as caught:
        list(BatchStream(data))
    cause = caught.value.__cause__
    assert isinstance(cause, StopIteration)
    if workers:
        assert "__getitem__" in str(cause)  # the worker's traceback
    else:
        frames, traceback = [], cause.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert "__getitem__" in frames


def _stopping_collate(samples: Any) -> Any:
    raise StopIteration


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(4)), Numbers(4)])
def test_stop_iteration_inside_collate_is_an_error(dataset: Any) -> None:
    with pytest.raises(DataError, match="raised StopIteration at batch 0"):
        list(BatchStream(DataLoader(dataset, batch_size=2, collate_fn=_stopping_collate)))


class CountingSampler(BatchSampler):
    """A batch sampler that is its own iterator: its StopIteration is a real end."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        self.at = 0
        return self

    def __next__(self) -> list[int]:
        if self.at == 2:
            raise StopIteration
        self.at += 1
        return [0, 1]


class Counter(IterableDataset[int]):
    """Is its own iterator: its StopIteration is a real end."""

    def __iter__(self) -> Any:
        self.at = 0
        return self

    def __next__(self) -> int:
        if self.at == 4:
            raise StopIteration
        self.at += 1
        return self.at


@pytest.mark.parametrize("workers", [0, 1])
def test_real_ends_are_no_errors(workers: int) -> None:
    n = {"num_workers": workers}
    noisy = Noisy()
    assert len(list(BatchStream(DataLoader(noisy, batch_sampler=CountingSampler(), **n)))) == 2
    assert len(list(BatchStream(DataLoader(Counter(), batch_size=3, **n)))) == 2
    assert len(list(BatchStream(DataLoader(Counter(), batch_size=3, drop_last=True, **n)))) == 1
    assert len(list(BatchStream(DataLoader(Counter(), batch_size=None, **n)))) == 4


def _index_error(index: Any) -> Any:
    raise IndexError("no such file")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_error_inside_a_dataset_comes_out_and_workers_end(workers: int) -> None:
    data = DataLoader(
        TensorDataset(torch.arange(4)), batch_size=2, collate_fn=_index_error, num_workers=workers
    )
    stream = BatchStream(data)
    processes = getattr(stream._iterator, "_workers", [])
    assert len(processes) == workers
    with pytest.raises(IndexError, match="no such file"):
        stream.fetch()
    for process in processes:
        process.join(timeout=5)
        assert not process.is_alive()
    assert stream.ended


def test_a_generator_serves_one_pass() -> None:
    generator = (i for i in range(3))
    assert list(BatchStream(generator)) == [0, 1, 2]
    with pytest.raises(DataError, match=r"is an iterator \(generator\) and is used up"):
        BatchStream(generator).fetch()


def test_an_endless_iterator_is_continued() -> None:
    generator = (i for i in range(100))
    assert list(BatchStream(generator, limit=2)) == [0, 1]
    assert list(BatchStream(generator, limit=2)) == [2, 3]


def test_a_loader_without_batches_is_an_error() -> None:
    with pytest.raises(DataError, match=r"val loader \(DataLoader\) gave no batch at all"):
        BatchStream(DataLoader(Numbers(0)), name="val loader").fetch()


class Epochs(list[int]):
    def set_epoch(self, epoch: int) -> None:
        self.append(epoch)


def test_set_epoch_reaches_every_part_once() -> None:
    class Part(TensorDataset):
        seen = Epochs()
        set_epoch = seen.set_epoch

    dataset = Part(torch.arange(4))
    sampler: Any = Epochs()
    data = DataLoader(dataset, batch_size=2, sampler=sampler)
    BatchStream(data, epoch=5)
    assert sampler == [5]
    assert Part.seen == [5]
    BatchStream(data)
    assert sampler == [5]
