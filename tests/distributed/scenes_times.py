"""What the processes of test_times.py do. Each function is called by all ranks."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import lightkit as lk
from lightkit import advice
from tests.distributed.quiet import quiet_trainer
from tests.small import Net, loader


class Slow(Dataset):
    """Each sample takes a while."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        time.sleep(0.005)
        return torch.ones(4), torch.ones(1)


def profiled(folder: str):
    """A fit with hints, a table and a trace of each rank."""
    told = []

    class Note(logging.Handler):
        def emit(self, record):
            told.append(record.hint)

    logging.getLogger("lightkit.hints").addHandler(Note())
    advice._LEAST = 0.01
    seen = []

    class See(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            times = trainer.epoch_times
            seen.append((trainer.samples_per_second, sum(times.values()) - times["validation"]))

    trace = lk.callbacks.TraceProfiler(steps=(1, 3), all_ranks=True)
    trainer = quiet_trainer(
        max_epochs=2,
        default_root_dir=Path(folder) / "runs",
        profiler="simple",
        callbacks=[trace, See()],
    )
    trainer.fit(Net(), DataLoader(Slow(), 2))
    folder = trainer.run_dir
    return {
        "told": told,
        "samples": [speed * seconds for speed, seconds in seen],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*profile*/*")),
        "table": (folder / "profile.txt").exists(),
    }


class Dead(Net):
    """One layer without a gradient other than zero, and one that is not used."""

    def __init__(self, unused=False):
        super().__init__()
        self.body = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(self.body.bias, -100.0)
        if unused:
            self.extra = torch.nn.Linear(2, 2)

    def forward(self, x):
        return super().forward(torch.relu(self.body(x)))


def alarmed():
    """Fits of tasks that learn nothing, and what is told of each."""
    told = []

    class Note(logging.Handler):
        def emit(self, record):
            told.append(record.hint)

    logging.getLogger("lightkit.hints").addHandler(Note())
    found = {}
    for strategy in ("ddp", "ddp_find_unused_parameters_true", "fsdp"):
        told.clear()
        task = Dead(unused=strategy != "ddp")
        quiet_trainer(strategy=strategy, max_epochs=3).fit(task, loader(48))
        found[strategy] = list(told)
    return found
