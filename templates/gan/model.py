"""The task: a generator of images and a discriminator, trained against each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightkit as lk


class GAN(lk.TaskModule):
    """Learns to draw images of shape (batch, 1, size, size) with pixels in [-1, 1].

    Two optimizers take turns, so this is manual optimization: ``training_step`` itself says what is
    stepped when.

    Args:
        size: Height and width of the images.
        latent: Numbers of noise that an image is made of.
        width: Features of the hidden layers.
        lr: Learning rate of both networks.
        penalty: Weight of the penalty on the discriminator's slope at real images.
    """

    automatic_optimization = False

    def __init__(
        self,
        size: int = 8,
        latent: int = 32,
        width: int = 256,
        lr: float = 1e-3,
        penalty: float = 10.0,
    ) -> None:
        super().__init__()
        self.latent, self.lr, self.penalty = latent, lr, penalty
        self.generator = nn.Sequential(
            nn.Linear(latent, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, size * size),
            nn.Tanh(),
            nn.Unflatten(1, (1, size, size)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(size * size, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )
        # The same noise in every validation of every run, so that their figures compare.
        fixed = torch.randn(500, latent, generator=torch.Generator().manual_seed(0))
        self.register_buffer("fixed_noise", fixed)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        for_generator, for_discriminator = self.optimizers()
        fake = self(torch.randn(len(real), self.latent, device=self.device))

        # The discriminator: high scores for real images, low ones for fakes, and no steep slopes.
        real = real.requires_grad_()
        scores = self.discriminator(real)
        (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        judged = F.softplus(-scores).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        flat = slope.flatten(1).square().sum(dim=1).mean()
        for_discriminator.zero_grad()
        self.manual_backward(judged + self.penalty * flat)
        for_discriminator.step()

        # The generator: high scores for its fakes.
        fooled = F.softplus(-self.discriminator(fake)).mean()
        for_generator.zero_grad()
        self.manual_backward(fooled)
        for_generator.step()
        self.log_dict({"generator_loss": fooled, "discriminator_loss": judged}, prog_bar=True)

    def validation_step(self, real: Tensor, batch_idx: int) -> None:
        self.evaluate(real, "val")

    def test_step(self, real: Tensor, batch_idx: int) -> None:
        self.evaluate(real, "test")

    def evaluate(self, real: Tensor, split: str) -> None:
        fake = self(self.fixed_noise[: len(real)])
        precision, recall = covered(fake, by=real), covered(real, by=fake)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        names = f"{split}_precision", f"{split}_recall", f"{split}_f1"
        self.log_dict(dict(zip(names, (precision, recall, f1), strict=True)), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.logger, lk.loggers.TensorBoardLogger):
            with torch.no_grad():
                fakes = F.pad(self(self.fixed_noise[:64]), (1, 1, 1, 1)) / 2 + 0.5  # grey edges
            side = fakes.shape[-1]
            sheet = fakes.view(8, 8, side, side).transpose(1, 2)  # 8 by 8 images
            sheet = sheet.reshape(1, 8 * side, 8 * side)
            self.logger.experiment.add_image("fakes", sheet, self.global_step)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(n.parameters(), self.lr, betas=(0.5, 0.99)) for n in networks]


def covered(images: Tensor, by: Tensor, k: int = 3) -> Tensor:
    """Returns which share of the images is near another crowd of images.

    Near is what is no further from one of the crowd than its own k-th neighbour in the crowd is:
    Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric for Assessing Generative
    Models". Fakes near real images look right (precision); real images near fakes are within what
    is drawn (recall).
    """
    images, by = images.flatten(1), by.flatten(1)
    reach = torch.cdist(by, by).kthvalue(k + 1, dim=1).values  # the nearest one is itself
    return (torch.cdist(images, by) <= reach).any(dim=1).float().mean()
