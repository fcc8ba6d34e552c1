"""Which optimizers run fused: faster updates in one kernel, where they are known to be equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightkit.errors import OptimizerError

# Where fused updates were measured: faster, and equal to the plain ones within 1e-7. Half types are
# left out: the fused SGD kernel for the CPU does not move them at all (torch 2.13).
_TYPES: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD)
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64)


class FusedChoice:
    """Runs optimizers fused where that is known to be right, and keeps them so.

    Args:
        optimizers: The optimizers of the run.
        task: The module whose parameters they hold.
        device: Where the run computes.
        strict: Raise where one of them cannot run fused.

    Attributes:
        chosen: The optimizers that run fused by this choice (not those made so by the user).

    Raises:
        OptimizerError: With ``strict``, naming the optimizer and the reason.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        task: nn.Module,
        device: torch.device,
        *,
        strict: bool,
    ) -> None:
        self._device = device
        # Layers with sparse gradients: fused updates refuse them, and only at the first step.
        self._sparse = {
            id(p)
            for m in task.modules()
            if getattr(m, "sparse", False) is True
            for p in m.parameters(recurse=False)
        }
        self.chosen: list[Optimizer] = []
        for optimizer in optimizers:
            reasons = [r for g in optimizer.param_groups if (r := self._reason(optimizer, g))]
            if not reasons:
                self.chosen.append(optimizer)
            elif strict and not all(g.get("fused") for g in optimizer.param_groups):
                raise OptimizerError(
                    f"fused=True is not possible for {type(optimizer).__name__}: {reasons[0]}. "
                    f"Leave fused=None, which fuses what can be."
                )
        self.apply()

    def _reason(self, optimizer: Optimizer, group: dict[str, Any]) -> str:
        """Returns why ``group`` cannot run fused, or an empty text."""
        params: list[nn.Parameter] = group["params"]
        if type(optimizer) not in _TYPES:
            return "only Adam, AdamW and SGD themselves are known to be equal"
        if group.get("foreach") is not None or group.get("fused") is not None:
            return "its own foreach or fused is set"
        if group.get("capturable") or group.get("differentiable"):
            return "it is capturable or differentiable"
        if any(isinstance(v, Tensor) for v in (group["lr"], *group.get("betas", ()))):
            return "its rate or its betas are tensors"
        if any(optimizer.state.get(p) for p in params):
            return "it has taken steps already"
        kinds = {p.device.type for p in params}
        if self._device.type not in _DEVICES or kinds - {self._device.type}:
            return f"its parameters are not all on one device of {' or '.join(_DEVICES)}"
        if any(p.dtype not in _DTYPES for p in params):
            return "its parameters are not all float32 or float64"
        meshes = {getattr(p, "device_mesh", None) for p in params}
        if type(optimizer) is SGD and meshes != {None}:
            return "torch has no fused SGD for parameters that are split over ranks"
        if len(meshes) > 1:
            return "its parameters are split over ranks in different ways"
        if any(id(p) in self._sparse for p in params):
            return "a layer with sparse=True gives it sparse gradients"
        frozen = not all(p.requires_grad for p in params)
        if group.get("momentum") and (group["dampening"] or frozen):
            return "it has momentum together with dampening or frozen parameters"
        return ""

    def apply(self) -> None:
        """Sets the flags of the chosen optimizers, of groups added later too."""
        for optimizer in self.chosen:
            for group in optimizer.param_groups:
                if not self._reason(optimizer, group):
                    group["fused"] = True
                if group["fused"] and group.get("momentum"):
                    _fill_momentum(optimizer, group["params"])
            # Lets GradScaler hand over the flag of a skipped step on the device, without a sync.
            every = all(group["fused"] for group in optimizer.param_groups)
            cast(Any, optimizer)._step_supports_amp_scaling = every


def _fill_momentum(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    # From zero the first update is the same. From nothing torch would take memory as it is when
    # the scaler skips the first step, and fail when a parameter gets its first gradient late.
    for p in params:
        state = optimizer.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
