"""Fused optimizers beside what torch takes by default; a star where lightkit fuses by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightkit.fused import FusedChoice
from tests.benchmarks.pairs import Pair

BASE, OTHER = "as torch has it", "fused"
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 1e-4}),
    "SGD, momentum": (SGD, {"lr": 1e-4, "momentum": 0.9}),
    "Adam": (Adam, {"lr": 1e-4}),
    "AdamW": (AdamW, {"lr": 1e-4}),
}
#: How many tensors of how many numbers: from one scalar to 24 large matrices and a table.
SIZES = (
    *((1, 1), (4, 10), (4, 1000), (6, 1000), (16, 1000), (100, 1000), (1000, 10), (1000, 1000)),
    *((8, 1_000_000), (24, 512 * 512), (1, 10_000_000)),
)
#: With several threads; the last one on a machine that has other things to do.
SEVERAL = ((20, 16), (20, 17), (20, 1000), (24, 512 * 512))
THREADS, BUSY = 4, 3


def pairs(quick: bool) -> Iterator[Pair]:
    """The update alone, ``optimizer.step()``, for gradients that lie there."""
    for name in KINDS:
        for count, numbers in SIZES[:2] if quick else SIZES:
            yield _pair(name, count, numbers)
    for name in () if quick else ("SGD", "AdamW"):
        for count, numbers in SEVERAL:
            yield _pair(name, count, numbers, threads=THREADS, clock="wall")
        yield _pair(name, 20, 100, threads=THREADS, clock="wall", busy=BUSY, times=3)


def _pair(name: str, count: int, numbers: int, **how: Any) -> Pair:
    kind, options = KINDS[name]
    plain, fused = (_optimizer(kind, count, numbers, options | m) for m in ({}, {"fused": True}))
    threads, busy = how.get("threads", 1), how.get("busy", 0)
    what = f"{name}, {count} of {numbers:,}"
    if threads > 1:
        what += f", {threads} threads" + (f" beside {busy} busy processes" if busy else "")
    torch.set_num_threads(threads)
    unset = _optimizer(kind, count, numbers, options)
    star = FusedChoice([unset], nn.Module(), torch.device("cpu"), strict=False).chosen
    return Pair(what + " *" * bool(star), _stepping(plain), _stepping(fused), **how)


def _optimizer(
    kind: type[Optimizer], count: int, numbers: int, options: dict[str, Any]
) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for _ in range(count):
        parameter = nn.Parameter(torch.randn(numbers, generator=generator))
        parameter.grad = torch.randn(numbers, generator=generator)
        parameters.append(parameter)
    return kind(parameters, **options)


def _stepping(optimizer: Optimizer):
    def steps(times: int) -> None:
        for _ in range(times):
            optimizer.step()

    return steps
