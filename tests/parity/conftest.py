"""A task and a loader that a hand-written loop and the Trainer train alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    """A small network with dropout and batch norm; returns its loss, keeps all losses."""

    def __init__(self, make_optimizer=None, make_scheduler=None, interval="epoch"):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )
        self.losses = []
        self.val_losses = []
        self.make_optimizer = make_optimizer or adam
        self.make_scheduler, self.interval = make_scheduler, interval

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.val_losses.append(loss.clone())
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def tensors(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


def loader(count=83, batch_size=8, workers=0, seed=3, **options):
    options.setdefault("shuffle", True)
    return DataLoader(tensors(count, seed), batch_size=batch_size, num_workers=workers, **options)


@pytest.fixture
def fit(tmp_path):
    """Trains a fresh `Net` by the Trainer from ``torch.manual_seed(7)`` and returns it."""

    def run(net_options=None, train=None, val=None, **options):
        torch.manual_seed(7)
        task = Net(**(net_options or {}))
        settings = {
            "max_epochs": 3,
            "fused": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        lk.Trainer(**{**settings, **options}).fit(task, train or loader(), val)
        return task

    return run


def assert_same(task, reference):
    """Asserts equal losses and weights, bit for bit."""
    assert len(task.losses) == len(reference.losses)
    for i, (a, b) in enumerate(zip(task.losses, reference.losses, strict=True)):
        assert torch.equal(a, b), f"loss {i}: {a.item()!r} and {b.item()!r}"
    for a, b in zip(task.val_losses, reference.val_losses, strict=True):
        assert torch.equal(a, b)
    for (name, a), b in zip(
        task.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
