"""Exact resume with every kind of loader: order, augmentation, workers, generators, states."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import lightkit as lk
from lightkit.data import planning
from lightkit.errors import DataError


class Noisy(Dataset):
    """Each sample is augmented from all three random states; ``loaded`` counts in this process."""

    def __init__(self, samples=22):
        self.samples = samples
        self.loaded = []

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = [*torch.rand(2).tolist(), random.random(), float(np.random.rand())]
        return torch.tensor(index), torch.tensor([float(index % 5), *noise])


class Stream(IterableDataset):
    def __init__(self, samples=22):
        self.samples = samples

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        data = Noisy(self.samples)
        return (data[i] for i in range(first, self.samples, step))


class StatefulStream(IterableDataset):
    """Knows where it is, and how often it was begun."""

    def __init__(self, samples=22):
        self.samples, self.at, self.loaded = samples, 0, 0

    def __iter__(self):
        data = Noisy(self.samples)
        while self.at < self.samples:
            self.at += 1
            self.loaded += 1
            yield data[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class PerIndex:
    """A sampler that draws from the global states for each index."""

    def __init__(self, samples=22):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        for _ in range(self.samples):
            yield int(torch.randint(self.samples, ())) // 2 + random.randrange(2)


class Unsized:
    """A batch sampler without a length."""

    def __iter__(self):
        for _ in range(6):
            yield torch.randint(22, (4,)).tolist()


class Buckets:
    """A batch sampler with ragged batches and a random state of its own."""

    def __init__(self):
        self.epochs = 0

    def __len__(self):
        return 6

    def __iter__(self):
        self.epochs += 1
        order = np.random.permutation(22).tolist()
        sizes = [2, 5, 3, 4, 6, 2] if self.epochs % 2 else [6, 5, 4, 3, 2, 2]
        for size in sizes:
            yield [order.pop() for _ in range(size)]

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class Owns:
    """A sampler with random states of its own, which it does not show."""

    def __init__(self, kind):
        self.random = {
            "python": lambda: random.Random(5),
            "pcg": lambda: np.random.default_rng(5),
            "mersenne": lambda: np.random.RandomState(5),
            "philox": lambda: np.random.Generator(np.random.Philox(5)),
            "torch": lambda: torch.Generator().manual_seed(5),
        }[kind]()

    def __len__(self):
        return 22

    def __iter__(self):
        for _ in range(22):
            if isinstance(self.random, torch.Generator):
                yield int(torch.randint(22, (), generator=self.random))
            else:
                yield int(self.random.random() * 22)


class OwnNoise(Noisy):
    def __init__(self):
        super().__init__()
        self.noise = np.random.default_rng(3)

    def __getitem__(self, index):
        index, x = super().__getitem__(index)
        return index, x * self.noise.random(dtype=np.float32)


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        index, x = batch
        self.seen.append(index.reshape(-1).tolist())
        return self.net(x).square().mean()

    def validation_step(self, batch, batch_idx):
        torch.rand(1)
        self.log("val_loss", self.net(batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Save(lk.Callback):
    """Writes a checkpoint at every save point."""

    def __init__(self, folder):
        self.folder, self.places = folder, []

    def on_save_point(self, trainer, task):
        path = self.folder / f"{len(self.places):02d}.ckpt"
        self.places.append(trainer.save_checkpoint(path))


def fit(folder, train, val=None, *, seed=3, ckpt_path=None, **options):
    lk.seed_everything(seed, verbose=False)
    net = Net()
    t = lk.Trainer(
        **{
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        | options
    )
    t.fit(net, train, val, ckpt_path=ckpt_path)
    drawn = torch.rand(2).tolist(), float(np.random.rand()), random.random()
    history = [{k: v for k, v in row.items() if k != "time"} for row in t.history]
    weights = [p.tolist() for p in net.parameters()]
    moments = [
        {k: v.tolist() for k, v in s.items()}
        for s in t.optimizers[0].state_dict()["state"].values()
    ]
    return net, (weights, moments, history, drawn)


def check(folder, make, every=1, **options):
    """Fits with the loaders that ``make`` gives, then again from each or each so-manieth place."""
    save = Save(folder)
    net, whole = fit(folder, *make(), callbacks=save, **options)
    for place in range(every - 1, len(save.places), every):
        loaders = make()
        rest, found = fit(folder, *loaders, seed=99, ckpt_path=save.places[place], **options)
        assert rest.seen == net.seen[len(net.seen) - len(rest.seen) :], place
        assert found == whole, place
    return net, loaders


def shuffled(**options):
    return DataLoader(Noisy(), 4, shuffle=True, **options)


def own(seed=5):
    return torch.Generator().manual_seed(seed)


def shared_generator():
    generator = own()
    val = DataLoader(Noisy(9), 4, shuffle=True, generator=generator)
    return shuffled(generator=generator), val


def tensors(samples, **options):
    index = torch.arange(samples)
    x = torch.rand(samples, 5, generator=own(samples))
    return lk.TensorLoader(index, x, **{"batch_size": 4, "shuffle": True} | options)


LOADERS = {
    "shuffled": lambda: (shuffled(),),
    "with a generator": lambda: (shuffled(generator=own()),),
    "a generator for two loaders": shared_generator,
    "a generator for two loaders, replacing": lambda: (
        DataLoader(
            Noisy(),
            4,
            sampler=RandomSampler(
                range(22), replacement=True, num_samples=50, generator=(g := own())
            ),
        ),
        DataLoader(Noisy(9), 4, shuffle=True, generator=g),
    ),
    "replacing": lambda: (
        DataLoader(Noisy(), 4, sampler=RandomSampler(range(22), replacement=True, num_samples=30)),
    ),
    "weighted": lambda: (
        DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, 23.0), 22)),
    ),
    "a subset": lambda: (
        DataLoader(Noisy(), 4, sampler=SubsetRandomSampler(range(4, 20)), drop_last=True),
    ),
    "a sampler that draws per index": lambda: (DataLoader(Noisy(), 4, sampler=PerIndex()),),
    "a batch sampler with a state": lambda: (DataLoader(Noisy(), batch_sampler=Buckets()),),
    "a batch sampler without a length": lambda: (DataLoader(Noisy(), batch_sampler=Unsized()),),
    "no batches": lambda: (DataLoader(Noisy(8), batch_size=None, shuffle=True),),
    "two passes of the loader": lambda: (
        DataLoader(Noisy(), 4, sampler=RandomSampler(range(22), num_samples=40, generator=own())),
    ),
    "tensors": lambda: (tensors(22), tensors(9)),
    "tensors with a generator": lambda: (
        tensors(22, generator=(g := own())),
        tensors(9, generator=g),
    ),
    "tensors in turn": lambda: (tensors(22, shuffle=False, drop_last=True),),
    "a stream": lambda: (DataLoader(Stream(), 4),),
    "a stream with a state": lambda: (DataLoader(StatefulStream(), 4),),
    "a list": lambda: ([(torch.arange(3), torch.full((3, 5), float(i))) for i in range(6)],),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_in_one_process(tmp_path, kind):
    def make():
        train, *val = LOADERS[kind]()
        return train, val[0] if val else DataLoader(Noisy(9), 4, shuffle=True)

    check(tmp_path, make, 2, val_check_interval=2)


@pytest.mark.parametrize(
    "kind",
    ["shuffled", "tensors", "a sampler that draws per index", "a stream with a state"],
)
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 5}], ids=["whole", "limited"])
def test_by_groups(tmp_path, kind, options):
    check(tmp_path, LOADERS[kind], accumulate_grad_batches=2, **options)


@pytest.mark.parametrize("kind", ["python", "pcg", "mersenne", "philox", "torch"])
def test_random_states_of_a_samplers_own(tmp_path, kind):
    check(tmp_path, lambda: (DataLoader(OwnNoise(), 4, sampler=Owns(kind)),), 4)


@pytest.mark.parametrize("kind", ["a sampler that draws per index", "a batch sampler with a state"])
@pytest.mark.parametrize("long", [False, True])
def test_samplers_that_are_not_drawn_whole(tmp_path, monkeypatch, kind, long):
    def make():
        (train,) = LOADERS[kind]()
        if long:
            return (train,)
        sampler = {"batch_sampler": train.batch_sampler}  # asked for more than the pass gives
        return (DataLoader(Noisy(), **sampler, num_workers=1, persistent_workers=True),)

    if long:
        monkeypatch.setattr(planning, "_LONG", 3)
        monkeypatch.setattr(planning, "_PIECE", 2)
    check(tmp_path, make, 1 + 2 * (not long), limit_train_batches=None if long else 4)


class Fails(lk.Callback):
    """Raises once: in a step, or in the loader in the middle of a batch."""

    def __init__(self, where, step):
        self.where, self.step = where, step

    def on_save_point(self, trainer, task):
        if self.where == "loader" and trainer.global_step == self.step:
            stream = trainer.train_dataloader.dataset
            stream.fails = stream.at + 2

    def on_before_backward(self, trainer, task, loss):
        if self.where == "step" and trainer.global_step == self.step:
            raise ValueError("once")


class FailingStream(StatefulStream):
    fails = -1

    def __iter__(self):
        for sample in super().__iter__():
            if self.at == self.fails:
                raise ValueError("once")
            yield sample


@pytest.mark.parametrize("loader", ["DataLoader", "StatefulDataLoader"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("where", "step"), [("step", 2), ("step", 5), ("loader", 1)])
def test_after_an_error_no_batch_is_lost(tmp_path, loader, accumulate, where, step):
    def make():
        if loader == "DataLoader":
            return DataLoader(FailingStream(), 4)
        module = pytest.importorskip("torchdata.stateful_dataloader")
        return module.StatefulDataLoader(FailingStream(), 4)

    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    net, _ = fit(tmp_path, make(), **options)
    with pytest.raises(ValueError, match="once"):
        fit(tmp_path, make(), callbacks=Fails(where, step), enable_checkpointing=True, **options)
    (path,) = tmp_path.rglob("last.ckpt")
    rest, _ = fit(tmp_path, make(), ckpt_path=path, **options)
    assert rest.seen == net.seen[step * accumulate :]


class Doubling(DataLoader):
    """Iterates in its own way."""

    def __iter__(self):
        for index, x in super().__iter__():
            yield index, 2 * x * torch.rand(())


class Ahead(DataLoader):
    """Looks one batch ahead."""

    def __iter__(self):
        batches = super().__iter__()
        ahead = next(batches)
        for batch in batches:
            yield ahead
            ahead = batch
        yield ahead


class Counter:
    """A loader of one's own, with a state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 7:
            self.at += 1
            yield torch.tensor([self.at]), torch.rand(1, 5)
        self.at = 0

    state_dict, load_state_dict = StatefulStream.state_dict, StatefulStream.load_state_dict


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Doubling, {}),
        (lambda _, *args, **options: Doubling(OwnNoise(), *args, **options), {}),
        (Ahead, {"num_workers": 1}),
        (Ahead, {"num_workers": 1, "persistent_workers": True}),
        (Counter, None),
    ],
)
def test_loaders_that_iterate_in_their_own_way(tmp_path, kind, options):
    def make():
        return (kind() if options is None else kind(Noisy(), 4, shuffle=True, **options),)

    check(tmp_path, make, 3 if options == {} else 8)


def test_a_loader_that_looks_ahead_in_this_process_is_told(tmp_path, caplog):
    save = Save(tmp_path)
    _, whole = fit(tmp_path, Ahead(Plain(), 4, shuffle=True), callbacks=save)
    _, rest = fit(tmp_path, Ahead(Plain(), 4, shuffle=True), seed=9, ckpt_path=save.places[7])
    assert rest == whole
    assert "looks 1 batch ahead" in caplog.text


class Plain(Noisy):
    def __getitem__(self, index):
        return torch.tensor(index), torch.full((5,), float(index))


def test_a_stateful_dataloader(tmp_path):
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        return (module.StatefulDataLoader(StatefulStream(), 4),)

    _, (loader,) = check(tmp_path, make, 4)
    assert loader.dataset.loaded < 22


def test_every_sample_once_and_none_is_loaded_that_is_skipped(tmp_path):
    net, (train,) = check(tmp_path, lambda: (shuffled(),), 4)
    for epoch in range(3):
        batches = net.seen[6 * epoch : 6 * epoch + 6]
        assert sorted(index for batch in batches for index in batch) == list(range(22))
    assert len(train.dataset.loaded) == 22 - 16  # it went on at batch 4 of the last epoch
    stream = DataLoader(StatefulStream(), 4)
    check(tmp_path, lambda: (stream,), 4, max_epochs=1)
    assert stream.dataset.loaded == 22 + 22 - 16


@pytest.mark.parametrize("how", ["workers", "persistent workers"])
@pytest.mark.parametrize("kind", ["shuffled", "buckets", "a stream"])
def test_with_workers(tmp_path, kind, how):
    options = {"num_workers": 2, "persistent_workers": how != "workers"}

    def make():
        val = DataLoader(Noisy(9), 4, shuffle=True, **options)
        if kind == "shuffled":
            return DataLoader(Noisy(), 4, shuffle=True, generator=own(), **options), val
        if kind == "buckets":
            return DataLoader(Noisy(), batch_sampler=Buckets(), **options), val
        return DataLoader(Stream(), 4, **options), val

    check(tmp_path, make, 5, val_check_interval=3, limit_train_batches=5)


def test_the_number_of_workers_changes_nothing(tmp_path):
    def result(workers, **options):
        train = DataLoader(Noisy(), 4, shuffle=True, num_workers=workers, **options)
        val = DataLoader(Noisy(9), 4, shuffle=True, num_workers=workers)
        return fit(tmp_path, train, val, max_epochs=2)[1]

    first = result(1)
    assert result(2) == first
    assert result(4, prefetch_factor=1) == first


def test_spawned_workers(tmp_path):
    def make(method="spawn"):
        data = TensorDataset(torch.arange(8), torch.ones(8, 5))
        options = {"num_workers": 1, "multiprocessing_context": method}
        return (DataLoader(data, 2, shuffle=True, collate_fn=noisy, **options),)

    _, forked = fit(tmp_path, *make("fork"), max_epochs=1)
    save = Save(tmp_path)
    assert fit(tmp_path, *make(), max_epochs=1, callbacks=save)[1] == forked
    assert fit(tmp_path, *make(), seed=99, max_epochs=1, ckpt_path=save.places[1])[1] == forked


def noisy(samples):
    index, x = default_collate(samples)
    return index, x * torch.rand(()) + random.random() * float(np.random.rand())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: DataLoader(Noisy(23), 4, shuffle=True), "has other data than it had"),
        (lambda: DataLoader(Subset(Noisy(), range(22)), 4, shuffle=True), "has other data"),
        (lambda: DataLoader(Noisy(), 4), "gives other samples than it gave"),
        (lambda: DataLoader(Noisy(), 4, num_workers=1), "gives other samples than it gave"),
        (lambda: DataLoader(Noisy(), 5, shuffle=True), "has 5 batches, it had 6"),
        (lambda: DataLoader(Stream(8), 4), "has other data"),
        (lambda: DataLoader(Noisy(), batch_sampler=Few()), "ended after 3 batches.*completed 4"),
        (lambda: DataLoader(Noisy(), batch_sampler=Few(), num_workers=1), "ended after 3 batches"),
    ],
)
def test_other_data_is_refused(tmp_path, caplog, other, message):
    save = Save(tmp_path)
    fit(tmp_path, shuffled(), max_epochs=1, callbacks=save)
    with pytest.raises(DataError, match=message):
        fit(tmp_path, other(), max_epochs=1, ckpt_path=save.places[3])
    # An epoch's end needs none of it, but what the samples are is told.
    fit(tmp_path, other(), max_epochs=2, ckpt_path=save.places[5])
    assert ("in another way" in caplog.text) == ("other data" in message)


class Few:
    def __len__(self):
        return 6

    def __iter__(self):
        return iter([[0, 1]] * 3)


@pytest.mark.parametrize("kind", ["shuffled", "with a generator", "replacing", "weighted"])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_draws_are_those_of_a_plain_loop(tmp_path, kind, workers):
    def loader():
        (found,) = LOADERS[kind]()
        found.num_workers, found.prefetch_factor = workers, 2 if workers else None
        return found

    class Look(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append((batch[0].tolist(), None if workers else batch[1].tolist(), draw()))

    def draw():
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    seen = []
    fit(tmp_path, loader(), max_epochs=2, callbacks=Look())
    lk.seed_everything(3, verbose=False)
    Net()
    plain, data = [], loader()
    dropout = nn.Dropout(0.3)
    for _ in range(2):
        for index, x in data:
            dropout(torch.ones(len(x), 4))
            plain.append((index.tolist(), None if workers else x.tolist(), draw()))
    assert seen == plain


def test_persistent_workers_end_with_the_fit_and_the_users_own_stay(tmp_path):
    train, val = (DataLoader(Noisy(n), 4, num_workers=1, persistent_workers=True) for n in (12, 6))
    next(iter(val))
    (mine,) = val._iterator._workers
    before = {p.pid for p in multiprocessing.active_children()}
    fit(tmp_path, train, val, max_epochs=2)
    assert {p.pid for p in multiprocessing.active_children()} == before
    assert mine.is_alive()
    assert train._iterator is None
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, train, val, max_epochs=2, callbacks=Broken())
    assert {p.pid for p in multiprocessing.active_children()} == before
    val._iterator._shutdown_workers()


@pytest.mark.parametrize("when", [2, None], ids=["within", "at the end"])
@pytest.mark.parametrize("kind", ["persistent workers", "a generator for two loaders", "a stream"])
def test_a_validation_that_a_signal_broke_off(tmp_path, kind, when):
    class Ends(lk.Callback):
        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx, loader_idx=0):
            if trainer.global_step >= 8 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def make():
        if kind != "persistent workers":
            train, *val = LOADERS[kind]()
            return train, val[0] if val else DataLoader(Noisy(9), 4, shuffle=True)
        options = {"num_workers": 1, "persistent_workers": True}
        return shuffled(**options), DataLoader(Noisy(9), 4, shuffle=True, **options)

    _, whole = fit(tmp_path, *make(), val_check_interval=when)
    save = Save(tmp_path)
    with pytest.raises(SystemExit):
        fit(tmp_path, *make(), callbacks=[Ends(), save], val_check_interval=when)
    _, rest = fit(tmp_path, *make(), seed=9, ckpt_path=save.places[-1], val_check_interval=when)
    assert rest == whole


class Broken(lk.Callback):
    def on_validation_end(self, trainer, task):
        if trainer.global_step:
            raise RuntimeError("broken")
