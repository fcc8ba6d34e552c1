"""The task: a recurrent network that reads sequences of unequal lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk

#: Padded letters of shape (batch, longest), the length of each sequence, the labels.
Batch = tuple[Tensor, list[int], Tensor]


class RecurrentNet(lk.TaskModule):
    """Classifies sequences of symbols.

    Args:
        symbols: How many symbols there are, with the padding, which is 0.
        classes: How many classes there are.
        hidden: Width of the embedding and of each direction of the recurrent layer.
        dropout: Share of the features that is dropped before and after that layer.
        lr: Highest learning rate of the one-cycle schedule.
    """

    def __init__(
        self,
        symbols: int = 27,
        classes: int = 4,
        hidden: int = 48,
        dropout: float = 0.2,
        lr: float = 0.01,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(symbols, hidden, padding_idx=0)
        self.gru = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, classes)
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def forward(self, letters: Tensor, lengths: list[int]) -> Tensor:
        # Packed, the padding is left out, so the last state of each sequence is at its own end.
        packed = pack_padded_sequence(
            self.dropout(self.embedding(letters)), lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.gru(packed)  # last: (directions, batch, hidden)
        return self.head(self.dropout(torch.cat([*last], dim=1)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        letters, lengths, labels = batch
        return F.cross_entropy(self(letters, lengths), labels)  # logged as train_loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        letters, lengths, _ = batch
        return self(letters, lengths).argmax(dim=1)

    def evaluate(self, batch: Batch, split: str) -> None:
        letters, lengths, labels = batch
        logits = self(letters, lengths)
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.accuracy.update(logits, labels)
        self.log(f"{split}_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": lk.one_cycle(optimizer, self.trainer)}
