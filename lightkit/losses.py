"""What ``training_step`` returned: the loss, its weight, and its share in a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.errors import UsageError

if TYPE_CHECKING:
    from lightkit.run import FitRun


def unpack(outputs: Any) -> tuple[Tensor | None, Any, Mapping[str, Any] | None]:
    """Returns loss, weight and the whole mapping of what ``training_step`` returned."""
    if isinstance(outputs, Tensor):
        return outputs, None, None
    if outputs is None:
        return None, None, None
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("loss"), Tensor):
            return outputs["loss"], outputs.get("weight"), outputs
        raise UsageError(
            f"training_step returned a mapping without a tensor under 'loss' (it has: "
            f"{', '.join(map(str, outputs)) or 'nothing'}). Return {{'loss': loss}}, optionally "
            f"with 'weight' and with values to log."
        )
    raise UsageError(
        f"training_step returned {type(outputs).__name__}. Return the loss as a tensor, a mapping "
        f"with 'loss' (and perhaps 'weight'), or None to skip the batch."
    )


def checked(loss: Tensor) -> Tensor:
    """Returns a loss of one element as a 0-dim tensor; everything else is an error."""
    if loss.numel() != 1:
        raise UsageError(
            f"training_step returned a loss of shape {tuple(loss.shape)}, but one number is "
            f"needed. Return loss.mean()."
        )
    if not loss.requires_grad:
        raise UsageError(
            "training_step returned a loss that does not depend on any trainable parameter "
            "(requires_grad is False). Look for .detach(), .item(), torch.no_grad() or numpy "
            "between the model and the loss, and for parameters that are all frozen."
        )
    return loss.reshape(())


class Weighing:
    """Makes the gradient of a group that of the one big batch.

    Without weights each loss counts by its share of the samples where the batches are known to
    differ, else by one over the group's true length. With ``"weight"`` (tokens, samples) the
    losses are multiplied by it, and the gradients divided by the sum before the step.
    """

    def __init__(self, run: FitRun, size: int, first: int | None = None) -> None:
        self.size, self.taken = size, 0
        self.total: Any = None
        self.unit: Any = None
        self._shares: list[float] | None = None
        if run.counts is not None:
            first = run.state.batch_idx if first is None else first
            counts = [run.counts.of(i) for i in range(first, first + size)]
            known = [c for c in counts if c is not None]
            if len(known) == size and len(set(known)) > 1:
                self._shares = [c / sum(known) for c in known]
        self._scaled = run.precision.has_scaler

    def scale(self, loss: Tensor, weight: Any) -> Tensor:
        """Returns the loss to differentiate."""
        place, self.taken = self.taken, self.taken + 1
        if weight is None:
            return loss.mul(self._shares[place]) if self._shares else loss.div(self.size)
        if isinstance(weight, Tensor):
            weight = weight.detach()
        if self._scaled:  # sums of many tokens would leave the range of fp16
            if self.unit is None:
                self.unit = weight.clamp(min=1) if isinstance(weight, Tensor) else max(weight, 1)
            weight = weight / self.unit
        self.total = weight if self.total is None else self.total + weight
        return loss.mul(weight)

    def finish(self, parameters: Sequence[Tensor]) -> bool:
        """Divides the gradients by the sum of the weights; False where there is nothing to do."""
        factor: Any = None
        if self.total is not None:
            if not isinstance(self.total, Tensor) or self.total.device.type == "cpu":
                if not self.total:  # no sync: it is a number, or lies in host memory
                    return False
                factor = 1.0 / self.total
            else:  # on a device nothing is read: a group of weight 0 gets gradients of 0
                factor = torch.where(self.total > 0, 1.0 / self.total, 0.0)
        elif 0 < self.taken < self.size:  # some batches were skipped by returning None
            factor = self.size / self.taken
        gradients = [p.grad for p in parameters if p.grad is not None]
        if factor is not None and gradients:
            torch._foreach_mul_(gradients, factor)
        return self.taken > 0
