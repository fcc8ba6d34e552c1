"""The data: the 1,797 handwritten digits that ship inside scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightkit as lk


def read() -> tuple[Tensor, Tensor]:
    """Returns grey images of shape (1797, 1, 8, 8) in [0, 1], and their labels 0 to 9."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


class DigitsData(lk.DataModule):
    """What `read` returns, split into 70 % train, 15 % validation, 15 % test.

    Args:
        batch_size: Images per batch.
        split_seed: Decides which image goes where. It is apart from the seed of the run, so
            that runs with other seeds are judged on the same images.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = random_split(
            TensorDataset(*read()),
            [0.7, 0.15, 0.15],
            generator=torch.Generator().manual_seed(self.split_seed),
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)
