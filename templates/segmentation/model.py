"""The task: a small U-Net, which says of each pixel whether it belongs to something."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

import lightkit as lk


class UNet(lk.TaskModule):
    """Finds the pixels of things in pictures of shape (batch, channels, height, width).

    Half of the loss is binary cross-entropy, which judges each pixel; the other half is 1 - Dice,
    which judges what was found as a whole, so that small things are not lost in the background.

    Args:
        channels: 1 for grey pictures, 3 for colours.
        width: Channels at full size; twice as many at half size, four times at a quarter.
        lr: Highest learning rate of the one-cycle schedule.
    """

    def __init__(self, channels: int = 1, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr
        self.down1 = block(channels, width)
        self.down2 = block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=2, stride=2)
        self.join2 = block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2)
        self.join1 = block(2 * width, width)
        self.head = nn.Conv2d(width, 1, kernel_size=1)
        # Both count over all pixels of a split; the F1 score of pixels is what is called Dice.
        self.iou = BinaryJaccardIndex()
        self.dice = BinaryF1Score()

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns a logit for each pixel, of shape (batch, 1, height, width)."""
        full = self.down1(pictures)
        half = self.down2(F.max_pool2d(full, 2))
        quarter = self.bottom(F.max_pool2d(half, 2))
        # What was seen at each size on the way down is joined in again on the way up. Halves of odd
        # sizes were rounded down, so the way up is told what to reach.
        up = self.up2(quarter, output_size=half.shape[-2:])
        half = self.join2(torch.cat([up, half], dim=1))
        up = self.up1(half, output_size=full.shape[-2:])
        full = self.join1(torch.cat([up, full], dim=1))
        return self.head(full)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, masks = batch
        return segmentation_loss(self(pictures), masks)  # logged as train_loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, _ = batch
        return self(pictures) > 0

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        pictures, masks = batch
        logits = self(pictures)
        self.log(f"{split}_loss", segmentation_loss(logits, masks), prog_bar=True)
        found = logits > 0  # a logit above 0 is a probability above one half
        self.iou.update(found, masks.int())
        self.dice.update(found, masks.int())
        self.log(f"{split}_iou", self.iou, prog_bar=True)
        self.log(f"{split}_dice", self.dice)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": lk.one_cycle(optimizer, self.trainer)}


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Returns two 3 x 3 convolutions that keep the size of the picture."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean of binary cross-entropy and 1 - Dice, for masks of zeros and ones."""
    found = logits.sigmoid()
    shared = (found * masks).sum(dim=(1, 2, 3))
    both = found.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
    dice = (2 * shared + 1) / (both + 1)  # + 1: an empty mask is no division by zero
    return (F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()) / 2
