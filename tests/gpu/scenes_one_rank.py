"""What the one process of test_one_rank.py does under torchrun."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", (self.net(x) - y).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        plan = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


def loader(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def train(gpus, precision="32", strategy="ddp"):
    """Trains over the process group that there is; returns its backend, weights and numbers."""
    trainer = lk.Trainer(
        gpus=gpus,
        strategy=strategy,
        precision=precision,
        max_epochs=2,
        gradient_clip_val=1.0,
        seed=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Net()
    history = trainer.fit(task, loader(40), loader(12))
    backend = None
    if torch.distributed.is_initialized():
        backend = torch.distributed.get_backend_config()
    weights = {name: value.cpu() for name, value in task.state_dict().items()}
    return {
        "backend": backend,
        "strategy": type(trainer.session.strategy).__name__,
        "weights": weights,
        "val_loss": [row["val_loss"] for row in history],
        "steps": trainer.global_step,
        "moves": trainer.lr_schedulers[0].scheduler.last_epoch,
    }
