"""Number formats: the only room with autocast and a GradScaler.

`resolve_precision` turns ``Trainer(precision=...)`` into one `Precision`. The loop asks it for a
context around the user's step, for backward and for the optimizer's step, and never knows which
format runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit.errors import ConfigError, OptimizerError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NAMES: dict[str, str] = {
    "32": "32-true",
    "32-true": "32-true",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "bf16-true",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "16-true": "16-true",
    "64": "64-true",
    "64-true": "64-true",
}
_TRUE: dict[str, torch.dtype] = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


class Precision:
    """How numbers are kept and computed in one run; made by `resolve_precision`.

    Attributes:
        name: One of "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true".
        dtype: What floating parameters, buffers and batches are converted to; None leaves them.
        autocast: A context for the user's steps, entered again for every batch, or None where
            there is nothing to enter. It cannot be entered twice at once.
        has_scaler: Whether losses are scaled (fp16), so that gradients need `unscale`.
        moved: What the last `step` returned, for steps that user code takes.
    """

    has_scaler = False
    moved = True

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.autocast = autocast

    def convert_module(self, module: nn.Module) -> None:
        """Converts floating parameters and buffers in place; integers and complex stay."""
        if self.dtype is torch.bfloat16:
            module.bfloat16()
        elif self.dtype is torch.float16:
            module.half()
        elif self.dtype is torch.float64:
            module.double()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates ``loss``, scaled where there is a scaler."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """Brings the gradients to their true size, once per step; more calls do nothing."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> bool:
        """Takes one step of ``optimizer``.

        Args:
            optimizer: The raw optimizer.
            closure: Computes the loss and its gradients again, for optimizers that ask for it.

        Returns:
            False when schedules must not move because the scaler skipped a step.
        """
        if closure is None:
            optimizer.step()
        else:
            optimizer.step(closure)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the scaler's state; empty where there is no scaler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; an empty state changes nothing."""


class ScaledPrecision(Precision):
    """16-mixed: the loss is scaled up, and a step with overflown gradients is skipped.

    Whether a step was skipped is known on the device only. On the CPU, and where torch itself
    reads it (every optimizer that is not fused), it is read at once. For a fused optimizer on CUDA
    it is copied without waiting and read one step later: the schedules move with the skipped step
    and stand still at the next one instead, so that nothing waits for the device.
    """

    has_scaler = True

    def __init__(
        self, name: str, device: torch.device, *, autocast: AbstractContextManager[Any]
    ) -> None:
        super().__init__(name, autocast=autocast)
        self.scaler = torch.amp.GradScaler(device.type)
        self._unscaled: set[int] = set()
        self._stepped = False
        # The flag of the last step, if it is read late: a host copy and the event that ends it.
        self._late: tuple[Tensor, torch.cuda.Event | None] | None = None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """See `Precision.backward`."""
        self._update()
        self.scaler.scale(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        # The scale moves before the next backward and not after a step: the gradients of a second
        # optimizer, which waits for its step, were made with the present one.
        if self._stepped:
            self.scaler.update()
            self._unscaled.clear()
            self._stepped = False

    def unscale(self, optimizer: Optimizer) -> None:
        """See `Precision.unscale`. It takes what ``self.optimizers()`` returned, too."""
        optimizer = getattr(optimizer, "raw_optimizer", optimizer)
        if id(optimizer) not in self._unscaled:
            self.scaler.unscale_(optimizer)
            self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> bool:
        """See `Precision.step`. The closure is called once, before the step.

        Raises:
            OptimizerError: For LBFGS, which calls its closure several times within a step.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError("LBFGS cannot run with precision='16-mixed'. Use 'bf16-mixed'.")
        if closure is not None:
            closure()
        self.unscale(optimizer)
        self.scaler.step(optimizer)
        self._stepped = True
        # Private, and the only place that knows: the scale itself moves later (see _update).
        flags = list(self.scaler._found_inf_per_device(optimizer).values())
        found = flags[0] if len(flags) == 1 else torch.stack([f.cpu() for f in flags]).sum()
        if not (found.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False)):
            self.moved = not bool(found)  # host sync on a GPU: torch just waited for this flag
            return self.moved
        self.moved = not self._read_late()
        copy = found.to("cpu", non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._late = (copy, event)
        return self.moved

    def _read_late(self) -> bool:
        """Tells whether the step before was skipped."""
        if self._late is None:
            return False
        flag, event = self._late
        if event is not None:
            event.synchronize()  # host sync with the end of the step before, which has passed
        return bool(flag)

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale, its growth, and whether the schedules owe a stop."""
        self._update()
        # get_scale within is a host sync; a checkpoint reads the device anyway.
        return {"scaler": self.scaler.state_dict(), "skipped": self._read_late()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; that of a run without a scaler is empty."""
        if state:
            self.scaler.load_state_dict(state["scaler"])
            self._late = (torch.tensor(state["skipped"]), None)


class _DefaultDtype:
    """Makes ``dtype`` the one of new floating tensors, so that ``torch.zeros(3)`` fits."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._before = torch.get_default_dtype()

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        torch.set_default_dtype(self._before)


def resolve_precision(value: str | int, device: torch.device | str) -> Precision:
    """Returns the precision that ``Trainer(precision=value)`` asks for.

    Args:
        value: 32, "bf16-mixed" ("bf16"), "16-mixed" (16), "bf16-true", "16-true" or 64.
        device: Where the run computes.

    Raises:
        ConfigError: For an unknown name, or one that the device cannot compute.
    """
    device = torch.device(device)
    given = str(value).lower()
    if isinstance(value, bool) or given not in _NAMES:
        raise ConfigError(
            f"precision={value!r} is not known. Write 32, 'bf16-mixed', '16-mixed', 'bf16-true', "
            f"'16-true' or 64.{did_you_mean(given, _NAMES)}"
        )
    name = _NAMES[given]
    if name == "64-true" and device.type == "mps":
        raise ConfigError("precision=64 does not exist on mps. Use precision=32, or the CPU.")
    if name in _TRUE:
        dtype = _TRUE[name]
        return Precision(name, dtype=dtype, autocast=_DefaultDtype(dtype))
    if name == "32-true":
        return Precision(name)
    half = torch.bfloat16 if name == "bf16-mixed" else torch.float16
    # One object for the whole run: making it costs more than entering it.
    autocast = torch.autocast(device.type, dtype=half)
    if name == "bf16-mixed":
        return Precision(name, autocast=autocast)
    return ScaledPrecision(name, device, autocast=autocast)
