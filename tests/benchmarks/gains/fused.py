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
#: Tensors and the shape of each: from one small vector to one of ten million numbers.
SIZES = (
    *((count, (1000,)) for count in (1, 4, 6, 16, 100, 1000)),
    (24, (512, 512)),
    (1, (10_000_000,)),
)
#: With several threads: what they are good for, and what they are not.
SEVERAL = ((20, (1000,)), (24, (512, 512)), (1, (10_000_000,)))


def pairs(quick: bool) -> Iterator[Pair]:
    """The update alone, ``optimizer.step()``, for gradients that lie there."""
    for name in OPTIMIZERS:
        for size in SIZES[:1] if quick else SIZES:
            yield _pair(name, size)
    for name in ("SGD", "AdamW"):
        for size in SEVERAL[:1] if quick else SEVERAL:
            yield _pair(name, size, threads=4)
        yield _pair(name, SEVERAL[0], threads=4, busy=3)


def _pair(name: str, size: tuple[int, tuple[int, ...]], threads: int = 1, busy: int = 0) -> Pair:
    kind, options = OPTIMIZERS[name]
    count, shape = size
    ways = [_stepping(kind, count, shape, options | more) for more in ({}, {"fused": True})]
    numbers = " x ".join(f"{n:,}" for n in shape)
    what = f"{name}, {count:,} tensor{'s' if count > 1 else ''} of {numbers}"
    if threads > 1:
        what += f", {threads} threads"
    if busy:
        what += f" beside {busy} busy processes"
    # Several threads spend time of the process while they wait for each other.
    clock = "cpu" if threads == 1 else "wall"
    return Pair(what, *ways, clock=clock, threads=threads, busy=busy)


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
