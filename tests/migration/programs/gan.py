"""Two networks against each other, in manual optimization."""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset


class Generator(nn.Module):
    def __init__(self, latent, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(latent, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, x):
        return self.net(x)


class GAN(L.LightningModule):
    def __init__(self, latent=4, width=16, lr=0.01, b1=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(latent, width)
        self.discriminator = Discriminator(width)
        self.register_buffer("fixed", torch.randn(6, latent))
        self.example_input_array = torch.zeros(2, latent)
        self.losses = []

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, scores, real):
        target = torch.ones_like(scores) if real else torch.zeros_like(scores)
        return binary_cross_entropy_with_logits(scores, target)

    def training_step(self, batch, batch_idx):
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(real), self.hparams.latent, device=self.device).type_as(real)

        self.toggle_optimizer(optimizer_g)
        assert not any(p.requires_grad for p in self.discriminator.parameters())
        g_loss = self.adversarial_loss(self.discriminator(self(z)), real=True)
        optimizer_g.zero_grad()
        self.manual_backward(g_loss)
        self.clip_gradients(optimizer_g, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        on_real = self.adversarial_loss(self.discriminator(real), real=True)
        on_fake = self.adversarial_loss(self.discriminator(self(z).detach()), real=False)
        d_loss = (on_real + on_fake) / 2
        optimizer_d.zero_grad()
        self.manual_backward(d_loss)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)

        self.log_dict({"g_loss": g_loss, "d_loss": d_loss}, prog_bar=True)
        self.losses += [g_loss.detach(), d_loss.detach()]
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self):
        adam = {"lr": self.hparams.lr, "betas": (self.hparams.b1, 0.999)}
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), **adam),
            torch.optim.Adam(self.discriminator.parameters(), **adam),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]

    def on_train_epoch_end(self):
        self.eval()
        with torch.no_grad():
            points = self(self.fixed)
        self.train()
        self.logger.experiment.add_histogram("points", points, self.current_epoch)
        self.losses.append(points.square().mean())


def main(folder, **options):
    L.seed_everything(5)
    angle = torch.rand(64) * 6.28
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    task = GAN()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(save_dir=folder, name="gan", version=0, default_hp_metric=False),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(task, DataLoader(TensorDataset(ring), 16, shuffle=True))
    return {
        "losses": task.losses,
        "rates": [o.param_groups[0]["lr"] for o in trainer.optimizers],
        "weights": [p.detach() for p in task.parameters()],
    }
