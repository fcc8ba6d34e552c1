"""The data: 569 tumours, 30 measurements each, from the table that ships inside scikit-learn."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


def read() -> tuple[Tensor, Tensor]:
    """Returns rows of shape (569, 30), and their labels (0 malignant, 1 benign)."""
    table = load_breast_cancer()
    return torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)


class TumourData(lk.DataModule):
    """What `read` returns: 60 % of the rows for training, 20 % each for validation and testing.

    Args:
        batch_size: Rows per batch.
        split_seed: Decides which row goes where. It is apart from the seed of the run, so that
            runs with other seeds are judged on the same rows.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        rows, labels = read()
        shuffled = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(self.split_seed)
        )
        fifth = len(rows) // 5
        test, val, train = shuffled.split([fifth, fifth, len(rows) - 2 * fifth])
        self.train, self.val, self.test = (
            TensorDataset(rows[part], labels[part]) for part in (train, val, test)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)
