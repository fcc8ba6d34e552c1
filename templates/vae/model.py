"""The task: a variational autoencoder, which learns to draw images like those that it saw."""

import torch
from torch import Tensor, nn

import lightkit as lk


class VAE(lk.TaskModule):
    """Encodes images of shape (batch, 1, size, size) as a few normal numbers, and decodes them.

    The loss is that of Kingma and Welling (2013), "Auto-Encoding Variational Bayes": what it costs
    to say the pixels of an image when its code is known (reconstruction), and to say the code
    (kl), in nats per image and up to a constant. It is logged with its two parts.

    Args:
        size: Height and width of the images.
        latent: Numbers in a code.
        hidden: Width of the hidden layers.
        noise: Standard deviation of the pixels around what is decoded. With less of it images
            must come out more exactly, and codes cost more.
        lr: Highest learning rate of the one-cycle schedule.
    """

    def __init__(
        self,
        size: int = 8,
        latent: int = 8,
        hidden: int = 256,
        noise: float = 0.2,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.noise = noise
        self.lr = lr
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(size * size, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * latent),  # mean and logarithm of the variance
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, size * size),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, size, size)),
        )
        # The same codes are drawn in each epoch, to see how their images become better.
        self.register_buffer("shown", torch.randn(64, latent))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the means and the logarithms of the variances, of shape (batch, latent) each."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images as they come out again, without chance."""
        mean, _ = self.encode(images)
        return self.decoder(mean)

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encode(images)
        # Chance comes in from beside, so that gradients go through mean and variance.
        codes = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        errors = (self.decoder(codes) - images).square().sum()
        reconstruction = errors / (2 * self.noise**2) / len(images)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(images)
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    # What is in the mapping is logged: train_loss, train_reconstruction, train_kl, val_loss, ...

    def training_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(images)

    def validation_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(images)

    def test_step(self, images: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(images)

    def predict_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return self(images)

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.logger, lk.loggers.TensorBoardLogger):
            with torch.no_grad():
                images = self.decoder(self.shown)
            self.logger.experiment.add_images("samples", images, self.global_step)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": lk.one_cycle(optimizer, self.trainer)}
