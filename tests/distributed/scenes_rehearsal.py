"""Fits of several ranks that are rehearsed."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Stuck(Net):
    """One that can be copied on the first rank alone."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_fit_start(self):
        self.events.clear()

    def on_sanity_check_start(self):
        self.events.append("sanity")


def data(samples: int) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True))


def _fit(task: Net, folder: str, rehearse: bool) -> None:
    lk.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(5)
    trainer = lk.Trainer(
        max_epochs=2,
        rehearse=rehearse,
        default_root_dir=folder,
        logger=lk.loggers.CSVLogger(),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(data(64), 4, shuffle=True, generator=generator)
    trainer.fit(task, train, DataLoader(data(20), 4))


def fitting(folder: str) -> list:
    """Returns the losses and the last weights of a fit with and without, and what was said."""
    said: list[str] = []
    log = logging.getLogger("lightkit")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    ends = []
    for rehearse in (True, False):
        torch.manual_seed(0)
        task = Net()
        _fit(task, str(Path(folder) / f"{rehearse}"), rehearse)
        ends.append([task.losses, [p.flatten().tolist() for p in task.parameters()]])
    return [*ends, "".join(line for line in said if "rehearsed" in line), _not_copied(folder)]


def _not_copied(folder: str) -> list[str]:
    """Returns what came where one rank cannot copy its task."""
    task = Stuck()
    if os.environ["RANK"] == "1":
        task.lock = threading.Lock()
    _fit(task, folder, rehearse=True)
    return task.events
