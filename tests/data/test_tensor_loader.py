"""`TensorLoader`: the batches, order and random states of a DataLoader; what it says of mistakes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset, random_split

import lightkit as lk
from lightkit.data import BatchStream, Feed, sample_counts
from lightkit.errors import ConfigError, DataError
from lightkit.testing import assert_resumes_exactly
from tests.data.members import Member, alone, feed_of, in_turn, numbers, together, train


def data(samples: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(samples, width, generator=generator), torch.arange(samples)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def equal(found: Any, wanted: Any) -> bool:
    """Tells whether two batches have the same containers, tensors, bits and layout."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, dict):
        return list(found) == list(wanted) and equal([*found.values()], [*wanted.values()])
    if isinstance(found, list):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    alike = found.dtype == wanted.dtype and found.stride() == wanted.stride()
    return alike and torch.equal(found, wanted)


def passes(loader: Any, batches: int | None, generator: torch.Generator | None) -> list[Any]:
    """Runs two passes, and takes down each batch and the random states behind it."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        for batch in itertools.islice(loader, batches):
            own = [] if generator is None else [generator.get_state()]
            found.append([batch, torch.get_rng_state(), *own])
        own = [] if generator is None else [generator.get_state()]
        found.append([torch.get_rng_state(), *own])
    return found


# --- as a DataLoader -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [20, 23, 64, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("batches", [None, 2])
def test_batches_order_and_random_states_are_those_of_a_data_loader(
    samples: int, shuffle: bool, drop_last: bool, with_generator: bool, batches: int | None
) -> None:
    x, y = data(samples)
    for size in (1, 4, 7, 16):
        how: dict[str, Any] = {"batch_size": size, "shuffle": shuffle, "drop_last": drop_last}
        one, two = (own(), own()) if with_generator else (None, None)
        wanted = DataLoader(TensorDataset(x, y), generator=one, **how)
        loader = lk.TensorLoader(x, y, generator=two, **how)
        assert len(loader) == len(wanted)
        assert equal(passes(loader, batches, two), passes(wanted, batches, one))


def test_two_loaders_side_by_side_draw_in_the_order_of_data_loaders() -> None:
    x, y = data(20)
    loader = lk.TensorLoader(x, y, batch_size=4, shuffle=True)
    wanted = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    found = []
    for each in (loader, wanted):
        torch.manual_seed(3)
        found.append([[*a, *b] for a, b in zip(each, each, strict=True)])
    assert equal(*found)


def test_a_mapping_gives_dicts() -> None:
    x, y = data(10)
    loader = lk.TensorLoader({"image": x, "label": y}, batch_size=4)
    wanted = DataLoader(StackDataset(image=x, label=y), 4)
    assert equal([*loader], [*wanted])
    assert equal([*lk.TensorLoader(x, batch_size=4)], [*DataLoader(TensorDataset(x), 4)])


@pytest.mark.parametrize("shape", [(3, 40_000), (3, 2, 5), (3,), (3, 0)])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.bool, torch.float64, torch.complex64]
)
def test_large_and_small_samples_of_any_type(shape: Any, dtype: Any) -> None:
    x = torch.randint(0, 2, shape, generator=own()).repeat_interleave(7, 0).to(dtype)
    for size in (5, 32):
        wanted = DataLoader(TensorDataset(x), size)
        assert equal([*lk.TensorLoader(x, batch_size=size)], [*wanted])
    turned = x.movedim(-1, 0)  # not contiguous
    if len(turned):
        wanted = DataLoader(TensorDataset(turned), 4)
        assert equal([*lk.TensorLoader(turned, batch_size=4)], [*wanted])


def test_arrays_are_taken_without_a_copy() -> None:
    x = np.arange(12.0).reshape(6, 2)
    loader = lk.TensorLoader(x, torch.arange(6), batch_size=3)
    x[0] = 9.0
    assert next(iter(loader))[0][0].tolist() == [9.0, 9.0]
    fixed = x[:]
    fixed.flags.writeable = False  # as a file that is mapped for reading
    loader = lk.TensorLoader(fixed, batch_size=3)
    x[0] = 8.0
    assert equal([*loader], [[torch.tensor(x[:3])], [torch.tensor(x[3:])]])


def test_a_batch_is_as_good_as_tensors_of_its_own() -> None:
    x, y = data(256, 8)
    before = x.clone(), y.clone()
    for shuffle in (False, True):
        first, second, *_ = lk.TensorLoader(x, y, batch_size=32, shuffle=shuffle)
        weight = torch.ones(8, requires_grad=True)
        loss = (first[0] * weight).sum()
        second[0].zero_()  # in place, beside a graph that holds the batch before
        loss.backward()
        assert torch.equal(weight.grad, first[0].sum(0))
        for tensor in (*first, *second):
            assert tensor._base is None
            assert tensor.data_ptr() % 64 == 0  # as an allocation of its own
            assert tensor.is_contiguous()
        assert torch.equal(x, before[0])
    for batch in lk.TensorLoader(x[:, :1], y, batch_size=10):  # 40 bytes
        assert all(tensor.data_ptr() % 64 == 0 for tensor in batch)


def test_gradients_reach_the_data() -> None:
    x = torch.ones(6, 2, requires_grad=True)
    for (batch,) in lk.TensorLoader(x, batch_size=4, shuffle=True):
        batch.sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 2))


def test_where_the_tensors_live() -> None:
    x, y = data(10)
    loader = lk.TensorLoader(x, y, batch_size=4, device="cpu")
    assert equal([*loader], [*DataLoader(TensorDataset(x, y), 4)])
    if not torch.cuda.is_available():  # there is nothing to pin for
        pinned = lk.TensorLoader(x, y, batch_size=4, pin_memory=True)
        assert equal([*pinned], [*DataLoader(TensorDataset(x, y), 4)])
    # "meta" stands for any device that is not the CPU
    away = lk.TensorLoader(x, y, batch_size=4, device="meta")
    assert x.device.type == "cpu"
    assert [[t.device.type for t in batch] for batch in away] == [["meta", "meta"]] * 3


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((), "has no tensor"),
        (({},), "has no tensor"),
        ((torch.ones(3), torch.ones(4)), r"different numbers of samples \(0: 3, 1: 4\)"),
        (({"x": torch.ones(3), "y": torch.ones(2)},), r"\('x': 3, 'y': 2\)"),
        ((torch.ones(0, 3),), "no samples"),
        ((torch.ones(3), torch.tensor(1)), "Argument 1 of TensorLoader has no dimension"),
        (([torch.ones(3), torch.ones(3)],), "Give tensors one by one"),
        ((TensorDataset(torch.ones(3)),), r"TensorLoader\(\*dataset.tensors"),
        ((Subset(TensorDataset(torch.ones(3)), [0]),), r"x\[part.indices\]"),
        (
            (torch.ones(3), 32),
            r"is no tensor but 32 \(int\). If it is the batch size: batch_size=32",
        ),
        ((torch.ones(3), torch.ones(3, device="meta")), "on different devices: cpu, meta"),
        (("data.pt",), r"'data.pt' \(str\). Give tensors, NumPy arrays"),
        (({"x": None},), "'x' of the mapping is no tensor but None"),
        ((np.array(["a", "b"]),), "Argument 0 of TensorLoader is an array of <U1"),
        ((np.arange(3)[::-1],), "Argument 0 of TensorLoader is an array of int64.*array.copy"),
        ((np.arange(3, dtype=">f4"),), "Argument 0 of TensorLoader is an array of >f4.*byte order"),
        ((torch.eye(3).to_sparse(),), r"sparse or nested \(torch.sparse_coo\).*dense"),
    ],
    ids=lambda v: None if isinstance(v, tuple) else v[:24],
)
def test_tensors_that_cannot_be_used(tensors: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        lk.TensorLoader(*tensors)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size=0: allowed is a whole number of at least 1"),
        ({"batch_size": True}, ConfigError, "batch_size=True"),
        ({"batch_size": 2.0}, ConfigError, r"batch_size=2\.0"),
        ({"shuffle": None}, ConfigError, "shuffle=None: allowed are True and False"),
        ({"drop_last": 1}, ConfigError, "drop_last=1"),
        ({"pin_memory": "yes"}, ConfigError, "pin_memory='yes'"),
        ({"generator": 3}, ConfigError, "generator=3: allowed is a torch.Generator"),
        ({"device": "gpu"}, ConfigError, "device='gpu' is no device. Give one such as \"cuda\""),
        ({"device": "cuda:99"}, ConfigError, "device='cuda:99', but this machine has"),
        ({"device": "meta", "pin_memory": True}, ConfigError, "pin_memory=True, but the tensors"),
        ({"device": "cuda:-1"}, ConfigError, "device='cuda:-1' is no device"),
        ({"batch_size": 9, "drop_last": True}, DataError, "8 samples do not fill one batch of 9"),
    ],
    ids=lambda v: None if not isinstance(v, str) else v[:20],
)
def test_arguments_that_cannot_work(options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        lk.TensorLoader(torch.ones(8), **options)


# --- in a run --------------------------------------------------------------------------------------


def loaders(samples: int) -> dict[str, Any]:
    x = torch.arange(float(samples))
    return {
        "shuffled": lambda: lk.TensorLoader(x, batch_size=4, shuffle=True),
        "generator": lambda: lk.TensorLoader(x, batch_size=4, shuffle=True, generator=own()),
        "in turn": lambda: lk.TensorLoader(x, batch_size=4),
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("samples", [24, 31, 33])
@pytest.mark.parametrize("kind", ["shuffled", "generator", "in turn"])
def test_ranks_take_batches_in_turn(kind: str, samples: int, world: int) -> None:
    make = loaders(samples)[kind]
    whole = alone(make)
    parts, feeds = together(make, world)
    assert in_turn(parts) == whole[: len(whole) // world * world]
    assert [feed.reads for feed in feeds] == [False] * world
    if kind == "generator":
        states = {feed.loader.generator.get_state().numpy().tobytes() for feed in feeds}
        assert len(states) == 1
    said: list[Any] = []
    found = []
    for rank in range(world):
        torch.manual_seed(7 + rank)
        feed = feed_of(make(), Member(rank, world, said), even=False)
        stream = BatchStream(feed.loader, feed=feed)
        found.append([numbers(batch) for batch in stream])
        counts = sample_counts(feed.loader, feed.share)
        assert [counts.of(i) for i in range(counts.batches)] == [*map(len, found[-1])]
    assert sorted(n for part in found for batch in part for n in batch) == [*range(samples)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["shuffled", "generator", "in turn"])
@pytest.mark.parametrize("limit", [None, 6])
def test_every_pass_goes_on_anywhere(kind: str, world: int, limit: int | None) -> None:
    make = loaders(31)[kind]
    said: list[Any] = []
    whole = [train(feed_of(make(), Member(r, world, said)), limit=limit) for r in range(world)]
    for done in range(1, len(whole[0][1]) + 1):
        told: list[Any] = []
        for rank, (record, came, _) in enumerate(whole):
            feed = feed_of(make(), Member(rank, world, told))
            saved = {**record, "hash": None}
            found = train(feed, record=saved, skip=done, limit=limit)
            assert found[1] == came[done:]
            assert feed.mark(done) is not None
            with pytest.raises(DataError, match="gives other samples"):
                feed.check({**record, "hash": 1}, done, "training loader")


def test_the_hash_of_an_order_is_that_of_a_data_loader() -> None:
    x, y = data(23)
    marks = []
    for loader in (
        lk.TensorLoader(x, y, batch_size=4, shuffle=True),
        DataLoader(TensorDataset(x, y), 4, shuffle=True),
    ):
        feed = Feed(loader, resumable=True)
        torch.manual_seed(1)
        for done, _ in enumerate(BatchStream(loader, feed=feed, record=feed.record(1)), 1):
            marks.append((done, feed.mark(done), feed.mark(max(1, done - 2))))
    assert marks[:6] == marks[6:]


class Net(lk.TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(y.tolist())
        return nn.functional.cross_entropy(self.net(x), y % 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y % 3))
        self.log("noise", torch.rand(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def of_tensors(samples: int, **options: Any) -> Any:
    return lk.TensorLoader(*data(samples, 5), batch_size=4, **options)


def of_dataset(samples: int, **options: Any) -> Any:
    return DataLoader(TensorDataset(*data(samples, 5)), 4, **options)


def end_of(trainer: lk.Trainer, net: Net) -> Any:
    rows = [{k: v for k, v in row.items() if k != "time"} for row in trainer.history]
    return net.seen, rows, [p.tolist() for p in net.parameters()], torch.rand(3).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit_train_batches": 3, "limit_val_batches": 0.5},
        {"overfit_batches": 2},
        {"val_check_interval": 2, "accumulate_grad_batches": 2},
    ],
    ids=["whole", "limits", "overfit", "intervals"],
)
def test_a_fit_has_the_bits_of_one_over_a_data_loader(quiet: Any, options: Any) -> None:
    found = []
    for make in (of_tensors, of_dataset):
        lk.seed_everything(1, verbose=False)
        net, trainer = Net(), quiet(max_epochs=3, **options)
        trainer.fit(net, make(22, shuffle=True), {"a": make(9), "b": make(6, shuffle=True)})
        found.append(end_of(trainer, net))
    assert found[0] == found[1]


def test_a_fit_has_the_bits_of_a_plain_loop(quiet: Any) -> None:
    lk.seed_everything(1, verbose=False)
    net = Net()
    trainer = quiet(max_epochs=3, fused=False)
    trainer.fit(net, of_tensors(22, shuffle=True), of_tensors(9))
    found = end_of(trainer, net)
    lk.seed_everything(1, verbose=False)
    net = Net()
    optimizer = net.configure_optimizers()
    train_loader, val_loader = of_tensors(22, shuffle=True), of_tensors(9)
    for _ in range(3):
        net.train()
        for i, batch in enumerate(train_loader):
            optimizer.zero_grad()
            net.training_step(batch, i).backward()
            optimizer.step()
        net.eval()
        for _ in val_loader:
            torch.rand(())
    assert found[0] == net.seen
    assert found[2:] == ([p.tolist() for p in net.parameters()], torch.rand(3).tolist())


@pytest.mark.parametrize("makes", [(of_tensors, of_dataset), (of_dataset, of_tensors)])
def test_a_run_goes_on_with_the_other_loader(quiet: Any, tmp_path: Any, makes: Any) -> None:
    """In the middle of an epoch: the order is the same, and so is its hash."""

    class Save(lk.Callback):
        def on_save_point(self, trainer: Any, task: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    lk.seed_everything(1, verbose=False)
    net, trainer = Net(), quiet(max_epochs=2, callbacks=Save())
    trainer.fit(net, makes[0](22, shuffle=True), makes[0](9))
    whole = end_of(trainer, net)
    for step in (2, 5, 6, 8):
        net, trainer = Net(), quiet(max_epochs=2)
        path = tmp_path / f"{step}.ckpt"
        trainer.fit(net, makes[1](22, shuffle=True), makes[1](9), ckpt_path=path)
        rest = end_of(trainer, net)
        assert rest[0] == whole[0][step:]
        assert rest[1:] == whole[1:]


def test_a_run_can_be_proved_to_go_on_exactly() -> None:
    assert_resumes_exactly(Net(), of_tensors(22, shuffle=True, generator=own()), of_tensors(9))


def test_another_order_is_noticed(quiet: Any, tmp_path: Any) -> None:
    class Save(lk.Callback):
        def on_save_point(self, trainer: Any, task: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    quiet(callbacks=Save()).fit(Net(), of_tensors(22, shuffle=True))
    for other, words in (
        (of_tensors(22), "gives other samples"),
        (of_tensors(27, shuffle=True), "has other data"),
        (lk.TensorLoader(*data(22, 5), batch_size=8, shuffle=True), "has 3 batches, it had 6"),
    ):
        with pytest.raises(DataError, match=words):
            quiet().fit(Net(), other, ckpt_path=tmp_path / "3.ckpt")


def test_a_part_of_a_data_set(quiet: Any) -> None:
    x, y = data(30, 5)
    part, _ = random_split(TensorDataset(x, y), [20, 10], generator=own())
    found = []
    for loader in (
        DataLoader(part, 4, shuffle=True),
        lk.TensorLoader(x[part.indices], y[part.indices], batch_size=4, shuffle=True),
    ):
        lk.seed_everything(1, verbose=False)
        net, trainer = Net(), quiet(max_epochs=2)
        trainer.fit(net, loader)
        found.append(end_of(trainer, net))
    assert found[0] == found[1]


def test_validation_over_the_training_tensors_is_noticed(quiet: Any, caplog: Any) -> None:
    x, y = data(20, 5)
    train_loader, val_loader = (lk.TensorLoader(x, y, batch_size=4) for _ in range(2))
    quiet().fit(Net(), train_loader, val_loader)
    assert "has the dataset of the training loader" in caplog.text


def test_a_batch_costs_a_fraction_of_a_data_loader() -> None:
    """Twentyfold at least, where a quiet machine measures sixty; side by side, by host time."""
    x, y = data(3200, 20)
    ratios = []
    tensors = lk.TensorLoader(x, y, batch_size=32, shuffle=True)
    dataset = DataLoader(TensorDataset(x, y), 32, shuffle=True)
    for _ in range(5):
        seconds = []
        for loader in (tensors, dataset):
            begun = time.thread_time()
            for _ in loader:
                pass
            seconds.append(time.thread_time() - begun)
        ratios.append(seconds[1] / seconds[0])
    assert max(ratios) > 20
