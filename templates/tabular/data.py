"""The data: 569 tumours, 30 measurements each, from the table that ships inside scikit-learn."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class TumourData(lk.DataModule):
    """Rows of 30 standardised numbers and a label (0 malignant, 1 benign).

    60 % of the rows are for training, 20 % for validation and 20 % for testing.

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
        table = load_breast_cancer()
        rows = torch.tensor(table.data, dtype=torch.float32)
        labels = torch.tensor(table.target)
        shuffled = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(self.split_seed)
        )
        fifth = len(rows) // 5
        test, val, train = shuffled.split([fifth, fifth, len(rows) - 2 * fifth])
        # Statistics of the training rows only: what is judged later must not leak into them.
        self.mean, self.std = rows[train].mean(dim=0), rows[train].std(dim=0)
        rows = self.standardise(rows)
        self.train, self.val, self.test = (
            TensorDataset(rows[part], labels[part]) for part in (train, val, test)
        )

    def standardise(self, rows: Tensor) -> Tensor:
        """Returns new rows as the network wants them."""
        return (rows - self.mean) / self.std

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)
