"""The data: pictures in which digits of scikit-learn lie among scratches, and where they are."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk

SIZE = 24  # pixels along a side of a picture


class ClutterData(lk.DataModule):
    """Grey pictures of shape (1, 24, 24) in [0, 1], and masks that are 1 where a digit is.

    Each picture has three digits, and three scratches that are as bright. No digit is in two
    splits: 70 % of all there are come into pictures of the first, 15 % into the others each.

    Args:
        pictures: Pictures to train on; validation and test have a quarter of it each.
        batch_size: Pictures per batch.
        split_seed: Decides which digit goes where, and makes the pictures. It is apart from the
            seed of the run, so that runs with other seeds are judged on the same pictures.
    """

    def __init__(self, pictures: int = 800, batch_size: int = 16, split_seed: int = 0) -> None:
        super().__init__()
        self.pictures = pictures
        self.batch_size = batch_size
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(self.split_seed)
        digits = torch.tensor(load_digits().images, dtype=torch.float32) / 16
        digits = digits[torch.randperm(len(digits), generator=generator)]
        parts = digits.split([1257, 270, 270])
        counts = (self.pictures, self.pictures // 4, self.pictures // 4)
        self.train, self.val, self.test = (
            compose(part, count, generator) for part, count in zip(parts, counts, strict=True)
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)


def compose(digits: Tensor, count: int, generator: torch.Generator) -> TensorDataset:
    """Returns pictures of shape (count, 1, 24, 24) and their masks, drawn by ``generator``."""
    pictures = torch.zeros(count, SIZE, SIZE)
    masks = torch.zeros(count, SIZE, SIZE)
    for picture, mask in zip(pictures, masks, strict=True):
        picture += scratches(3, generator).amax(dim=0)
        for index in torch.randint(len(digits), (3,), generator=generator):
            top, left = torch.randint(SIZE - 8, (2,), generator=generator)
            place = (slice(top, top + 8), slice(left, left + 8))
            picture[place] = torch.maximum(picture[place], digits[index])
            mask[place] = torch.maximum(mask[place], (digits[index] > 0.3).float())
    return TensorDataset(pictures.unsqueeze(1), masks.unsqueeze(1))


def scratches(count: int, generator: torch.Generator) -> Tensor:
    """Returns pictures of shape (count, 24, 24), each with one straight line."""
    start, end = torch.rand(2, count, 1, 1, 2, generator=generator) * SIZE
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    way = end - start
    to_pixels = torch.stack([rows, columns], dim=-1) + 0.5 - start
    # The point of the line that is nearest to a pixel, as a share of the way: 0 to 1.
    share = (to_pixels * way).sum(dim=-1, keepdim=True) / way.square().sum(dim=-1, keepdim=True)
    distance = (to_pixels - share.clamp(0, 1) * way).norm(dim=-1)
    brightness = 0.5 + 0.5 * torch.rand(count, 1, 1, generator=generator)
    return (1.5 - distance).clamp(0, 1) * brightness
