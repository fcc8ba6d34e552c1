"""Writes learning rates to the loggers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightkit.errors import one_of
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class LearningRateMonitor(Callback):
    """Writes the learning rate of every parameter group.

    The curves are named ``lr-Adam``, with several groups ``lr-Adam/pg1``, ``lr-Adam/pg2`` or
    ``lr-Adam/<name of the group>``, with several optimizers of one class ``lr-Adam``,
    ``lr-Adam-1``. The ``name`` of a schedule takes the place of ``lr-Adam``. The value at step k
    is the rate of the step that comes next. Written on rank zero only, past the window means of
    ``self.log``.

    Args:
        logging_interval: "step" writes after every ``log_every_n_steps`` steps, "epoch" at the
            start of every epoch, None each optimizer by the interval of its schedule (one without
            a schedule at the start of every epoch).
        log_momentum: Write ``<name>-momentum`` beside it: the momentum, or the first beta.

    Raises:
        ConfigError: For another ``logging_interval``.
    """

    def __init__(self, logging_interval: str | None = None, log_momentum: bool = False) -> None:
        where = "LearningRateMonitor: logging_interval"
        one_of(where, logging_interval, ("step", "epoch", None))
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self._by_step: list[tuple[str, Optimizer]] = []
        self._by_epoch: list[tuple[str, Optimizer]] = []
        self._written = -1

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Names the curves and sorts them by interval."""
        if not trainer.loggers:
            _log.warning("LearningRateMonitor has no logger to write to.")
        self._by_step, self._by_epoch = [], []
        self._written = trainer.global_step  # a run that is continued wrote that row before
        taken: set[str] = set()
        for optimizer in trainer.optimizers:
            entry = next((e for e in trainer.lr_schedulers if e.optimizer is optimizer), None)
            base = (entry and entry.name) or f"lr-{type(optimizer).__name__}"
            name, number = base, 0
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name)
            interval = self.logging_interval or (entry.interval if entry else "epoch")
            (self._by_step if interval == "step" else self._by_epoch).append((name, optimizer))

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Writes the rates of the epoch, and those by step where training begins."""
        first = [] if trainer.global_step else self._by_step
        self._write(trainer, self._by_epoch + first)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rates by step, every ``log_every_n_steps`` steps."""
        step = trainer.global_step
        # The second test: with accumulation several batches end at one step.
        if step != self._written and step and step % trainer.log_every_n_steps == 0:
            self._written = step
            # Under 16-mixed: the rate of the next step. Host sync, once per window.
            trainer.session.precision.settle()
            self._write(trainer, self._by_step)

    def _write(self, trainer: Trainer, named: list[tuple[str, Optimizer]]) -> None:
        if named and trainer.is_global_zero and not trainer.fast_dev_run:
            row = {k: v for name, optimizer in named for k, v in self._values(name, optimizer)}
            for logger in trainer.loggers:
                logger.log_metrics(row, step=trainer.global_step)

    def _values(self, name: str, optimizer: Optimizer) -> Iterator[tuple[str, float]]:
        groups = optimizer.param_groups
        for i, group in enumerate(groups):
            part = group.get("name", f"pg{i + 1}")
            key = name if len(groups) == 1 else f"{name}/{part}"
            yield key, float(group["lr"])  # a tensor's value is a host sync; lr is rarely one
            if self.log_momentum:
                betas = group.get("betas")
                yield f"{key}-momentum", float(betas[0] if betas else group.get("momentum", 0.0))
