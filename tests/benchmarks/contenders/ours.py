"""lightkit.

The variant "plain" gives up fused optimizers, and so has the bits of the loop by hand. The variant
"choices" takes what lightkit has to offer for the job: a loader of tensors, the layout of images.
"""

from __future__ import annotations

from torch.utils.data import DataLoader

import lightkit as lk
from tests.benchmarks.works import CLASSES, Job, loss_of


class Task(lk.TaskModule):
    def __init__(self, job: Job):
        super().__init__()
        self.net, self.job = job.net, job

    def training_step(self, batch, batch_idx):
        x, y = batch
        return loss_of(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return loss_of(self.net(x), y)

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


class Full(Task):
    def __init__(self, job: Job):
        from torchmetrics.classification import MulticlassAccuracy

        super().__init__(job)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        loss = loss_of(scores, y)
        self.log("train_loss", loss, prog_bar=True)
        self.accuracy.update(scores, y)
        self.log("train_accuracy", self.accuracy)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        self.log("val_loss", loss_of(scores, y))
        self.val_accuracy.update(scores, y)
        self.log("val_accuracy", self.val_accuracy)


#: Everything off that is more than the training.
BARE = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def train(job: Job, variant: str = "") -> None:
    task = {"log": Logging, "full": Full}.get(job.level, Task)(job)
    options = BARE if job.level in ("bare", "log") else {}
    train = job.train
    if variant == "plain":
        options = options | {"fused": False}
    elif variant == "choices":
        options = options | {"memory_format": "channels_last"}
        train = tensor_loader(train)
    trainer = lk.Trainer(
        max_epochs=job.epochs, accelerator="cpu", default_root_dir=job.folder, **options
    )
    trainer.fit(task, train, job.val)


def tensor_loader(loader: DataLoader) -> lk.TensorLoader:
    """Returns what gives the same batches in the same order as a loader over a part of tensors."""
    part = loader.dataset
    tensors = [tensor[part.indices] for tensor in part.dataset.tensors]
    return lk.TensorLoader(*tensors, batch_size=loader.batch_size, shuffle=True)
