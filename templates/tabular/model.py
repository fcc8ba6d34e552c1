"""The task: a fully connected network for rows of numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightkit as lk


class TabularNet(lk.TaskModule):
    """Classifies rows of numbers, of shape (batch, columns).

    It standardises the columns itself. So the statistics are in its checkpoints and exports, which
    take rows as they are in the table.

    Args:
        columns: Numbers per row.
        classes: How many classes there are.
        hidden: Width of each hidden layer.
        layers: How many hidden layers.
        dropout: Share of the features that is dropped after each hidden layer.
        lr: Learning rate of AdamW at the start; it falls to 0 along a cosine.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(
        self,
        columns: int = 30,
        classes: int = 2,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.2,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))
        widths = [columns] + [hidden] * layers
        blocks = [
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout))
            for inputs in widths[:-1]
        ]
        self.net = nn.Sequential(*blocks, nn.Linear(widths[-1], classes))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            # Of the training rows only: what is judged later must not leak into the statistics.
            rows, _ = self.trainer.datamodule.train.tensors
            self.mean.copy_(rows.mean(dim=0))
            std = rows.std(dim=0)
            # A column that is the same in all rows is not divided by (almost) nothing.
            self.std.copy_(std.where(std > 1e-6 * rows.mean(dim=0).abs(), 1.0))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net((rows - self.mean) / self.std)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, labels = batch
        return F.cross_entropy(self(rows), labels)  # logged as train_loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, _ = batch
        return self(rows).softmax(dim=1)

    def evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        rows, labels = batch
        logits = self(rows)
        # Means over batches are weighted by the number of rows, so a short last one counts less.
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        correct = logits.argmax(dim=1) == labels
        self.log(f"{split}_accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=self.trainer.max_epochs
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # stepped once per epoch
