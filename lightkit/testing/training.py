"""Proof that a task learns, and that no part of it is left out."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from lightkit import rng
from lightkit.errors import NonFiniteError, UsageError, some
from lightkit.hooks import Callback
from lightkit.task import TaskModule, overrides
from lightkit.testing.given import Given, makes, patterns, quiet

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from lightkit.trainer import Trainer

_FEWEST = 2
_NO_STEP = (
    "  no optimizer was stepped: training_step gave no loss, or it steps at some batch_idx only, which "
    "is 0 in all steps here."
)
_WHY = {
    "without a gradient": "They have no part in the loss: they are not used in training_step, or behind "
    "detach() or no_grad().",
    "with a gradient of zero alone": "The loss does not depend on their values: a dead activation, a "
    "weight of zero, a mask that hides all.",
    "in no optimizer": "Pass them to the optimizer in configure_optimizers, or freeze them: "
    "requires_grad_(False).",
    "that the steps do not change": "Their learning rate is 0, or it stays so small that rounding "
    "takes it away.",
}


def assert_trains(
    task: TaskModule | Callable[[], TaskModule],
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    steps: int = 50,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """Asserts that a task learns one batch, with all of its parameters.

    Trains a copy on the first batch again and again. Every parameter with ``requires_grad`` must get
    a gradient that is not zero, be in an optimizer and be changed by it. The losses must be finite
    and must fall: the mean of the last tenth lies below that of the first. (In manual optimization
    nothing is asked of the losses: those of adversaries need not fall.)

    What is given stays as it is. Instead of an object a function that makes it may be given. Files go
    to a temporary folder only, and the random states are put back.

    Args:
        task: The task, or a function that returns a new one.
        train_dataloaders: What ``fit`` takes, or a function that returns it.
        val_dataloaders: Likewise, where a schedule needs a value of the validation.
        datamodule: Likewise, instead of loaders.
        steps: Optimizer steps, at least 2.
        seed: Seeds the run.
        ignore: Parameters that need not learn, as patterns of `fnmatch` ("net.head.*").
        options: Arguments of the Trainer.

    Raises:
        AssertionError: Something does not learn; it says what, and the usual cause.
        UsageError: What was given cannot be tried like this.
    """
    if not isinstance(steps, int) or steps < _FEWEST:
        raise UsageError(f"steps={steps!r}; it must be a number of optimizer steps, from 2 on.")
    if long := sorted({"max_epochs", "max_steps", "overfit_batches"} & options.keys()):
        raise UsageError(
            f"{', '.join(long)}: assert_trains takes steps={steps} steps on one batch."
        )
    given = Given(task, train_dataloaders, val_dataloaders, datamodule, -1, options)
    watch, rows = _Watch(patterns(ignore)), list[tuple[int, dict[str, float]]]()
    limits: dict[str, Any] = {"max_steps": steps, "limit_val_batches": 1}
    with rng.preserved(), quiet(), tempfile.TemporaryDirectory() as folder:
        made: Any = task() if makes(task) else task
        own = overrides(made, "train_dataloader")
        if train_dataloaders is not None or datamodule is not None or own:
            limits |= {"overfit_batches": 1, "max_epochs": steps}  # also where no batch is a step
        try:
            given.fit(watch, rows, seed, Path(folder), **limits)
        except NonFiniteError as error:
            raise AssertionError(f"The task does not train: {error}") from error
    losses = [row["train_loss"] for _, row in rows if "train_loss" in row]
    if faults := [*watch.faults(), *_of_losses(losses, automatic=watch.automatic)]:
        raise AssertionError("\n".join([f"In {steps} steps on one batch:", *faults]))


def _of_losses(losses: list[float], *, automatic: bool) -> list[str]:
    """Returns what is wrong with the losses of the steps."""
    if not automatic or not losses:
        return []
    tenth = max(1, len(losses) // 10)
    first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
    if last < first:
        return []
    fell = f"{first:.6g} at first, {last:.6g} at last (means over {tenth})"
    advice = "Look at its sign, at the learning rate, and whether the targets belong to the inputs."
    return [f"  the loss did not fall: {fell}. {advice}"]


class _Watch(Callback):
    """Sees what happens to each parameter."""

    order = 1000

    def __init__(self, ignore: Sequence[str]) -> None:
        self.ignore, self.automatic, self.stepped = ignore, True, False
        self.before: dict[str, Tensor] = {}
        self.found: dict[str, list[str]] = {what: [] for what in _WHY}
        self.gradient: dict[str, bool] = {}  # whether it was ever more than zero

    def _trainable(self, task: TaskModule) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in task.named_parameters()
            if parameter.requires_grad and not any(fnmatchcase(name, p) for p in self.ignore)
        }

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        self.automatic = task.automatic_optimization
        self.before = {
            name: parameter.detach().clone()
            for name, parameter in self._trainable(task).items()
            if not is_lazy(parameter)
        }

    def on_before_optimizer_step(
        self, trainer: Trainer, task: TaskModule, optimizer: Optimizer
    ) -> None:
        self.stepped = True
        for name, parameter in self._trainable(task).items():
            if (grad := parameter.grad) is not None and not self.gradient.get(name):
                values = grad.coalesce().values() if grad.is_sparse else grad
                self.gradient[name] = bool(values.any())

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        owned = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        for name, parameter in self._trainable(task).items():
            before = self.before.get(name)
            if name not in self.gradient:
                self.found["without a gradient"].append(name)
            elif not self.gradient[name]:
                self.found["with a gradient of zero alone"].append(name)
            elif id(parameter) not in owned:
                self.found["in no optimizer"].append(name)
            elif before is not None and torch.equal(before, parameter):
                self.found["that the steps do not change"].append(name)

    def faults(self) -> list[str]:
        """Returns a line for each kind of fault."""
        if not self.stepped:
            return [_NO_STEP]
        return [
            f"  {len(names)} parameter{'s' * (len(names) > 1)} {what}: {some(names)}. {_WHY[what]}"
            for what, names in self.found.items()
            if names
        ]
