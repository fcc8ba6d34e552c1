"""Schedules of the learning rate that last as long as the fit: one cycle, warm-up, cosine.

Each function returns what ``configure_optimizers`` returns beside its optimizer::

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [lk.one_cycle(optimizer, self.trainer)]

The rate that a group of the optimizer was given is its highest, so groups keep their proportions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightkit.errors import OptimizerError

if TYPE_CHECKING:
    from lightkit.trainer import Trainer


def one_cycle(
    optimizer: Optimizer, trainer: Trainer, *, steps: int | None = None, **options: Any
) -> dict[str, Any]:
    """Returns torch's ``OneCycleLR`` over the whole fit, moved by steps.

    The rate rises and falls once while the momentum falls and rises: Smith and Topin (2018),
    "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates".

    Args:
        optimizer: The optimizer.
        trainer: The trainer of the fit, ``self.trainer``.
        steps: Optimizer steps of the cycle; None for those of the fit.
        options: Further arguments of ``OneCycleLR``, such as ``pct_start`` (default 0.3).
            ``max_lr`` is by default the rate of each group.

    Raises:
        OptimizerError: It is not known how many steps the fit has.
    """
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    options = {"max_lr": highest, "total_steps": _steps(trainer, steps), **options}
    return {"scheduler": OneCycleLR(optimizer, **options), "interval": "step"}


def warmup_cosine(
    optimizer: Optimizer,
    trainer: Trainer,
    *,
    warmup: int | float = 0.05,
    final: float = 0.0,
    steps: int | None = None,
) -> dict[str, Any]:
    """Returns a schedule that rises in a line and falls by half a cosine to the end of the fit.

    In step ``s`` (from 0) of the ``w`` steps of warm-up the rate is ``(s + 1) / (w + 1)`` of the
    group's, as with torch's ``LinearLR`` from ``1 / (w + 1)`` on; then it goes the way of
    ``CosineAnnealingLR``. The cosine is that of Loshchilov and Hutter (2017), "SGDR".

    Args:
        optimizer: The optimizer.
        trainer: The trainer of the fit, ``self.trainer``.
        warmup: Steps of warm-up, or as a float their part of all; 0 for the cosine alone.
        final: Where the rate ends, as a part of the group's.
        steps: Optimizer steps of the schedule; None for those of the fit.

    Raises:
        OptimizerError: It is not known how many steps the fit has, or the warm-up is no part of it,
            or ``final`` none of the rate.
    """
    total = _steps(trainer, steps)
    rise = _warmup_steps(warmup, total)
    if not (isinstance(final, (int, float)) and 0 <= final <= 1):
        raise OptimizerError(f"final={final!r} is not possible: it is a part of the rate, 0 to 1.")

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        turned = math.pi * min(step - rise, total - rise) / (total - rise)
        return final + (1 - final) * (1 + math.cos(turned)) / 2

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def warmup(
    optimizer: Optimizer, trainer: Trainer, *, warmup: int | float = 0.05, steps: int | None = None
) -> dict[str, Any]:
    """Returns a schedule that rises as that of `warmup_cosine` does, and stays there.

    Args:
        optimizer: The optimizer.
        trainer: The trainer of the fit, ``self.trainer``.
        warmup: Steps of warm-up, or as a float their part of all.
        steps: Optimizer steps of which the warm-up is a part; None for those of the fit. A warm-up
            in steps needs neither.

    Raises:
        OptimizerError: As by `warmup_cosine`.
    """
    total = max(warmup, 0) + 1 if type(warmup) is int else _steps(trainer, steps)
    rise = _warmup_steps(warmup, total)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (rise + 1), 1.0))
    return {"scheduler": schedule, "interval": "step"}


def _steps(trainer: Trainer, given: int | None) -> int:
    """Returns how many optimizer steps a schedule lasts."""
    if given is None and not hasattr(type(trainer), "estimated_stepping_batches"):
        raise OptimizerError(f"self.trainer is needed, not an object of {type(trainer).__name__}.")
    planned = trainer.estimated_stepping_batches if given is None else given
    if type(planned) is int and planned > 0:
        return planned
    if given is not None:
        raise OptimizerError(f"steps={given!r} is not possible: a whole number above 0, or None.")
    why = "the fit has no end" if planned is not None else "the training loader has no length"
    raise OptimizerError(
        f"How long this schedule is to be is not known: {why}. Give the Trainer max_steps (or "
        f"max_epochs, where the loader has a length), or the schedule steps=."
    )


def _warmup_steps(given: int | float, total: int) -> int:
    part = isinstance(given, float) and 0 <= given < 1
    steps = round(given * total) if part else given
    if type(steps) is int and 0 <= steps < total and not isinstance(given, bool):
        return steps
    raise OptimizerError(
        f"warmup={given!r} is not possible in {total} steps. Give a number of steps below that, or "
        f"their part as a float, such as 0.05."
    )
