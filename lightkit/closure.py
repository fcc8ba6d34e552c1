"""What optimizers that evaluate the loss several times are given (LBFGS, SAM)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.errors import OptimizerError
from lightkit.losses import Weighing, added, unpack

if TYPE_CHECKING:
    from lightkit.run import FitRun


class Closure:
    """Returns the loss of a group when called; its gradients are those of the weights then.

    The first call returns what is there already; each further one clears the gradients, computes
    the group again and clips.
    """

    def __init__(self, run: FitRun) -> None:
        self._run, self._called = run, False
        self._batches: list[tuple[Any, int]] = []
        self._losses: list[Tensor] = []
        self._weights: list[Any] = []

    def add(self, batch: Any, index: int, loss: Any, weight: Any) -> None:
        """Adds a batch of the group, with its detached loss and what that is the mean of."""
        self._batches.append((batch, index))
        self._losses.append(loss)
        self._weights.append(weight)

    def __call__(self) -> Tensor:
        """Returns the mean loss of the group, detached.

        Raises:
            OptimizerError: When called again under 16-mixed.
        """
        if self._called:
            self._compute()
        self._called = True
        total = sum(self._weights)
        if self._run.several:
            return self._over_ranks()
        if len(self._losses) == 1 or (not isinstance(total, Tensor) and not total):
            return self._losses[-1]
        terms = zip(self._losses, self._weights, strict=True)
        return torch.stack([loss * weight for loss, weight in terms]).sum() / total

    def _over_ranks(self) -> Tensor:
        """Returns the mean loss of all ranks: what it decides (a line search) all decide alike."""
        terms = zip(self._losses, self._weights, strict=True)
        loss = torch.stack([loss.double() * weight for loss, weight in terms]).sum()
        weight = torch.as_tensor(sum(self._weights), dtype=loss.dtype, device=loss.device)
        # A collective on the device, without a host sync.
        total, count = self._run.strategy.ranks.total(torch.stack([loss, weight])).unbind()
        return torch.where(count > 0, total / count, total).to(self._losses[-1].dtype)

    def _compute(self) -> None:
        """Computes losses and gradients again, with the weights as they are now."""
        run, count = self._run, len(self._batches)
        if run.scaled:
            raise OptimizerError(
                "precision='16-mixed' scales the gradients of one evaluation of the loss, and this "
                "optimizer asked for another one within a step. Use precision='bf16-mixed'."
            )
        for parameter in run.plan.parameters:
            parameter.grad = None
        weighing = Weighing(run, count) if count > 1 or run.several else None
        with run.metrics.muted(), torch.enable_grad():
            for i in range(count):
                if run.sync is not None:
                    run.sync(i == count - 1)
                self._repeat(i, weighing)
            if weighing is not None:
                weighing.finish(run.plan.parameters)
            if run.clip is not None:
                run.clip(run.plan.optimizer, run.plan.parameters)

    def _repeat(self, i: int, weighing: Weighing | None) -> None:
        run, (batch, index) = self._run, self._batches[i]
        arguments = (batch, index) if run.takes_index else (batch,)
        if run.autocast is None:
            loss, weight, _ = unpack(run.training_step(*arguments))
        else:
            with run.autocast:
                loss, weight, _ = unpack(run.training_step(*arguments))
        if loss is None:
            raise OptimizerError(
                "training_step returned None when the loss of a batch was computed again, although "
                "it returned a loss before. An optimizer that asks twice needs it twice."
            )
        for hook in run.hooks.on_loss:
            loss = added(loss, hook(loss))
        scaled = loss if weighing is None else weighing.scale(loss, weight, self._weights[i])
        run.differentiate(scaled)
        self._losses[i] = loss.detach()
