"""The data: the 1,797 handwritten digits that ship inside scikit-learn, without their labels."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, random_split

import lightkit as lk


def read() -> Tensor:
    """Returns grey images of shape (1797, 1, 8, 8) in [0, 1]."""
    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16


class DigitImages(lk.DataModule):
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
        # A tensor is a dataset too: its samples are its rows, so a batch is one tensor of images.
        self.train, self.val, self.test = random_split(
            read(), [0.7, 0.15, 0.15], generator=torch.Generator().manual_seed(self.split_seed)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)
