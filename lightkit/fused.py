"""Which optimizers run fused: faster updates in one kernel, where they are known to be equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightkit.distributed.ranks import local_part
from lightkit.errors import OptimizerError

# Where fused updates are known to equal the plain ones within 1e-7. Half types are left out: the
# fused SGD kernel for the CPU does not move them at all (torch 2.13).
_TYPES: tuple[type[Optimizer], ...] = (Adam, AdamW, SGD)
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64)

# When they are never slower, on the CPU; docs/performance.md has the measurements.
#: SGD without momentum makes one operation of each tensor either way. Of few ones it is slower
#: fused, as the call itself costs 3 us more; and of large ones it is all a matter of memory.
_FEW_TENSORS, _LARGE = 6, 100_000
#: Operations that plain updates make of each tensor, at least: SGD with momentum; Adam and AdamW.
_MOMENTUM, _ADAM = 3, 7
#: The fused kernels wake all threads for every tensor of more bytes than a cache line has ...
_CACHE_LINE = 64
#: ... and most of torch's other operations one for each so many numbers, so none for small tensors.
_NUMBERS_PER_THREAD = 32768


class FusedChoice:
    """Runs optimizers fused where that is known to be right, and keeps them so.

    Args:
        optimizers: The optimizers of the run.
        task: The module whose parameters they hold.
        device: Where the run computes.
        strict: Run all of them fused, and raise where one cannot. False leaves out those that
            might be slower for it.

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
        self._device, self._strict = device, strict
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
        if any(map(nn.parameter.is_lazy, params)):
            return "a parameter of a lazy layer has no size yet"
        if not all(map(_dense, params)):
            return "a parameter is a view with gaps, which a fused update would write into"
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
        if not self._strict and self._device.type == "cpu" and _maybe_slower(optimizer, group):
            return "it might be slower"
        return ""

    def apply(self) -> None:
        """Sets the flags of the chosen optimizers, of groups added later too."""
        for optimizer in self.chosen:
            for group in optimizer.param_groups:
                if not self._reason(optimizer, group):
                    group["fused"] = True
                if group["fused"] and group.get("momentum"):
                    _fill_momentum(optimizer, group["params"])
                if group["fused"]:
                    _align_state(optimizer, group["params"])
            # Lets GradScaler hand over the flag of a skipped step on the device, without a sync.
            every = all(group["fused"] for group in optimizer.param_groups)
            cast(Any, optimizer)._step_supports_amp_scaling = every


def _maybe_slower(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Tells whether fused updates of a group on the CPU might take longer than plain ones.

    With several threads that is where they would wake them all more often than plain ones do: on a
    machine that has something else to do, be it the workers of a loader, each such call may wait for
    a hundredth of a second or more.
    """
    params: list[nn.Parameter] = group["params"]
    threads = torch.get_num_threads()
    if type(optimizer) is SGD and not group["momentum"]:
        large = sum(p.numel() for p in params) > len(params) * _LARGE
        return threads > 1 or len(params) < _FEW_TENSORS or large
    if threads == 1:
        return False
    operations = _MOMENTUM if type(optimizer) is SGD else _ADAM
    parts = [local_part(p) for p in params]
    fused = sum(p.numel() * p.element_size() > _CACHE_LINE for p in parts)
    plain = sum(p.numel() >= threads * _NUMBERS_PER_THREAD for p in parts)
    return fused > operations * plain


def _order(t: Tensor) -> list[int]:
    """Returns in which order the numbers lie in memory; where a size is 1, a stride says nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


def _dense(p: nn.Parameter) -> bool:
    """Tells whether a parameter's numbers lie in memory without gaps, in whatever order."""
    if p.layout is not torch.strided:
        return False
    if p.is_contiguous() or hasattr(p, "to_local"):
        return True
    return _order(torch.empty_like(p, device="meta")) == _order(p)


def check_gradients(optimizer: Optimizer) -> None:
    """Raises where a gradient lies in memory in another order than its parameter.

    Autograd makes none. Where the user's code puts one there by itself, the fused kernels for the
    CPU would take the wrong numbers, without a word.

    Raises:
        OptimizerError: With the shape of the parameter, and what to write.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            if p.grad is not None and _order(p.grad) != _order(p):
                raise OptimizerError(
                    f"The gradient of a parameter of shape {tuple(p.shape)} was put there by hand "
                    f"and lies in memory in another order, which fused updates cannot read. Copy "
                    f"it (p.grad = torch.empty_like(p).copy_(gradient)), or use "
                    f"Trainer(fused=False)."
                )


def _align_state(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    # A checkpoint of a run with another memory format: fused updates read it in memory's order.
    for p in params:
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and _order(value) != _order(p):
                state[name] = torch.empty_like(p).copy_(value)


def _fill_momentum(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    # From zero the first update is the same. From nothing torch would take memory as it is when
    # the scaler skips the first step, and fail when a parameter gets its first gradient late.
    for p in params:
        state = optimizer.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
