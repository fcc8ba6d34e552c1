"""What is trained: three networks with their data, the same for every contender.

Every contender gets a `Job` and trains ``job.net`` in place, for ``job.epochs`` passes over
``job.train``. The clock sits in the network: it is read when its forward pass is called in training
mode for the first time in the second epoch, and for the first time in the last. In between lie
whole epochs, with whatever a contender does between them, after a first one that warms up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset, random_split

CLASSES = 10
#: Steps between two rows of a log, the default of lightkit and of Lightning.
EVERY = 50

loss_of = functional.cross_entropy


class Marks:
    """Reads the clocks when the first step of the second epoch begins, and that of the last.

    Attributes:
        read: For each of the two: seconds of the process, seconds of the wall.
    """

    def __init__(self, first: int, last: int) -> None:
        self.count, self.next, self.last = 0, first, last
        self.read: list[tuple[float, float]] = []

    def __call__(self) -> None:
        if self.count == self.next:
            self.read.append((time.process_time(), time.perf_counter()))
            self.next = self.last
        self.count += 1


class Each:
    """Reads the clocks at the beginning of every step; attribute as in `Marks`."""

    def __init__(self) -> None:
        self.read: list[tuple[float, float]] = []

    def __call__(self) -> None:
        self.read.append((time.process_time(), time.perf_counter()))


class Watched(nn.Module):
    """A network that tells its marks of each training step; this costs all the same."""

    marks: Callable[[], None] = staticmethod(lambda: None)

    def __call__(self, *args: Any) -> Any:
        if self.training:
            self.marks()
        return super().__call__(*args)


class MLP(Watched):
    """64-64-10: some 200 us a step, nearly all of it the Python and the dispatch around it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DigitsNet(Watched):
    """The network of ``templates/digits``; a test compares the two."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * 2 * 2, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


class Transformer(Watched):
    """Two encoder layers, 180,000 parameters in 27 tensors: some milliseconds a step."""

    def __init__(self, width: int = 96, words: int = 64) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 256, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(words, width)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x)).mean(1))


class InMemory:
    """Batches that lie there, handed out in turn: the loader costs next to nothing."""

    def __init__(self, batches: list[Any], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        batches = self.batches
        for i in range(self.length):
            yield batches[i % len(batches)]


@dataclass
class Job:
    """What a contender is given.

    Attributes:
        level: One of `LEVELS`: what happens beside the training.
        net: The network; it is to be trained in place.
        train: The loader, to be passed over ``epochs`` times.
        val: The loader of the validation after each epoch, or None for no validation.
        epochs: Passes over ``train``.
        folder: Where files may be written.
        optimizer: Makes the optimizer from parameters.
        schedule: Makes the schedule that moves with each step, or returns None.
    """

    level: str
    net: Watched
    train: Any
    val: Any
    epochs: int
    folder: Path
    optimizer: Callable[[Any], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler | None]


#: By level: what happens beside the training.
LEVELS = {
    "bare": "nothing beside the training (and the validation, in digits)",
    "log": "the loss logged in each step, for means over 50 steps; nothing written",
    "newcomer": "as the first script of a newcomer, nothing switched off",
    "full": "loss logged in each step, rows in TensorBoard every 50 steps, training accuracy by "
    "torchmetrics, a progress bar, a validation and a checkpoint after each epoch",
}


def _in_memory(make: Callable[[], tuple[Tensor, Tensor]], steps: int) -> tuple[Any, Any]:
    batches = [make() for _ in range(50)]
    return InMemory(batches, steps), InMemory(batches[:10], 10)


def _mlp(steps: int) -> tuple[Watched, Any, Any]:
    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(32, 64), torch.randint(0, CLASSES, (32,))

    return MLP(), *_in_memory(make, steps)


def _medium(steps: int) -> tuple[Watched, Any, Any]:
    def make() -> tuple[Tensor, Tensor]:
        return torch.randint(0, 64, (16, 24)), torch.randint(0, CLASSES, (16,))

    return Transformer(), *_in_memory(make, steps)


def _digits(steps: int) -> tuple[Watched, Any, Any]:
    """The data, the split and the loaders of ``templates/digits``; an epoch has 40 steps."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    split = torch.Generator().manual_seed(0)
    train, val, _ = random_split(data, [0.7, 0.15, 0.15], generator=split)
    net = DigitsNet()
    if steps < len(train) // 32:  # a short try
        train = torch.utils.data.Subset(train, range(32 * steps))
    return net, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=32)


def _sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01)


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def _medium_adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


@dataclass(frozen=True)
class Work:
    """How a network is trained.

    Attributes:
        title: What it is, for the page.
        make: Makes the network and the two loaders for so many steps per epoch.
        optimizer: Makes the optimizer.
        levels: The levels that say something about it.
        steps: Steps in an epoch.
        epochs: Epochs, the first and the last of which are not measured.
        validates: Whether there is a validation on all levels.
        cycle: The highest rate of a one-cycle schedule, or None for no schedule.
    """

    title: str
    make: Callable[[int], tuple[Watched, Any, Any]]
    optimizer: Callable[[Any], Optimizer]
    levels: tuple[str, ...]
    steps: int
    epochs: int
    validates: bool = False
    cycle: float | None = None


WORKS = {
    "mlp": Work(
        "a tiny MLP (64-64-10, batches of 32 in memory, SGD): pure overhead",
        *(_mlp, _sgd, tuple(LEVELS)),
        steps=500,
        epochs=6,
    ),
    "digits": Work(
        "the job of `configs/digits.yaml`: a small CNN on handwritten digits, DataLoader with "
        "shuffling, AdamW, one-cycle schedule, validation after each epoch",
        *(_digits, _adamw, ("bare", "newcomer", "full")),
        steps=40,
        epochs=12,
        validates=True,
        cycle=0.01,
    ),
    "medium": Work(
        "a small transformer (two layers, 180,000 parameters, batches of 16 in memory, AdamW)",
        *(_medium, _medium_adamw, ("bare", "full")),
        steps=60,
        epochs=4,
    ),
}


def make_job(
    name: str,
    level: str,
    folder: str | Path,
    *,
    steps: int | None = None,
    epochs: int | None = None,
) -> Job:
    """Makes a job from the seed 0.

    Args:
        name: One of `WORKS`.
        level: One of `LEVELS`.
        folder: Where the contender may write.
        steps: Steps in an epoch, where it shall be another number.
        epochs: Epochs, likewise; at least 3.
    """
    work = WORKS[name]
    torch.manual_seed(0)
    steps, epochs = steps or work.steps, epochs or work.epochs
    net, train, val = work.make(steps)
    length = len(train)
    net.marks = Marks(length, (epochs - 1) * length)

    def schedule(optimizer: Optimizer) -> LRScheduler | None:
        if work.cycle is None:
            return None
        return OneCycleLR(optimizer, work.cycle, total_steps=length * epochs)

    validates = work.validates or level == "full"
    torch.manual_seed(1)
    return Job(
        *(level, net, train, val if validates else None, epochs, Path(folder)),
        *(work.optimizer, schedule),
    )
