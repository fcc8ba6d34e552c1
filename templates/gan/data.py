"""The data: the 1,797 handwritten digits that ship inside scikit-learn, without their labels."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, random_split

import lightkit as lk


def read() -> Tensor:
    """Returns grey images of shape (1797, 1, 8, 8) in [-1, 1]."""
    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1


class DigitImages(lk.DataModule):
    """What `read` returns: 60 % to learn from, 20 % each to judge by.

    Args:
        batch_size: Images per batch of the training.
        split_seed: Decides which image goes where. It is apart from the seed of the run, so
            that runs with other seeds are judged by the same images.
    """

    def __init__(self, batch_size: int = 32, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = random_split(
            read(), [0.6, 0.2, 0.2], generator=torch.Generator().manual_seed(self.split_seed)
        )

    def train_dataloader(self) -> DataLoader:
        # Both networks see full batches only: a short last one would be a step of more noise.
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    # What is generated is compared with a crowd of images, so these are one batch.
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=len(self.val))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=len(self.test))
