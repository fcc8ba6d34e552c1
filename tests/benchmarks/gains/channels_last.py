"""Convolutions with the channels last beside the layout that torch begins with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import lightkit as lk
from tests.benchmarks.gains.compile import Same, quiet_run
from tests.benchmarks.pairs import Pair

BASE, OTHER = "channels first", "channels last"


class Task(lk.TaskModule):
    """Three convolutions, the second and third of which halve the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in sizes:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.net = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, 10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, y = batch
        return nn.functional.cross_entropy(self.head(self.net(images).mean((2, 3))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def pairs(quick: bool) -> Iterator[Pair]:
    """A whole step of the Trainer, with the conversion of the batch in it."""
    for width, image in ((16, 32),) if quick else ((16, 32), (64, 32), (32, 96)):
        stack = contextlib.ExitStack()
        ways = (_stepping(stack, layout, width, image) for layout in (None, "channels_last"))
        what = f"{width}, {2 * width}, {4 * width} channels, 16 images of {image} x {image}"
        yield Pair(what, *ways, close=stack.close)


def _stepping(
    stack: contextlib.ExitStack, layout: str | None, width: int, image: int
) -> Callable[[int], None]:
    torch.manual_seed(0)
    batch = (torch.randn(16, 3, image, image), torch.randint(10, (16,)))
    return quiet_run(stack, Task(width), Same(batch), memory_format=layout)
