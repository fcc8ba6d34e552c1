"""A hundred thousand steps of a tiny run, and what they leave in memory; prints JSON lines."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import threading

import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.callbacks import LearningRateMonitor, ModelCheckpoint
from lightkit.checkpoint import settle
from lightkit.loggers import CSVLogger, JSONLLogger, TensorBoardLogger


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.accuracy = torchmetrics.classification.BinaryAccuracy()
        self.val_accuracy = torchmetrics.classification.BinaryAccuracy()

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        self.accuracy(scores.argmax(1), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("spread", scores.std())
        return nn.functional.cross_entropy(scores, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        self.val_accuracy(scores.argmax(1), y)
        self.log("val_accuracy", self.val_accuracy)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.001)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000, 0.99)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Measure(lk.Callback):
    """Prints memory and open files now and then."""

    def __init__(self, every: int):
        self.every = every

    def on_save_point(self, trainer, task):
        if trainer.global_step % self.every == 1:  # not where anything else falls due
            settle()  # a file that is being written in the background is open for a moment
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * resource.getpagesize()
            found = {
                "step": trainer.global_step,
                "bytes": resident,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
            }
            print("measured", json.dumps(found), flush=True)


def main(folder: str, steps: int, async_save: bool) -> None:
    torch.set_num_threads(1)
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, (x.sum(1) > 0).long())
    trainer = lk.Trainer(
        seed=0,
        max_epochs=-1,
        max_steps=steps,
        val_check_interval=2500,
        log_every_n_steps=50,
        callbacks=[
            LearningRateMonitor("step"),
            ModelCheckpoint(
                every_n_train_steps=2000,
                monitor="val_loss",
                **({"async_save": True} if async_save else {}),
            ),
            Measure(20_000),
        ],
        logger=[TensorBoardLogger(), JSONLLogger(), CSVLogger()],
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    val = DataLoader(TensorDataset(*data[:400]), 4)
    trainer.fit(Net(), DataLoader(data, 4, shuffle=True), val)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "async")
