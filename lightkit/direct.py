"""Shorter ways into torch: what its wrappers look at in every call is looked at once per fit.

`Update` is ``optimizer.step()`` and `Backward` is ``loss.backward()``, with the same results, hooks
and errors. On a tiny model the wrappers take a quarter of a step (``tests/cost/test_step.py``).
Wherever something is not as expected, the ordinary way is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

# Torch's own: the engine behind backward(), and the hooks of all optimizers.
_engine: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
_profiling: Callable[[], bool] | None = getattr(torch.autograd, "_profiler_enabled", None)
_BEFORE = getattr(torch_optimizer, "_global_optimizer_pre_hooks", None)
_AFTER = getattr(torch_optimizer, "_global_optimizer_post_hooks", None)
# Makes the wrapper around the step of every class of optimizers.
_wrapper: Callable[..., Any] | None = getattr(Optimizer, "profile_hook_step", None)
_CODE = None if _wrapper is None else getattr(_wrapper(len), "__code__", None)


class Update:
    """Calls ``optimizer.step()``, without the wrapper that torch puts around it where it is idle.

    The wrapper makes a label for the profiler and calls hooks. Where a profiler runs, a hook was
    registered, or somebody has replaced ``step``, it is called as usual.

    Args:
        optimizer: The optimizer; its ``step`` needs no closure.
    """

    __slots__ = ("_after", "_before", "_class_step", "_optimizer", "_own", "_plain")

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._class_step: Any = type(optimizer).step
        # A schedule puts a wrapper of its own onto the object, to note that a step was taken.
        self._own: Any = vars(optimizer).get("step")
        plain = getattr(self._class_step, "__wrapped__", None)
        # A decorator of the user's looks the same but for its code: `wraps` copies all marks.
        code = getattr(self._class_step, "__code__", None)
        if None in (code, _profiling, _BEFORE, _AFTER) or code is not _CODE:
            plain = None
        if self._own is not None and not (
            hasattr(self._own, "_wrapped_by_lr_sched")
            and getattr(self._own, "__wrapped__", None) is self._class_step
        ):
            plain = None
        self._before = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        self._after = getattr(optimizer, "_optimizer_step_post_hooks", None)
        known = self._before is not None and self._after is not None
        self._plain: Callable[[Optimizer], Any] | None = plain if known else None

    def __call__(self) -> None:
        """Takes the step."""
        optimizer, plain = self._optimizer, self._plain
        if (
            plain is None
            or self._before
            or self._after
            or _BEFORE
            or _AFTER
            or _profiling()  # type: ignore[misc]
            or type(optimizer).step is not self._class_step
            or vars(optimizer).get("step") is not self._own
        ):
            optimizer.step()
            return
        if self._own is not None:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # as the schedule's wrapper
        plain(optimizer)


class Backward:
    """Calls ``loss.backward()``, without looking again at what the loop knows.

    The loop gives one plain tensor with one element that needs a gradient; torch's own way checks
    for all else that may be given. The gradient of the loss, a one, is made anew each time as there:
    autograd may give its memory to a parameter as the ``.grad``.
    """

    __slots__ = ("_works",)

    def __init__(self) -> None:
        # Not tried yet: on a machine with a GPU the first backward starts threads, after which the
        # workers of a loader could not differentiate by themselves.
        self._works: bool | None = None

    def __call__(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``, a 0-dim tensor, to those of the parameters."""
        works = self._works
        if works is None:
            works = self._works = _works()
        if not works or type(loss) is not Tensor or loss.dtype.is_complex:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        _run(loss, torch.ones_like(loss, requires_grad=False))


def _run(loss: Tensor, one: Tensor) -> None:
    _engine((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)  # type: ignore[misc]


def _works() -> bool:
    """Tries whether the engine takes what this version of torch is known to give it."""
    try:
        x = torch.ones((), device="cpu", requires_grad=True)
        with torch.enable_grad():
            _run(x * 2, torch.ones((), device="cpu"))
        return x.grad is not None and torch.equal(x.grad, torch.full((), 2.0, device="cpu"))
    except Exception:  # noqa: BLE001  whatever it is, torch's own way remains
        return False
