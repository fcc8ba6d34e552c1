"""The data: some of the handwritten digits that ship inside scikit-learn; or photos of yours."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightkit as lk


class Pictures(Dataset):
    """An ordinary dataset: grey pictures of 8 x 8 pixels in [0, 1], and their labels from 0 on."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def read(digits: list[int]) -> tuple[Tensor, Tensor]:
    """Returns pictures of these digits, of shape (count, 1, 8, 8) in [0, 1], and their labels."""
    found = load_digits()
    targets = torch.tensor(found.target)
    chosen = torch.isin(targets, torch.tensor(digits))
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[chosen], torch.tensor([digits.index(t) for t in targets[chosen]])


class SomeDigits(lk.DataModule):
    """Pictures of some digits: 30 % for testing, 30 % for validation, some of the rest to learn.

    Args:
        digits: Which ones; the first gets the label 0.
        samples: Pictures to train on; None for all 40 %.
        batch_size: Pictures per batch.
        num_workers: Processes that load batches.
        split_seed: Decides which picture goes where, whatever the seed of the run is.
    """

    def __init__(
        self,
        digits: list[int],
        samples: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.digits, self.samples, self.split_seed = digits, samples, split_seed
        self.loading = {"batch_size": batch_size, "num_workers": num_workers}

    def setup(self, stage: str) -> None:
        images, labels = read(self.digits)
        generator = torch.Generator().manual_seed(self.split_seed)
        shuffled = torch.randperm(len(labels), generator=generator)
        rest = len(labels) * 3 // 10
        test, val, train = shuffled.split([rest, rest, len(labels) - 2 * rest])
        self.test, self.val, self.train = (
            Pictures(images[part], labels[part]) for part in (test, val, train[: self.samples])
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, shuffle=True, **self.loading)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, **self.loading)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, **self.loading)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, **self.loading)


class Photos(lk.DataModule):
    """Photos in folders, as of dogs and cats: ``train/cat/1.jpg``, ``val/dog/2.jpg``.

    The names of the folders in ``train`` are the classes, in the order of the alphabet.

    Args:
        folder: Where the folders ``train`` and ``val`` are.
        size: Height and width that photos are cut to.
        batch_size: Photos per batch.
        num_workers: Processes that read photos.
    """

    def __init__(
        self, folder: str, size: int = 224, batch_size: int = 32, num_workers: int = 4
    ) -> None:
        super().__init__()
        self.folder, self.size = Path(folder), size
        self.loading = {"batch_size": batch_size, "num_workers": num_workers}

    def setup(self, stage: str) -> None:
        try:
            from torchvision import transforms as T
            from torchvision.datasets import ImageFolder
        except ImportError as error:
            raise ImportError("Photos needs torchvision (pip install torchvision)") from error
        # Colours as the weights of torchvision know them: mean and deviation of ImageNet.
        colours = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        varied = [T.RandomResizedCrop(self.size), T.RandomHorizontalFlip()]
        plain = [T.Resize(self.size * 8 // 7), T.CenterCrop(self.size)]
        self.train, self.val = (
            ImageFolder(self.folder / part, T.Compose([*cut, T.ToTensor(), colours]))
            for part, cut in (("train", varied), ("val", plain))
        )
        if self.val.classes != self.train.classes:  # the same labels would mean other things
            raise ValueError(
                f"{self.folder} has other classes in val ({', '.join(self.val.classes)}) "
                f"than in train ({', '.join(self.train.classes)})"
            )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, shuffle=True, **self.loading)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, **self.loading)
