"""A backbone that is frozen at first and learns later, at a lower rate."""

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def images(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=draw)
    return TensorDataset(x, (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long())


def pretrained():
    """Stands for a network that was trained elsewhere."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


class UnfreezeLate(BaseFinetuning):
    def __init__(self, epoch=1):
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(
                modules=pl_module.backbone, optimizer=optimizer, lr=0.01, train_bn=True
            )


class Classifier(L.LightningModule):
    def __init__(self, lr=0.05, momentum=0.9, classes=2, warmup=4):
        super().__init__()
        self.save_hyperparameters("lr", "momentum", "warmup")
        self.backbone, self.head = pretrained(), nn.Linear(16, classes)
        self.losses, self.trained = [], []

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        self.trained.append(sum(p.requires_grad for p in self.parameters()))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        accuracy = (scores.argmax(1) == y).float().mean()
        self.log("val_acc", accuracy, prog_bar=True)
        self.log("val_loss", nn.functional.cross_entropy(scores, y))

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < self.hparams.warmup:
            share = min(1.0, (self.trainer.global_step + 1) / self.hparams.warmup)
            optimizer.param_groups[0]["lr"] = share * self.hparams.lr

    def configure_optimizers(self):
        learning = filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.SGD(learning, lr=self.hparams.lr, momentum=self.hparams.momentum)

    def train_dataloader(self):
        return DataLoader(images(48, 1), 8, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(images(20, 2), 8)

    def test_dataloader(self):
        return DataLoader(images(20, 3), 8)


def main(folder, **options):
    L.seed_everything(seed=4)
    task = Classifier()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=UnfreezeLate(),
        logger=False,
        default_root_dir=folder,
        limit_train_batches=5,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task)
    tested = trainer.test(task, verbose=False)
    return {
        "losses": task.losses,
        "trained": task.trained,
        "val": [trainer.callback_metrics[name] for name in ("val_loss", "val_acc")],
        "test": [tested[0]["val_loss"], tested[0]["val_acc"]],
        "groups": len(trainer.optimizers[0].param_groups),
        "weights": [p.detach() for p in task.parameters()],
    }
