"""Norms of gradients and weights, by module; histograms on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightkit.errors import ConfigError
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer


class Statistics(Callback):
    """Logs the 2-norms of the gradients and of the weights they belong to, by module.

    The curves are ``grad_norm/<module>`` and ``weight_norm/<module>``, and ``.../all`` for all that
    the optimizer trains; with several optimizers ``.../all-0``, ``.../all-1``, and of a module that
    two of them share the mean. Gradients are those of the whole step, unscaled and before clipping;
    weights are those before the step. The norms stay on the device until the next row is written,
    so nothing waits for them; in a row stands their mean over the steps that were looked at, which
    is not finite where the scaler of 16-mixed skipped one. Of sharded gradients the norm is that of
    all ranks, by one collective per module.

    Args:
        every_n_steps: Look at every so many-th optimizer step; None: ``log_every_n_steps``.
        depth: Levels of modules: 1 the direct children, 0 only all together, -1 every module that
            has parameters of its own.
        weights: Whether to log the norms of the weights too.
        histograms: Whether to hand histograms of gradients (as they were used, clipped) and weights
            to the loggers that know them, such as TensorBoard, where a row is written. This copies
            them to the CPU.

    Raises:
        ConfigError: For numbers out of range; when a fit begins, for histograms of a sharded model.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        depth: int = 1,
        weights: bool = True,
        histograms: bool = False,
    ) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("depth", depth, -1)):
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"Statistics({name}={value!r}): a whole number from {least}.")
        self.every_n_steps, self.depth = every_n_steps, depth
        self.weights, self.histograms = weights, histograms
        self._every, self._written = 1, -1

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds the interval."""
        self._every, self._written = self.every_n_steps or trainer.log_every_n_steps, -1
        if self.histograms and trainer.strategy.sharded:
            raise ConfigError(
                "Statistics(histograms=True): of a sharded model no process has all values. Leave it "
                "out; norms are those of all ranks."
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, task: TaskModule, optimizer: Optimizer
    ) -> None:
        """Logs the norms of what this optimizer is about to change."""
        if (trainer.global_step + 1) % self._every:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        optimizers = trainer.optimizers
        every = "all" if len(optimizers) == 1 else f"all-{optimizers.index(optimizer)}"
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in task.named_parameters():
            if id(parameter) in own and parameter.grad is not None:
                groups.setdefault(every, []).append(parameter)
                if self.depth:
                    groups.setdefault(self._module(name), []).append(parameter)
        for name, members in groups.items():
            task.log(f"grad_norm/{name}", _norm([p.grad for p in members]), batch_size=1)
            if self.weights:
                task.log(f"weight_norm/{name}", _norm(members), batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Hands out histograms, where a row is written."""
        step = trainer.global_step
        if not self.histograms or step == self._written or step % trainer.log_every_n_steps:
            return
        self._written = step
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        for name, parameter in task.named_parameters():
            for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
                if values is not None and (self.weights or kind == "gradients"):
                    plain = _dense(values).float().cpu()  # host sync, where a row is read anyway
                    for logger in trainer.loggers:
                        logger.log_histogram(f"{kind}/{name}", plain, step)

    def _module(self, name: str) -> str:
        """Returns the name of the module that a parameter counts for."""
        parts = name.split(".")[:-1]
        return ".".join(parts if self.depth < 0 else parts[: self.depth]) or "(own)"


def _norm(tensors: list[Tensor | None] | list[nn.Parameter]) -> Tensor:
    """Returns the joint 2-norm, on the device; of sharded tensors a collective."""
    norm = torch.nn.utils.get_total_norm([_dense(t) for t in tensors if t is not None])
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _dense(tensor: Tensor) -> Tensor:
    """Returns the values of a sparse gradient; any other tensor as it is, detached."""
    return tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
