"""A run with everything in it, which kills itself where it is told to.

One life is ``main(Settings(...))``; the same settings, but for the kill, are given to every life of
a run, as a person starts the same command again. What a run leaves behind is compared by
``harness.py``. The process needs no pytest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)

import lightkit as lk
from lightkit import cli
from lightkit.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightkit.loggers import CSVLogger, JSONLLogger, TensorBoardLogger
from tests.faults.killer import Early, Killer, KillParent, Late

SAMPLES, BATCH = 51, 4


@dataclasses.dataclass
class Settings:
    """What one life is told.

    Attributes:
        root: Where everything goes.
        kill: Where the process kills itself, see `Killer`; None for a run that is left alone.
        order: How training samples are chosen: a key of `_ORDERS`.
        width: Of the hidden layer.
        ballast: Parameters that make a checkpoint large (12 bytes each).
        patience: Of EarlyStopping, in validations.
        workers: Processes of each loader.
        persistent: Whether they live as long as the loader.
        method: How they are started; None for the default.
        every: Steps between saves.
        ckpt_path: What ``fit`` is told to continue.
        full: Files may have "size" bytes only once "after" saves were made, and before the step
            "until"; None for a disk that is large enough.
        saving: Further arguments of ModelCheckpoint; None for what the Trainer does by itself.
        second: Arguments of a second one in the same folder; None for no second one.
        options: Further arguments of the Trainer.
    """

    root: str
    kill: dict[str, Any] | None = None
    order: str = "shuffle"
    width: int = 12
    ballast: int = 0
    patience: int = 5
    workers: int = 0
    persistent: bool = False
    method: str | None = None
    every: int = 2
    ckpt_path: str | None = "auto"
    full: dict[str, int] | None = None
    saving: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    second: dict[str, Any] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class Samples(Dataset):
    """Numbers with noise of all three generators, which a sample draws when it is loaded."""

    def __init__(self, count: int, seed: int):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.rand(6) + float(np.random.rand()) + random.random()
        return self.x[index] + 0.1 * noise, self.y[index], index


class DrawingSampler(Sampler):
    """Draws from the global state before each index."""

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        left = list(range(SAMPLES))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class DrawingBatches(Sampler):
    """Batches whose order is drawn from the generators of Python and numpy."""

    def __len__(self):
        return -(-SAMPLES // BATCH)

    def __iter__(self):
        order = list(np.random.permutation(SAMPLES).tolist())
        batches = [order[i : i + BATCH] for i in range(0, SAMPLES, BATCH)]
        tail = batches.pop()  # the short one stays the last
        random.shuffle(batches)
        yield from [*batches, tail]


class Stream(IterableDataset):
    """Samples in an order of its own, without a length."""

    def __iter__(self):
        samples = Samples(SAMPLES, 1)
        worker = get_worker_info()
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).tolist()
        if worker is not None:  # shares of which none leaves a batch of one
            order = order[28:] if worker.id else order[:28]
        for index in order:
            yield samples[index]


class StatefulStream(Stream):
    """Knows where it is, and is set there without reading."""

    at = 0

    def __iter__(self):
        samples = Samples(SAMPLES, 1)
        while self.at < SAMPLES:
            self.at += 1
            yield samples[(7 * self.at) % SAMPLES]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


_ORDERS = {
    "shuffle": lambda: {"batch_size": BATCH, "shuffle": True},
    "weighted": lambda: {
        "batch_size": BATCH,
        "sampler": WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), SAMPLES),
    },
    "sampler": lambda: {"batch_size": BATCH, "sampler": DrawingSampler()},
    "batches": lambda: {"batch_sampler": DrawingBatches()},
    "batch sampler": lambda: {"batch_sampler": BatchSampler(DrawingSampler(), BATCH, False)},
    "generator": lambda: {
        "batch_size": BATCH,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(11),
    },
    "stream": lambda: {"dataset": Stream(), "batch_size": BATCH},
    "stateful stream": lambda: {"dataset": StatefulStream(), "batch_size": BATCH},
}


class Net(lk.TaskModule):
    """Dropout, batch norm, a metric object, two schedules."""

    def __init__(self, width: int = 12, ballast: int = 0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, 2),
        )
        self.ballast = nn.Parameter(torch.ones(ballast)) if ballast else None
        self.accuracy = torchmetrics.classification.BinaryAccuracy()
        self.val_accuracy = torchmetrics.classification.BinaryAccuracy()

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        scores = self.net(x)
        self.accuracy(scores.argmax(1), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        if batch_idx >= 6:  # begins in the middle of an epoch
            self.log("spread", scores.std(), on_step=True)
        loss = nn.functional.cross_entropy(scores, y)
        return loss if self.ballast is None else loss + self.ballast.square().mean()

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        scores = self.net(x)
        self.val_accuracy(scores.argmax(1), y)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", nn.functional.cross_entropy(scores, y), on_step=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.03)
        schedules = [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
        ]
        return {"optimizer": optimizer, "lr_scheduler": schedules, "monitor": "val_loss"}


def live(arguments: dict[str, Any]) -> None:
    """Calls `main` with plain arguments, as a nursery and a command line have them."""
    main(Settings(**arguments))


def command(arguments: dict[str, Any]) -> None:
    """Does what the command ``lightkit`` does in a folder."""
    os.chdir(arguments["folder"])
    raise SystemExit(cli.main(arguments["words"]))


class DieOnce(lk.Callback):
    """Ends the first process that comes to a batch; for runs from configuration files.

    Args:
        mark: A file that says that this was done.
        batches: After so many batches of the process.
    """

    def __init__(self, mark: str, batches: int):
        self._killer = Killer({"place": "batch_end", "n": batches, "mark": mark})

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self._killer.at("batch_end")


class FullDisk(lk.Callback):
    """Makes files that are larger than a number of bytes impossible for some steps."""

    order = 99  # before the checkpoint callback

    def __init__(self, after: int, size: int, until: int = 1000):
        self.after, self.size, self.until = after, size, until

    def on_save_point(self, trainer, task):
        unlimited = resource.RLIM_INFINITY
        steps = trainer.global_step
        size = self.size if 2 * self.after < steps < self.until else unlimited
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))


def main(settings: Settings) -> None:
    """Lives once: trains until the end or until it is killed, then writes ``dump.pt``."""
    torch.set_num_threads(1)
    root = Path(settings.root)
    killer = Killer(settings.kill)
    if settings.kill is not None:
        killer.watch_files(settings.root)
    trainer, task, loaders = build(settings, killer)
    trainer.fit(task, *loaders, ckpt_path=settings.ckpt_path)
    found = dump(trainer, task)
    found["events"] = killer.seen
    found["generators"] = [g.get_state() for loader in loaders if (g := loader.generator)]
    torch.save(found, root / "dump.pt")


def build(settings: Settings, killer: Killer) -> tuple[lk.Trainer, Net, list[DataLoader]]:
    """Returns what is trained with what."""
    root = Path(settings.root)
    root.mkdir(parents=True, exist_ok=True)
    saving = {
        "every_n_train_steps": settings.every,
        "monitor": "val_loss",
        "save_top_k": 2,
        "every_n_epochs": 1,
    }
    trainer = lk.Trainer(
        **{
            "seed": 3,
            "max_epochs": 4,
            "accumulate_grad_batches": 2,
            "val_check_interval": 5,
            "log_every_n_steps": 3,
            "callbacks": [
                Early(killer, root / "seen.jsonl"),
                Late(killer),
                EarlyStopping("val_loss", patience=settings.patience, min_delta=10.0),
                LearningRateMonitor("step"),
                *([] if settings.full is None else [FullDisk(**settings.full)]),
                *([] if settings.saving is None else [ModelCheckpoint(**saving | settings.saving)]),
                *([] if settings.second is None else [ModelCheckpoint(**settings.second)]),
            ],
            "logger": [TensorBoardLogger(), JSONLLogger(), CSVLogger()],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root / "runs",
            **settings.options,
        }
    )
    shared: dict[str, Any] = {"num_workers": settings.workers}
    if settings.workers:
        shared["persistent_workers"] = settings.persistent
        shared["multiprocessing_context"] = settings.method
        if killer.plan is not None and killer.plan["place"] == "worker_start":
            shared["worker_init_fn"] = KillParent(Path(killer.plan["children"]))
    given = {"dataset": Samples(SAMPLES, 1), **_ORDERS[settings.order]()}
    train = DataLoader(**given, **shared)
    val = DataLoader(Samples(14, 2), BATCH, shuffle=True, **shared)
    return trainer, Net(settings.width, settings.ballast), [train, val]


def dump(trainer: lk.Trainer, task: lk.TaskModule) -> dict[str, Any]:
    """Returns all that a finished run holds."""
    state = trainer.state.state_dict()
    state.pop("seconds")
    folder = Path(trainer.run_dir) / "checkpoints"
    files = {p.name: torch.load(p, weights_only=True, mmap=True) for p in sorted(folder.iterdir())}
    return {
        "run_dir": str(trainer.run_dir),
        "state": state,
        "model": task.state_dict(),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [entry.scheduler.state_dict() for entry in trainer.lr_schedulers],
        "history": [{k: v for k, v in row.items() if k != "time"} for row in trainer.history],
        "metrics": {k: float(v).hex() for k, v in trainer.callback_metrics.items()},
        "callbacks": {
            f"{i} {c.state_key}": c.state_dict() for i, c in enumerate(trainer.callbacks)
        },
        "rng": {
            "torch": torch.get_rng_state(),
            "numpy": repr(np.random.get_state(legacy=False)),
            "python": repr(random.getstate()),
        },
        "checkpoints": {name: saved["loop"]["global_step"] for name, saved in files.items()},
    }


if __name__ == "__main__":
    live(json.loads(sys.argv[1]))
