"""Lightning: the Trainer, with the same task as in ``ours.py``."""

from __future__ import annotations

import lightning as L
from torchmetrics.classification import MulticlassAccuracy

from tests.benchmarks.works import CLASSES, Job, loss_of


class Task(L.LightningModule):
    def __init__(self, job: Job):
        super().__init__()
        self.net, self.job = job.net, job

    def training_step(self, batch, batch_idx):
        x, y = batch
        return loss_of(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss_of(self.net(x), y)

    def configure_optimizers(self):
        optimizer = self.job.optimizer(self.net.parameters())
        schedule = self.job.schedule(optimizer)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Logging(Task):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = loss_of(self.net(x), y)
        self.log("train_loss", loss)
        return loss


class Newcomer(Task):
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = loss_of(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", loss_of(self.net(x), y), prog_bar=True)


class Full(Task):
    def __init__(self, job: Job):
        super().__init__(job)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        loss = loss_of(scores, y)
        self.log("train_loss", loss, prog_bar=True)
        self.accuracy.update(scores, y)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        self.log("val_loss", loss_of(scores, y))
        self.val_accuracy.update(scores, y)
        self.log("val_accuracy", self.val_accuracy)


TASKS = {"bare": Task, "log": Logging, "newcomer": Newcomer, "full": Full}


def train(job: Job) -> None:
    options = {}
    if job.level == "bare" and job.val is None:
        options = {"barebones": True}
    elif job.level in ("bare", "log"):
        options = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
    trainer = L.Trainer(
        max_epochs=job.epochs, accelerator="cpu", default_root_dir=job.folder, **options
    )
    trainer.fit(TASKS[job.level](job), job.train, job.val)
