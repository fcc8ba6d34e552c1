"""What optimizers that evaluate the loss several times are given (LBFGS, SAM)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.losses import Weighing, unpack

if TYPE_CHECKING:
    from lightkit.run import FitRun


class Closure:
    """What an optimizer that evaluates the loss several times gets (LBFGS, SAM).

    The first call returns the loss that is there already, with its gradients; each further one
    clears them and computes the group again.
    """

    def __init__(self, run: FitRun, batches: list[tuple[Any, int]]) -> None:
        self._run, self._batches, self._first = run, batches, True

    def __call__(self) -> Tensor:
        """Returns the loss of the group, detached; the gradients are those of the weights now."""
        run, count = self._run, len(self._batches)
        if self._first:
            self._first = False
            known: list[Any] = run.metrics.loss.values[-count:]
            return torch.stack(known).mean()
        for parameter in run.plan.parameters:
            parameter.grad = None
        weighing = Weighing(run, count, self._batches[0][1]) if count > 1 else None
        with run.metrics.muted(), torch.enable_grad():
            losses = [self._repeat(batch, index, weighing) for batch, index in self._batches]
        if weighing is not None:
            weighing.finish(run.plan.parameters)
        if run.clip is not None:
            run.clip(run.plan.optimizer, run.plan.parameters)
        return torch.stack(losses).mean()

    def _repeat(self, batch: Any, index: int, weighing: Weighing | None) -> Tensor:
        run = self._run
        arguments = (batch, index) if run.takes_index else (batch,)
        if run.precision.autocast is None:
            loss, weight, _ = unpack(run.training_step(*arguments))
        else:
            with run.precision.autocast:
                loss, weight, _ = unpack(run.training_step(*arguments))
        if loss is None:
            return torch.zeros(())
        run.precision.backward(loss if weighing is None else weighing.scale(loss, weight))
        return loss.detach()
