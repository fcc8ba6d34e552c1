"""Fused optimizers beside what torch takes by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.benchmarks.pairs import Pair

BASE, OTHER = "as torch has it", "fused"
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-4}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4}),
}
#: Tensors and the shape of each: from a tiny MLP to one matrix of 4 million.
SIZES = (
    (4, (32,)),
    (4, (64, 64)),
    (30, (64, 64)),
    (300, (32, 32)),
    (24, (512, 512)),
    (1, (2048, 2048)),
)


def pairs(quick: bool) -> Iterator[Pair]:
    """The update alone, ``optimizer.step()``, for gradients that lie there."""
    for name, (kind, options) in OPTIMIZERS.items():
        for count, shape in SIZES[:1] if quick else SIZES:
            ways = [_stepping(kind, count, shape, options | more) for more in ({}, {"fused": True})]
            size = " x ".join(map(str, shape))
            yield Pair(f"{name}, {count} tensors of {size}", *ways)


def _stepping(kind, count: int, shape: tuple[int, ...], options: dict[str, Any]):
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(count):
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        parameters.append(parameter)
    optimizer = kind(parameters, **options)

    def steps(times: int) -> None:
        for _ in range(times):
            optimizer.step()

    return steps
