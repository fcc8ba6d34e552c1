"""Batches that come to a GPU beside the steps; nothing where there is no GPU."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from tests.benchmarks.pairs import Pair

BASE, OTHER = "prefetch=False", "ours"
STEPS = 60


class Net(lk.TaskModule):
    """Its step takes as long as ``work`` products of matrices of 4096 x 4096."""

    def __init__(self, work: int) -> None:
        super().__init__()
        self.work = work
        self.net = nn.Linear(1024, 1)
        self.register_buffer("matrix", torch.randn(4096, 4096) / 64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        busy: Any = self.matrix
        for _ in range(self.work):
            busy = busy @ self.matrix
        return self.net(batch[0]).square().mean() + busy[0, 0] * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def pairs(quick: bool) -> Iterator[Pair]:
    """Fits over batches of 4 and 64 MB with steps of about 0.1, 1 and 10 ms."""
    if not torch.cuda.is_available():
        return
    logging.getLogger("lightkit").setLevel(logging.ERROR)
    for size in (1024, 16_384):
        x = torch.randn(size * 8, 1024)
        for work in (0,) if quick else (0, 1, 10):
            made = {
                "DataLoader, 2 workers": lambda x=x, size=size: DataLoader(
                    TensorDataset(x), size, num_workers=2, persistent_workers=True, pin_memory=True
                ),
                "pinned TensorLoader": lambda x=x, size=size: lk.TensorLoader(
                    x, batch_size=size, pin_memory=True
                ),
            }
            for name, make in made.items():
                ways = [_fits(make(), work, wish) for wish in (False, None)]
                what = f"{name}, {size * 4 // 1024} MB, {work} products"
                yield Pair(what, *ways, unit="step", clock="wall", times=STEPS)
            there = lk.TensorLoader(x, batch_size=size, device="cuda")
            ways = [_fits(made["pinned TensorLoader"](), work, False), _fits(there, work, None)]
            what = f"TensorLoader on the device, {size * 4 // 1024} MB, {work} products"
            yield Pair(what, *ways, unit="step", clock="wall", times=STEPS)


def _fits(loader: Any, work: int, wish: Any) -> Callable[[int], None]:
    folder = tempfile.mkdtemp()

    def fit(steps: int) -> None:
        trainer = lk.Trainer(
            max_steps=steps,
            prefetch=wish,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Net(work), loader)
        torch.cuda.synchronize()

    return fit
