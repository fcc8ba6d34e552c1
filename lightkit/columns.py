"""One logged name: its values since the last flush and their sums since the epoch began."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightkit.errors import LoggingError, did_you_mean

_REDUCTIONS = ("mean", "sum", "min", "max")


def reduction(name: str, given: Any) -> str:
    """Returns "mean", "sum", "min" or "max" for a ``reduce_fx``; torch's functions are known too.

    Raises:
        LoggingError: For anything else.
    """
    text = getattr(given, "__name__", given)
    text = {"amin": "min", "amax": "max"}.get(text, text)
    if text not in _REDUCTIONS:
        raise LoggingError(
            f"self.log({name!r}, reduce_fx={given!r}): allowed are 'mean', 'sum', 'min' and 'max'."
            f"{did_you_mean(str(text), _REDUCTIONS)}"
        )
    return str(text)


class Column:
    """The values of one name.

    Attributes:
        values: Detached scalars since the last flush, on their devices.
        weights: Their weights (samples, tokens), numbers or scalar tensors.
        live: The last value of the running epoch; None once its mean is known.
        window: The reduced value of the last flush.
        folded: The values of the last flush as floats.
        total: The reduced value since the epoch began, None before the first flush.
        metric: The torchmetrics object logged under this name.
        owner: The MetricCollection it belongs to.
        returned: Whether the values were returned by the step and not logged.
    """

    __slots__ = (
        "_sum",
        "_weight",
        "folded",
        "live",
        "logger",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "owner",
        "prog_bar",
        "reduce",
        "returned",
        "total",
        "values",
        "weights",
        "window",
    )

    def __init__(
        self,
        name: str,
        *,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool = True,
        on_epoch: bool = False,
        reduce: str = "mean",
        metric: Any = None,
    ) -> None:
        self.name, self.prog_bar, self.logger = name, prog_bar, logger
        self.on_step, self.on_epoch, self.reduce = on_step, on_epoch, reduce
        self.metric, self.owner, self.returned = metric, None, False
        self.values: list[Tensor | float] = []
        self.weights: list[Tensor | float] = []
        self.live: Tensor | float | None = None
        self.window = math.nan
        self.folded: list[float] = []
        self.total: float | None = None
        self._sum = 0.0
        self._weight = 0.0

    @property
    def step_name(self) -> str:
        """The name of its curve over steps."""
        return f"{self.name}_step" if self.on_step and self.on_epoch else self.name

    @property
    def epoch_name(self) -> str:
        """The name of its curve over epochs."""
        return f"{self.name}_epoch" if self.on_step and self.on_epoch else self.name

    def check_unchanged(self) -> None:
        """Raises where a value was changed in place after it was logged."""
        for value in self.values:
            if isinstance(value, Tensor) and value._version:
                raise LoggingError(
                    f"A value logged as {self.name!r} was changed in place afterwards, so what was "
                    f"logged is lost. Log a copy: self.log({self.name!r}, value.clone())."
                )

    def fold(self, values: list[float], weights: list[float]) -> None:
        """Takes the values of a window, read by now, into the sums, and empties the window."""
        self.values.clear()
        self.weights.clear()
        self.folded = values
        if self.reduce == "mean":
            top = math.fsum(v * w for v, w in zip(values, weights, strict=True) if w)
            weight = math.fsum(weights)
            self.window = top / weight if weight else math.nan
            self._sum += top
            self._weight += weight
            self.total = self._sum / self._weight if self._weight else math.nan
            return
        if self.reduce == "sum":
            self.window = math.fsum(values)
            self.total = self.window + (self.total or 0.0)
            return
        pick = min if self.reduce == "min" else max
        self.window = pick(values)
        self.total = self.window if self.total is None else pick(self.total, self.window)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the metric object, as plain types and tensors."""
        names = ("name", "prog_bar", "logger", "on_step", "on_epoch", "reduce")
        state = {n: getattr(self, n) for n in (*names, "window", "total", "_sum", "_weight")}
        state["values"] = list(self.values)
        state["weights"] = list(self.weights)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Column:
        """Returns the column that `state_dict` was taken from."""
        names = ("name", "prog_bar", "logger", "on_step", "on_epoch", "reduce")
        column = cls(**{n: state[n] for n in names})
        column.values, column.weights = list(state["values"]), list(state["weights"])
        column.window, column.total = state["window"], state["total"]
        column._sum, column._weight = state["_sum"], state["_weight"]
        if column.values:
            column.live = column.values[-1]
        return column

