"""What ``training_step`` returned: the loss, its weight, and its share in a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.distributed.ranks import local_part
from lightkit.errors import UsageError, ranks_named

if TYPE_CHECKING:
    from lightkit.run import FitRun


def unpack(outputs: Any) -> tuple[Tensor | None, Any, Mapping[str, Any] | None]:
    """Returns loss, weight and the whole mapping of what ``training_step`` returned."""
    if isinstance(outputs, Tensor):
        return outputs, None, None
    if outputs is None:
        return None, None, None
    if isinstance(outputs, Mapping):
        weight = outputs.get("weight")
        if weight is not None:
            weight = _checked_weight(weight)
        if isinstance(outputs.get("loss"), Tensor):
            return outputs["loss"], weight, outputs
        there = ", ".join(map(str, outputs)) or "nothing"
        what = f"'loss' is {type(outputs['loss']).__name__}" if "loss" in outputs else there
        raise UsageError(
            f"training_step returned a mapping without a tensor under 'loss' (it has: {what}). "
            f"Return {{'loss': loss}}, optionally with 'weight' and with values to log, or None to "
            f"skip the batch."
        )
    raise UsageError(
        f"training_step returned {type(outputs).__name__}. Return the loss as a tensor, a mapping "
        f"with 'loss' (and perhaps 'weight'), or None to skip the batch."
    )


def _checked_weight(weight: Any) -> Any:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise UsageError(
                f"training_step returned a 'weight' of shape {tuple(weight.shape)}, but one number "
                f"is needed: of how many samples or tokens the loss is the mean."
            )
        return weight.reshape(()) if weight.ndim else weight
    if not isinstance(weight, Real) or not float(weight) >= 0:
        raise UsageError(
            f"training_step returned 'weight': {weight!r}. It is the number of samples or tokens "
            f"of which the loss is the mean: 0 or more, or a tensor with one element."
        )
    return weight


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


def added(loss: Tensor, more: Any) -> Tensor:
    """Returns a loss with what a listener of ``on_loss`` returned; None adds nothing.

    Raises:
        UsageError: For what is no tensor with one element.
    """
    if more is None:
        return loss
    if hasattr(more, "full_tensor"):  # over sharded parameters: a collective
        more = more.full_tensor()
    if not isinstance(more, Tensor) or more.numel() != 1:
        given = f"a tensor of shape {tuple(more.shape)}" if isinstance(more, Tensor) else repr(more)
        raise UsageError(
            f"on_loss returned {given}, which cannot be added to the loss. Return a tensor with "
            f"one element, such as 0.01 * weight.square().sum(), or None to add nothing."
        )
    return loss + more.reshape(())


class Weighing:
    """Makes the gradient of a group that of the one big batch.

    Each loss counts by the samples in its batch, relative to the first one, so that equal batches
    are divided by the group's length and nothing else. With ``"weight"`` (tokens, samples) the
    losses are multiplied by it. What is then missing to a mean is made up for by one multiplication
    of the gradients before the step, and only where the batches were not equal.

    Over ranks gradients are averaged while they are made. Weights are summed over ranks, once per
    step; without weights every batch of a group counts the same, whatever its samples, since no rank
    knows those of the others.
    """

    def __init__(self, run: FitRun, size: int) -> None:
        self._size, self._taken = size, 0
        self._first: int | None = None  # samples in the first batch
        self._relative = 0.0  # the batches taken, each by its samples over those of the first
        self._total: Any = None  # the sum of the weights
        self._unit: Any = None
        self._scaled, self._ranks = run.scaled, run.strategy.ranks
        self._several = self._ranks.world_size > 1

    def scale(self, loss: Tensor, weight: Any, samples: int) -> Tensor:
        """Returns the loss to differentiate.

        Args:
            loss: The mean over a batch.
            weight: What it is the mean of, as returned by the step; None for the samples.
            samples: Samples in the batch.

        Raises:
            UsageError: Some batches of a group have a weight, and others have none.
        """
        if self._taken and (weight is None) is not (self._total is None):
            raise UsageError(
                "training_step returned 'weight' for some batches of one optimizer step and not "
                "for others, so they cannot be averaged. Return it always, or never."
            )
        self._taken += 1
        if weight is not None:
            return self._weighted(loss, weight.detach() if isinstance(weight, Tensor) else weight)
        self._first = samples if self._first is None else self._first
        share = samples / self._first if self._first and not self._several else 1.0
        self._relative += share
        if self._size == 1:
            return loss
        return (loss if share == 1.0 else loss.mul(share)).div(self._size)

    def _weighted(self, loss: Tensor, weight: Any) -> Tensor:
        if self._scaled:  # sums of many tokens would leave the range of fp16
            if self._unit is None:
                self._unit = weight.clamp(min=1) if isinstance(weight, Tensor) else max(weight, 1)
                if self._several:  # one unit for all, or their losses could not be added
                    self._unit = self._over_ranks(self._unit, loss)
            weight = weight / self._unit
        self._total = weight if self._total is None else self._total + weight
        return loss.mul(weight)

    def finish(self, parameters: Sequence[Tensor]) -> bool:
        """Makes the gradients those of a mean; False where there is nothing to step with."""
        if self._several and self._total is not None:
            like = next((p.grad for p in parameters if p.grad is not None), None)
            if like is not None:
                self._total = self._over_ranks(self._total, like) / self._ranks.world_size
        if not self._taken or is_zero(self._total):
            return False
        factor: Any = None
        if self._total is None:
            if self._relative != self._size:
                factor = self._size / self._relative
        elif isinstance(self._total, Tensor) and self._total.device.type != "cpu":
            # On a device nothing is read: a group of weight 0 gets gradients of 0.
            factor = torch.where(self._total > 0, 1.0 / self._total, 0.0)
        else:
            factor = 1.0 / self._total
        gradients = []
        if factor is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            if self._several:  # of a sharded gradient each rank multiplies its part
                gradients = [local_part(g) for g in gradients]
            torch._foreach_mul_(gradients, factor)
        return True

    @property
    def weighted(self) -> bool:
        """Whether the batches of the group have weights."""
        return self._total is not None

    def check_alike(self) -> None:
        """Raises where only some ranks have weights: the others would not come to their sum."""
        given = [row[0] for row in self._ranks.exchange([self._total is not None], "weights")]
        if len(set(given)) > 1:
            lack = [rank for rank, has in enumerate(given) if not has]
            raise UsageError(
                f"training_step returned no 'weight' on {ranks_named(lack)}, but on the others it did. "
                f"Return it on all ranks and for all batches, or never."
            )

    def _over_ranks(self, weight: Any, like: Tensor) -> Tensor:
        """Returns the sum of a weight over ranks: a collective on the device, without a host sync."""
        own = torch.as_tensor(weight, dtype=torch.float32, device=like.device)
        return self._ranks.total(own)


def check_over_ranks(run: FitRun, weighing: Weighing) -> None:
    """Raises for what only a backward shows, before ranks wait for others that do not come."""
    run.strategy.check_step()
    if run.weighted is None:
        weighing.check_alike()  # a collective, on the CPU, at the first step
        run.weighted = weighing.weighted
    elif weighing.weighted is not run.weighted:
        raise UsageError(
            f"training_step returned {'a' if weighing.weighted else 'no'} 'weight' on rank "
            f"{run.strategy.ranks.rank}, unlike in the first step, and the sum over ranks needs all "
            f"of them. Return it for all batches, or never."
        )


def is_zero(weight: Any) -> bool:
    """Tells whether a weight is 0, where that can be told without waiting for a device."""
    if isinstance(weight, Tensor) and weight.device.type != "cpu":
        return False
    return weight is not None and not weight


def after_manual(run: FitRun, outputs: Any) -> Any:
    """Keeps what the step of a task that optimizes by itself returned."""
    if run.scaled:
        run.precision.end_step()
    if outputs is None:
        return None
    if isinstance(outputs, Mapping):
        loss, extra = outputs.get("loss"), outputs
    else:
        loss, extra = outputs, None
    if isinstance(loss, Tensor):
        loss = loss.detach()
        run.metrics.add_loss(loss.reshape(()), None)
    if extra is None:
        return {"loss": loss}
    for name, value in extra.items():
        if name != "loss":
            run.metrics.add_returned("train", name, value)
    return {**extra, "loss": loss}


def check_skip(run: FitRun) -> None:
    """Raises where a step returned None, and other ranks wait for its gradients."""
    if run.several:
        raise UsageError(
            "training_step returned None, which skips a batch in one process. Over several ranks "
            "the others wait for this one's gradients: return {'loss': loss * 0, 'weight': 0} "
            "instead, and the weight of the loss with every other batch."
        )


def check_progress(run: FitRun, steps: int, skipped: int) -> None:
    """Raises after an epoch of skipped batches alone where only steps or losses would end the fit.

    Args:
        run: The run, after an epoch.
        steps: ``global_step`` before it.
        skipped: Batches that were skipped before it.
    """
    flow, unlimited = run.flow, run.limits.max_epochs < 0 and run.flow.deadline is None
    if unlimited and run.state.global_step == steps and flow.skipped > skipped:
        raise UsageError(
            f"training_step returned None for all {flow.skipped - skipped} batches of an epoch, so no "
            f"step was taken, and with max_epochs=-1 the fit would never end. Return the loss, or set "
            f"max_epochs or max_time."
        )
