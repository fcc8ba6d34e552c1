"""The task: a new head on a backbone that was trained on something else before."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk
from lightkit import checkpoint


class TransferNet(lk.TaskModule):
    """Classifies pictures of shape (batch, 1, 8, 8).

    With ``weights`` the backbone begins with those of another run and is frozen at first, batch norms
    included; only the head is in the optimizer. From an epoch on the backbone learns too, at a tenth
    of the head's rate. Without ``weights`` everything learns from the start.

    Args:
        classes: Number of classes.
        weights: Checkpoint of another run of this task, with any number of classes.
        unfreeze_at: Epoch (from 0) from which a backbone with weights learns; None for never.
        lr: Highest learning rate of the head.
    """

    def __init__(
        self,
        classes: int = 3,
        weights: str | None = None,
        unfreeze_at: int | None = 10,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.weights, self.unfreeze_at, self.lr = weights, unfreeze_at, lr
        # A network of your own goes here, all of it but the last layer; see PhotoNet below.
        self.backbone = nn.Sequential(
            *convolution(1, 16), *convolution(16, 32), nn.MaxPool2d(2), *convolution(32, 32)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, classes))
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.weights is not None:
            checkpoint.load_weights(self.backbone, self.weights, prefix="backbone.")
            lk.freeze(self.backbone)

    def configure_callbacks(self) -> list[lk.Callback]:
        if self.weights is None or self.unfreeze_at is None:
            return []
        return [lk.callbacks.Unfreeze({self.unfreeze_at: "backbone"}, decay=10.0)]

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.backbone(pictures))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(self(pictures), labels)  # logged as train_loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pictures, _ = batch
        return self(pictures).argmax(dim=1)

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        pictures, labels = batch
        output = self(pictures)
        self.log(f"{split}_loss", F.cross_entropy(output, labels), prog_bar=True)
        self.accuracy.update(output, labels)
        self.log(f"{split}_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": lk.warmup_cosine(optimizer, self.trainer, warmup=0.1),
        }


class PhotoNet(TransferNet):
    """Classifies colour photos of shape (batch, 3, height, width) on a ResNet-18 of torchvision.

    Args:
        classes: Number of classes.
        weights: Name of torchvision's weights, which it downloads once; None for none. A backbone
            with weights is frozen at first.
        unfreeze_at: Epoch (from 0) from which a backbone with weights learns; None for never.
        lr: Highest learning rate of the head.
    """

    def __init__(
        self,
        classes: int = 2,
        weights: str | None = "IMAGENET1K_V1",
        unfreeze_at: int | None = 2,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(classes, weights, unfreeze_at, lr)
        try:
            from torchvision.models import resnet18
        except ImportError as error:
            raise ImportError("PhotoNet needs torchvision (pip install torchvision)") from error
        self.backbone = resnet18(weights=weights)
        self.head = nn.Linear(self.backbone.fc.in_features, classes)
        self.backbone.fc = nn.Identity()  # the last layer, of other classes

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.weights is not None:
            lk.freeze(self.backbone)


def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """Returns the layers of one 3 x 3 convolution that keeps the size of the picture."""
    return (
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
