"""An autoencoder with its data in a module of their own, saved, tested and used for predictions."""

import functools

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Curves(L.LightningDataModule):
    """Points of sine curves that differ in phase and height."""

    def __init__(self, samples=90, batch_size=16):
        super().__init__()
        self.save_hyperparameters()
        self.phases = 0

    def prepare_data(self):
        torch.linspace(0, 1, 8)  # where others download

    def setup(self, stage=None):
        draw = torch.Generator().manual_seed(3)
        phase = torch.rand(self.hparams.samples, 1, generator=draw) * 6
        height = torch.rand(self.hparams.samples, 1, generator=draw)
        curves = height * torch.sin(torch.linspace(0, 6, 12) + phase)
        self.fit_part, self.val_part, self.test_part = curves.split([60, 20, 10])

    def loader(self, part, **options):
        return DataLoader(TensorDataset(part), batch_size=self.hparams.batch_size, **options)

    def train_dataloader(self):
        return self.loader(self.fit_part, shuffle=True)

    def val_dataloader(self):
        return self.loader(self.val_part)

    def test_dataloader(self):
        return self.loader(self.test_part)

    def predict_dataloader(self):
        return self.loader(self.test_part)

    def teardown(self, stage):
        self.phases += 1


class Autoencoder(L.LightningModule):
    """The encoder and the optimizer come from outside, as in configured projects."""

    def __init__(
        self,
        encoder: nn.Module,
        optimizer=functools.partial(torch.optim.Adam, lr=0.02),  # noqa: B008
        latent: int = 3,
        noise: float = 0.1,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"], logger=False)
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Linear(latent, 16), nn.Tanh(), nn.Linear(16, 12))
        self.dropout = nn.Dropout(0.1)
        self.example_input_array = torch.zeros(2, 12)
        self.losses = []

    def forward(self, x):
        return self.decoder(self.dropout(self.encoder(x)))

    def shared_step(self, batch):
        (x,) = batch
        noisy = x + self.hparams.noise * torch.randn_like(x) if self.training else x
        return nn.functional.mse_loss(self(noisy), x)

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.losses.append(loss.detach())
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, logger=True)
        return {"loss": loss, "size": len(batch[0])}

    def validation_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def test_step(self, batch, batch_idx):
        self.log_dict({"test_loss": self.shared_step(batch)}, on_epoch=True)

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": "val_loss",
                "interval": "epoch",
                "frequency": 1,
            },
        }


class Watch(Callback):
    """Reads what callbacks usually read."""

    def __init__(self):
        self.sizes, self.val_losses, self.rates = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert torch.equal(outputs["loss"], pl_module.losses[-1])
        self.sizes.append(outputs["size"])

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.val_losses.append(trainer.callback_metrics["val_loss"].clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def make_encoder():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def main(folder, **options):
    L.seed_everything(11, workers=True)
    data, task, watch = Curves(), Autoencoder(make_encoder()), Watch()
    checkpoint = ModelCheckpoint(
        dirpath=f"{folder}/checkpoints",
        filename="{epoch:02d}-{val_loss:.3f}",
        monitor="val_loss",
        mode="min",
        save_top_k=2,
        save_last=True,
        auto_insert_metric_name=False,
    )
    stopping = EarlyStopping(monitor="val_loss", patience=3, mode="min", min_delta=0.0)
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=1,
        callbacks=[watch, checkpoint, stopping, LearningRateMonitor(logging_interval="step")],
        logger=CSVLogger(save_dir=folder, name="curves"),
        default_root_dir=folder,
        log_every_n_steps=2,
        num_sanity_val_steps=2,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model=task, datamodule=data)
    best = trainer.checkpoint_callback.best_model_score
    tested = trainer.test(datamodule=data, ckpt_path="best", verbose=False, weights_only=False)
    predicted = torch.cat(trainer.predict(task, datamodule=data))
    loaded = Autoencoder.load_from_checkpoint(
        checkpoint.best_model_path,
        encoder=make_encoder(),
        optimizer=torch.optim.Adam,
        weights_only=False,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), loaded.parameters(), strict=True)
    )
    assert trainer.global_step == len(task.losses)
    return {
        "losses": task.losses,
        "val": [*watch.val_losses, best],
        "test": tested[0]["test_loss"],
        "sizes": watch.sizes,
        "rates": watch.rates,
        "epochs": trainer.current_epoch,
        "predicted": predicted,
    }
