"""Epochs whose workers begin before the validation of the last one (`prefetch="epoch"`)."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightkit as lk
from tests.benchmarks.pairs import Pair

BASE, OTHER = "by default", 'prefetch="epoch"'


class Slow(Dataset[Any]):
    """Samples that take 2 ms each, as if they came from a disk."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return torch.full((4,), index / 64)


class Net(lk.TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.01)  # as if a GPU were at work

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def pairs(quick: bool) -> Iterator[Pair]:
    """Whole fits, the start of the workers included: epochs of 8 batches and a validation of 50 ms."""
    epochs = 3 if quick else 6
    for workers in (1, 2):
        ways = [_fits(workers, wish) for wish in (None, "epoch")]
        what = f"{workers} worker{'s' * (workers > 1)}, batches of 16 ms, 50 ms of validation"
        yield Pair(what, *ways, unit="epoch", clock="wall", times=epochs)


def _fits(workers: int, wish: Any) -> Callable[[int], None]:
    folder = tempfile.mkdtemp()
    logging.getLogger("lightkit").setLevel(logging.ERROR)

    def fit(epochs: int) -> None:
        loader = DataLoader(Slow(), 8, shuffle=True, num_workers=workers, persistent_workers=True)
        trainer = lk.Trainer(
            max_epochs=epochs,
            prefetch=wish,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Net(), loader, lk.TensorLoader(torch.zeros(40, 4), batch_size=8))

    return fit
