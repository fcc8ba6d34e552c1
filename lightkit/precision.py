"""Number formats: the only room with autocast and a GradScaler.

`resolve_precision` turns ``Trainer(precision=...)`` into one `Precision`. The loop asks it for a
context around the user's step, for backward and for the optimizer's step, and never knows which
format runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit.direct import Backward, Update
from lightkit.errors import ConfigError, NonFiniteError, OptimizerError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer

_log = logging.getLogger("lightkit")

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
_TF32 = (
    "this GPU multiplies float32 matrices several times faster in TF32, which keeps 10 of the 23 bits "
    'of their fractions: torch.set_float32_matmul_precision("high")'
)
#: With a smaller scale gradients of more than 6.8e10 overflow: they are inf or nan themselves.
_HOPELESS = 2.0**-20


class Precision:
    """How numbers are kept and computed in one run; made by `resolve_precision`.

    Attributes:
        name: One of "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true".
        dtype: What floating parameters, buffers and batches are converted to; None leaves them.
        autocast: A context for the user's steps, entered again for every batch, or None where
            there is nothing to enter. It cannot be entered twice at once.
        has_scaler: Whether losses are scaled (fp16), so that gradients need `unscale`.
        optimizers: All optimizers of the run.
        stop_on_nan: Whether numbers that are not finite end the run.
    """

    has_scaler = False

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
        self.optimizers: Sequence[Optimizer] = ()
        self.stop_on_nan = True

    def convert_module(self, module: nn.Module) -> None:
        """Converts floating parameters and buffers in place; integers and complex stay."""
        if self.dtype is torch.bfloat16:
            module.bfloat16()
        elif self.dtype is torch.float16:
            module.half()
        elif self.dtype is torch.float64:
            module.double()

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns what is differentiated for ``loss``: itself, or scaled where there is a scaler."""
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates ``loss``, scaled where there is a scaler."""
        self.scaled(loss).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def bind_backward(self) -> Callable[[Tensor], None]:
        """Returns what differentiates the losses of automatic optimization."""
        return Backward()

    def bind_update(self, optimizer: Optimizer) -> Callable[[], None]:
        """Returns what takes the steps of automatic optimization, where no closure is needed."""
        return Update(optimizer)

    def unscale(self, optimizer: Optimizer) -> None:
        """Brings the gradients to their true size, once per step; more calls do nothing."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
        """Takes one step of ``optimizer``.

        Args:
            optimizer: The raw optimizer.
            closure: Computes the loss and its gradients again, for optimizers that ask for it.
        """
        if closure is None:
            optimizer.step()
        else:
            optimizer.step(closure)

    def end_step(self, then: Callable[[], None] | None = None) -> None:
        """Ends a step of all optimizers: once per group, in manual optimization per batch.

        Args:
            then: What follows a step that was not skipped: the schedules move. It is called at
                once, or by `settle` where only the device knows yet whether it was skipped.
        """
        if then is not None:
            then()

    def settle(self) -> None:
        """Lets follow what waits for the last step; needed before the schedules are looked at."""

    def note(self) -> str:
        """Returns what there is to say about the format when losses are not finite; "" if nothing."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Returns the scaler's state; empty where there is no scaler."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; an empty state changes nothing."""


class ScaledPrecision(Precision):
    """16-mixed: the loss is scaled up, and a step with overflown gradients is skipped.

    A lower scale tells that a step was skipped, and only the device knows it. On the CPU it is
    read at once. On CUDA it is copied without waiting and read when the next step is about to be
    taken, so that the host never waits for the batch under way. The schedules of a step move when
    its scale is read: every step is taken with the same rate on both, and only who looks at a rate
    between two steps sees the former one on CUDA.

    With several ranks the gradients are averaged before they are unscaled, which spreads every inf
    and nan to all of them: they skip the same steps and have the same scale without a word.
    """

    has_scaler = True

    def __init__(
        self, name: str, device: torch.device, *, autocast: AbstractContextManager[Any]
    ) -> None:
        super().__init__(name, autocast=autocast)
        self.scaler = torch.amp.GradScaler(device.type)
        self.last_scale = self.scaler.get_scale()  # no host sync: nothing is on the device yet
        self._unscaled: set[int] = set()  # optimizers whose gradients have their true size
        self._stepped: set[int] = set()  # those that stepped since the scale moved
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._reads_late = device.type == "cuda"
        # The scale after the last step where it is not read yet, and what waits for it.
        self._late: tuple[Tensor, Callable[[], None] | None] | None = None
        self._warned = False

    def scaled(self, loss: Tensor) -> Tensor:
        """See `Precision.scaled`."""
        if self._stepped:  # these gradients may be for an optimizer that stepped, once more
            self._unscaled -= self._stepped
        return self.scaler.scale(loss)

    def bind_backward(self) -> Callable[[Tensor], None]:
        """See `Precision.bind_backward`."""
        return self.backward

    def bind_update(self, optimizer: Optimizer) -> Callable[[], None]:
        """See `Precision.bind_update`."""
        return partial(self.step, optimizer)

    def unscale(self, optimizer: Optimizer) -> None:
        """See `Precision.unscale`. It takes what ``self.optimizers()`` returned, too."""
        self.settle()
        optimizer = getattr(optimizer, "raw_optimizer", optimizer)
        if id(optimizer) in self._unscaled:
            return
        if id(optimizer) in self._stepped:
            self._update()  # it steps several times within one training_step
        self.scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
        """See `Precision.step`. The closure is called once, before the step.

        A fused optimizer is given the flag of an overflow on the device. For every other one torch
        reads the flag, and on CUDA that is a host sync in each step.

        Raises:
            OptimizerError: For LBFGS, which calls its closure several times within a step.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError("LBFGS cannot run with precision='16-mixed'. Use 'bf16-mixed'.")
        if closure is not None:
            closure()
        self.unscale(optimizer)
        self.scaler.step(optimizer)
        self._stepped.add(id(optimizer))

    def end_step(self, then: Callable[[], None] | None = None) -> None:
        """See `Precision.end_step`. The scale moves once, however many optimizers stepped.

        Raises:
            NonFiniteError: As by `settle`.
        """
        if not self._stepped:
            if then is not None:
                then()  # an ``optimizer_step`` of the user's that waits for more batches
            return
        self._update()
        scale = self._scale().to("cpu", non_blocking=True)  # from CUDA into pinned memory
        if self._event is not None:
            self._event.record()
        self._late = (scale, then)
        if not self._reads_late:
            self.settle()

    def settle(self) -> None:
        """See `Precision.settle`.

        Raises:
            NonFiniteError: The scale has become so small that nothing is learned any more.
        """
        if self._late is None:
            return
        (scale, then), self._late = self._late, None
        if self._event is not None:
            self._event.synchronize()  # host sync with the end of the last step that was taken
        before, self.last_scale = self.last_scale, float(scale)
        if self.last_scale >= before:
            if then is not None:
                then()
        elif self.last_scale < 1.0:
            self._say_small()

    def _say_small(self) -> None:
        """Tells once that the scale is below 1, and raises where it cannot become better."""
        text = (
            f"precision='16-mixed': gradients overflow again and again, and the scale of the loss "
            f"has fallen to {self.last_scale:.3g}. Such steps are skipped. Use "
            f"precision='bf16-mixed', or look for the operation with detect_anomaly=True"
        )
        if self.last_scale < _HOPELESS and self.stop_on_nan:
            raise NonFiniteError(f"{text}. Trainer(terminate_on_nan=False) trains on.")
        if not self._warned:
            self._warned = True
            _log.warning("%s.", text)

    def _scale(self) -> Tensor:
        scale = self.scaler._get_scale_async()
        assert scale is not None  # it is made by the first backward
        return scale

    def _update(self) -> None:
        """Moves the scale, and brings gradients that wait for their step to the new one."""
        waiting = [
            parameter.grad
            for optimizer in self.optimizers
            if id(optimizer) not in self._unscaled
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        before = self._scale().clone() if waiting else None
        self.scaler.update()
        if before is not None:
            # By 2, 1/2 or 1, and on the device. Of an optimizer that gathers over several batches.
            torch._foreach_mul_(waiting, self._scale() / before)
        self._unscaled.clear()
        self._stepped.clear()

    def note(self) -> str:
        """See `Precision.note`."""
        return (
            f". The scale of precision='16-mixed' has come to {self.last_scale:.6g}; "
            f"precision='bf16-mixed' has the range of float32 and needs none"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and its growth; host sync, as for everything in a checkpoint."""
        return {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; that of a run without a scaler is empty."""
        if state:
            self.scaler.load_state_dict(state["scaler"])
            self.last_scale = state["scaler"]["scale"]


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


def hints(precision: Precision, device: torch.device, optimizers: Sequence[Optimizer]) -> list[str]:
    """Returns what can be faster on a CUDA card with a choice of the user's; nothing elsewhere."""
    if device.type != "cuda":
        return []
    if precision.has_scaler:
        slow = [o for o in optimizers if not getattr(o, "_step_supports_amp_scaling", False)]
        return [
            f"{type(o).__name__} does not run fused, so under precision='16-mixed' torch waits for "
            f"the device in each of its steps. Adam, AdamW and SGD run fused."
            for o in slow[:1]
        ]
    if precision.name != "32-true" or torch.version.hip is not None:
        return []
    has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
    return [_TF32] if has_tf32 and full_float32() else []


def full_float32() -> bool:
    """Tells whether CUDA multiplies float32 matrices in full, with nobody having chosen that."""
    # Newer versions of torch know "none": not chosen. Their old way of asking raises where the
    # choice was made the new way, so it is asked of versions only that have no other.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if chosen is None:
        return torch.get_float32_matmul_precision() == "highest"
    return bool(chosen == "none")
