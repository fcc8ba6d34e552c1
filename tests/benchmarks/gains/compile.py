"""Compiled steps beside the same steps as they are."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import lightkit as lk
from lightkit import calls, loops
from tests.benchmarks.pairs import Pair

BASE, OTHER = "as it is", "compiled"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(self.norm(x))


class Task(lk.TaskModule):
    """A tower of so many blocks; with none of them a network of two layers."""

    def __init__(self, width: int, blocks: int = 0, logs: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        self.names = [f"name_{i}" for i in range(logs)]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.net(x), y)
        for name in self.names:
            self.log(name, loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Same:
    """The same batch for ever, as a group of one."""

    size, last = 1, False

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def fetch(self) -> Any:
        return self.batch


def pairs(quick: bool) -> Iterator[Pair]:
    """A whole step of the Trainer: forward, loss, backward, optimizer; the compiling is not in it."""
    backend = "eager" if quick else "inductor"
    whole, regional = {"backend": backend}, {"backend": backend, "regional": True}
    yield _pair("64-64-10, batch 32", whole, width=64)
    if quick:
        return
    yield _pair("the same, 5 names logged", whole, width=64, logs=5)
    yield _pair("8 blocks of 256, batch 32: the step", whole, width=256, blocks=8)
    yield _pair("the same: its blocks", regional, width=256, blocks=8)


def _pair(what: str, how: dict[str, Any], **arguments: int) -> Pair:
    stack = contextlib.ExitStack()
    base, other = (_stepping(stack, given, **arguments) for given in (False, how))
    return Pair(what, base, other, close=stack.close)


def _stepping(
    stack: contextlib.ExitStack, how: bool | dict[str, Any], **arguments: int
) -> Callable[[int], None]:
    torch.manual_seed(0)
    task = Task(**arguments)
    batch = (torch.randn(32, arguments["width"]), torch.randint(10, (32,)))
    return quiet_run(stack, task, Same(batch), compile=how)


def quiet_run(
    stack: contextlib.ExitStack, task: lk.TaskModule, group: Any, **options: Any
) -> Callable[[int], None]:
    """Opens a fit that says and writes nothing, and returns what takes so many of its steps."""
    logging.getLogger("lightkit").setLevel(logging.WARNING)
    trainer = lk.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    opened = calls.open_fit(trainer, task, ([group.batch], None, None), None, max_steps=None)
    run = stack.enter_context(opened)
    run.metrics.begin_epoch()
    run.metrics.begin_steps()
    task.train()

    def steps(times: int) -> None:
        for _ in range(times):
            loops.train_step(run, group)

    return steps
