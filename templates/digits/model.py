"""The task: a small convolutional network, how it is trained and how it is judged."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk


class DigitsNet(lk.TaskModule):
    """Classifies images of shape (batch, channels, size, size).

    Args:
        classes: How many classes there are.
        channels: 1 for grey images, 3 for colours.
        size: Height and width of the images.
        width: Channels of the first layer; the others have twice as many.
        dropout: Share of the features that is dropped before the last layer.
        lr: Highest learning rate of the one-cycle schedule.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        size: int = 8,
        width: int = 16,
        dropout: float = 0.3,
        lr: float = 0.01,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *convolution(channels, width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * (size // 4) ** 2, classes),  # pooled twice: a quarter
        )
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)  # logged as train_loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self(images).argmax(dim=1)

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        # The metric sums over batches; the trainer computes it once and then resets it.
        self.accuracy.update(logits, labels)
        self.log(f"{split}_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """Returns the layers of one 3 x 3 convolution that keeps the size of the image."""
    return (
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
