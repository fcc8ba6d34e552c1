"""What the processes of test_data.py do. Each function is called by all ranks, or by one process."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

import lightkit as lk
from lightkit.distributed import launched
from lightkit.errors import DataError
from tests.distributed.quiet import quiet_trainer


class Numbers(Dataset):
    def __init__(self, length=42):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Noisy(Numbers):
    def __getitem__(self, index):
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
        return torch.tensor([float(index)]), torch.tensor(noise)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randperm(42)[:, None].float())


class Task(lk.TaskModule):
    """Notes which samples it sees; ``seen`` has the batches of each epoch."""

    def __init__(self, stop=None):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.seen, self.validated, self.noise, self.stop = [], [], [], stop

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch, batch_idx):
        if isinstance(batch, (list, tuple)):
            batch, noise = batch
            self.noise.append(noise.tolist())
        if not self.seen:  # an epoch that goes on
            self.seen.append([])
        self.seen[-1].append(batch.reshape(-1).int().tolist())
        return self.net(batch / 42).pow(2).mean()

    def on_validation_epoch_start(self):
        self.validated.append([])

    def validation_step(self, batch, batch_idx):
        self.validated[-1].append(batch.reshape(-1).int().tolist())

    def on_save_point(self):
        if self.stop is not None and self.trainer.state.global_step == self.stop[0]:
            self.trainer.save_checkpoint(self.stop[1])
            self.trainer.stop("enough")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(**options):
    return quiet_trainer(**{"num_sanity_val_steps": 1, "max_epochs": 2} | options)


def loader(kind):
    data = Numbers()
    if kind == "weighted":
        return DataLoader(data, 2, sampler=WeightedRandomSampler([*range(42)], 42))
    if kind == "generator":
        generator = torch.Generator().manual_seed(1)
        return DataLoader(data, 2, shuffle=True, generator=generator)
    if kind == "workers":
        return DataLoader(Noisy(), 2, shuffle=True, num_workers=2, persistent_workers=True)
    if kind == "stream":
        return DataLoader(Stream(), 2)
    if kind == "tensors":
        x, generator = torch.arange(42.0)[:, None], torch.Generator().manual_seed(1)
        return lk.TensorLoader(x, x, batch_size=2, shuffle=True, generator=generator)
    if kind == "list":
        return [(torch.tensor([[2.0 * i], [2.0 * i + 1]]), torch.zeros(1)) for i in range(21)]
    return DataLoader(data, 2, shuffle=True)


def validation():
    return DataLoader(Numbers(21), 2, shuffle=True)


KINDS = ("shuffled", "weighted", "generator", "workers", "tensors", "stream", "list")


def fit(kind="shuffled", val=None, **options):
    """Trains and returns what was seen, and a number from the global state behind it all."""
    task = Task()
    trainer(**options).fit(task, loader(kind) if isinstance(kind, str) else kind, val)
    return {
        "train": task.seen,
        "val": task.validated,
        "noise": task.noise,
        "draw": torch.rand(()).item(),
    }


def fits():
    """Two epochs over loaders of each kind, with a shuffled validation behind each."""
    return {kind: fit(kind, validation()) for kind in KINDS}


def early():
    """Epochs that begin before the validation of the last one."""
    return fit("workers", validation(), prefetch="epoch", num_sanity_val_steps=0)


def error(call):
    try:
        call()
    except DataError as raised:
        return str(raised)
    return None


class Module:
    """Makes its loaders anew, and counts how often it prepares."""

    prepared = made = 0

    def prepare_data(self):
        self.prepared += 1

    def train_dataloader(self):
        self.made += 1
        return DataLoader(Numbers(16 + 4 * self.made), 2, shuffle=True)


def others():
    """Loaders that divide their data, mistakes, and the Trainer's arguments about data."""
    ranks = launched()
    rank, world = ranks.rank, ranks.world_size
    found = {}
    data = Numbers(24)
    sampler = DistributedSampler(data, world, rank)
    found["sampler"] = fit(DataLoader(data, 2, sampler=sampler))
    own = DataLoader(torch.utils.data.Subset(data, range(rank, 20 + 4 * rank, world)), 2)
    found["own"] = fit(own, use_distributed_sampler=False)
    endless = (torch.tensor([[float(rank)]]) for _ in range(5 + rank))
    found["unsized"] = fit(endless, use_distributed_sampler=False, max_epochs=1)
    found["overfit"] = fit("shuffled", overfit_batches=2, num_sanity_val_steps=0)
    found["overfit part"] = fit("shuffled", overfit_batches=0.5, num_sanity_val_steps=0)
    found["limit"] = fit("shuffled", limit_train_batches=2)
    found["fraction"] = fit(
        "shuffled", validation(), limit_train_batches=0.5, limit_val_batches=0.5
    )
    found["dev run"] = fit("shuffled", validation(), fast_dev_run=1)
    found["early"] = early()
    module, task = Module(), Task()
    trainer(reload_dataloaders_every_n_epochs=1).fit(task, datamodule=module)
    found["reload"] = {"train": task.seen, "prepared": module.prepared, "made": module.made}
    found["few"] = error(lambda: fit(DataLoader(Numbers(world), 2, shuffle=True)))
    torch.manual_seed(rank)
    parts = random_split(Numbers(24), [20, 4])
    found["split"] = error(lambda: fit(DataLoader(parts[0], 2)))
    torch.manual_seed(rank)
    parts = random_split(Numbers(24), [0, 24])
    found["split of validation"] = error(lambda: fit("shuffled", DataLoader(parts[1], 2)))
    sampler = WeightedRandomSampler([1.0] * 20 + [1.0 + rank] * 22, 42)
    found["weights"] = error(lambda: fit(DataLoader(Numbers(), 2, sampler=sampler)))
    sampler = DistributedSampler(data, world + 1, rank)
    found["sampler of others"] = error(lambda: fit(DataLoader(data, 2, sampler=sampler)))
    return found


def everything():
    return {"fits": fits(), "others": others()}


def begin(path, steps, kind="shuffled", accumulate=1):
    """Trains so many steps and saves."""
    task = Task((steps, Path(path)))
    trainer(accumulate_grad_batches=accumulate, max_epochs=1).fit(task, loader(kind), validation())
    return task.seen


def go_on(path, kind="shuffled", accumulate=1, then=None):
    """Goes on from there to the end of the second epoch, or for so many steps and saves."""
    task = Task(None if then is None else (then[0], Path(then[1])))
    run = trainer(accumulate_grad_batches=accumulate)
    run.fit(task, loader(kind), validation(), ckpt_path=path)
    return {"train": task.seen, "val": task.validated, "steps": run.global_step}


def chain(moves):
    """Calls functions of this file one after the other."""
    return [globals()[name](*arguments) for name, arguments in moves]
