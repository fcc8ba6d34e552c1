"""One logged name: its values since the last flush and their sums since the epoch began."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightkit.errors import LoggingError, did_you_mean

_REDUCTIONS = ("mean", "sum", "min", "max", "std", "last", "running:50")
_OPTIONS = ("name", "prog_bar", "logger", "on_step", "on_epoch", "reduce")
_SUMS = ("returned", "aliases", "window", "total", "tail", "_sum", "_weight", "_count")
#: What one process has of a column: an amount (a sum, or the least or greatest value), the weight
#: of it (of a "std" the sum of squared distances from the mean), and of how many values.
Part = tuple[float, float, float]
NOTHING: Part = (0.0, 0.0, 0.0)


def reduction(name: str, given: Any) -> str:
    """Returns the reduction that a ``reduce_fx`` means; torch's functions are known too.

    Raises:
        LoggingError: For anything else.
    """
    text = str(getattr(given, "__name__", given))
    text = {"amin": "min", "amax": "max"}.get(text, text)
    kind, _, number = text.partition(":")
    running = kind == "running" and number.isdecimal() and int(number) > 0
    if not running and text not in _REDUCTIONS:
        near = (
            " Did you mean 'running:50'?" if kind == "running" else did_you_mean(kind, _REDUCTIONS)
        )
        raise LoggingError(
            f"self.log({name!r}, reduce_fx={given!r}): allowed are 'mean', 'sum', 'min', 'max', "
            f"'std', 'last', and 'running:50' for the mean of the last 50 values.{near}"
        )
    return text


def scalar(name: str, value: Tensor) -> Tensor:
    """Returns a tensor with one element without its dimensions.

    Raises:
        LoggingError: For a tensor with another number of elements.
    """
    if value.numel() != 1:
        raise LoggingError(
            f"self.log({name!r}): the value has the shape {tuple(value.shape)}, but one number is "
            f"needed. Take its mean, or log its elements under several names with self.log_dict."
        )
    return value.reshape(())


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
        by_metric: Whether one is, also where this rank has none of it.
        stash: States of the metric object that wait until all loaders are done; None for none.
        length: How many of the last values count: 1 for "last", n for "running:n", 0 for all.
        tail: These values of all ranks in the order of batches, with their weights.
        fresh: Those of this rank that are not in it yet: number since the last time, value, weight.
        weighed: Whether values count by the samples that they are the mean of.
        part: What was read and is not yet in window and total, which are those of all ranks.
        last_weight: The weight of the last value that was read.
        alone: Whether rank zero alone has it.
        returned: Whether the values were returned by the step and not logged.
        aliases: Whether its values share the storage of a parameter or buffer of the task.
        loader: The evaluation loader that the values belong to, -1 for none of its own.
    """

    __slots__ = (
        "_count",
        "_sum",
        "_weight",
        "aliases",
        "alone",
        "by_metric",
        "folded",
        "fresh",
        "last_weight",
        "length",
        "live",
        "loader",
        "logger",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "part",
        "prog_bar",
        "reduce",
        "returned",
        "stash",
        "tail",
        "total",
        "values",
        "weighed",
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
        self.metric: Any = metric
        self.returned, self.loader = False, -1
        self.aliases = self.alone = False
        self.by_metric = metric is not None
        self.stash: dict[str, Any] | None = None
        self.part, self.last_weight = NOTHING, 1.0
        running = reduce.startswith("running:")
        self.length = int(reduce[8:]) if running else int(reduce == "last")
        self.weighed = running or reduce == "mean"
        self.tail: list[tuple[float, float]] = []
        self.fresh: list[tuple[int, float, float]] = []
        self.values: list[Tensor | float] = []
        self.weights: list[Tensor | float] = []
        self.live: Tensor | float | None = None
        self.window = math.nan
        self.folded: list[float] = []
        self.total: float | None = None
        self._sum = 0.0
        self._weight = 0.0
        self._count = 0.0

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
            if isinstance(value, Tensor) and not value.is_inference() and value._version:
                raise LoggingError(
                    f"A value logged as {self.name!r} was changed in place afterwards, so what was "
                    f"logged is lost. Log a copy: self.log({self.name!r}, value.clone())."
                )

    def fold(self, values: list[float], weights: list[float]) -> None:
        """Takes the values of a window, read by now, into the sums, and empties the window."""
        self.keep(values, weights)
        self.settle([self.part], [self.fresh])

    def keep(self, values: list[float], weights: list[float]) -> None:
        """Takes them into this rank's part and empties the window; `settle` is to follow."""
        self.values.clear()
        self.weights.clear()
        self.folded = values
        amount, weight, count = self.part
        if self.reduce == "mean":
            amount += _sum(v * w for v, w in zip(values, weights, strict=True) if w)
            weight += _sum(weights)
            self.last_weight = weights[-1]
        elif self.reduce == "sum":
            amount += _sum(values)
        elif self.reduce == "std":
            amount, weight, _ = _pooled([self.part, _spread(values)])
        elif self.length:
            pairs = enumerate(zip(values, weights, strict=True), int(count))
            new = [(number, value, weight) for number, (value, weight) in pairs if weight]
            self.fresh = [*self.fresh, *new][-self.length :]
        else:
            amount = self._extreme([*([amount] if count else []), *values])
        self.part = (amount, weight, count + len(values))

    def settle(
        self, parts: Sequence[Part], fresh: Sequence[Sequence[tuple[int, float, float]]] = ()
    ) -> bool:
        """Takes the parts of all ranks into window and total; own parts count from 0 again.

        The order of the parts is that of the ranks, and sums are exact, so that all ranks have the
        same bits.

        Args:
            parts: Those of all ranks.
            fresh: Where `length` is not 0: what is new on all ranks.

        Returns:
            Whether there was a value on any rank.
        """
        self.part, self.fresh = NOTHING, []
        parts = [part for part in parts if part[2]]
        if not parts:
            return False
        amounts = [amount for amount, _, _ in parts]
        if self.length:
            self._take_last(fresh)
        elif self.reduce == "std":
            spread = _pooled(parts)
            self._sum, self._weight, self._count = _pooled(
                [(self._sum, self._weight, self._count), spread]
            )
            self.window = _deviation(spread)
            self.total = _deviation((self._sum, self._weight, self._count))
        elif self.reduce in ("mean", "sum"):
            self._take(_sum(amounts), _sum(weight for _, weight, _ in parts))
        else:
            self._take(self._extreme(amounts), 0.0)
        return True

    def _take(self, amount: float, weight: float) -> None:
        """Makes window and total of what all ranks have together."""
        if self.reduce == "mean":
            self.window = amount / weight if weight else math.nan
            self._sum += amount
            self._weight += weight
            self.total = self._sum / self._weight if self._weight else math.nan
        elif self.reduce == "sum":
            self.window = amount
            self.total = amount + (self.total or 0.0)
        else:
            self.window = amount
            self.total = amount if self.total is None else self._extreme([self.total, amount])

    def _take_last(self, fresh: Sequence[Sequence[tuple[int, float, float]]]) -> None:
        """Makes window and total of the last values: batches came to the ranks in turn."""
        turns = sorted(
            (number, rank, value, weight)
            for rank, new in enumerate(fresh)
            for number, value, weight in new
        )
        self.tail = [*self.tail, *((value, weight) for _, _, value, weight in turns)]
        self.tail = self.tail[-self.length :]
        if len(self.tail) == 1:
            self.total = self.tail[0][0]
        else:
            weight = _sum(weight for _, weight in self.tail)
            amount = _sum(value * weight for value, weight in self.tail)
            self.total = amount / weight if weight else math.nan
        self.window = self.total

    def last_part(self, value: float, weight: float) -> Part:
        """Returns the part that its last value alone would be."""
        if self.reduce == "mean":
            value = value * weight if weight else 0.0
        return (value, weight if self.weighed else 0.0, 1.0)

    def _extreme(self, values: list[float]) -> float:
        """Returns the least or greatest value; nan where one is nan, whatever the order."""
        pick: Any = min if self.reduce == "min" else max
        return math.nan if any(map(math.isnan, values)) else pick(values)

    def state_dict(self) -> dict[str, Any]:
        """Returns options and sums, which are those of all ranks, as plain types."""
        state = {name: getattr(self, name) for name in (*_OPTIONS, *_SUMS)}
        return {**state, "alone": True} if self.alone else state

    def window_state(self) -> dict[str, Any]:
        """Returns the values of this rank that were not read yet, with their weights."""
        return {"values": list(self.values), "weights": list(self.weights)}

    def set_window(self, state: dict[str, Any]) -> None:
        """Takes back what `window_state` returned."""
        # Copies: what comes out of a file was filled in place, which `check_unchanged` would see.
        self.values = [v.clone() if isinstance(v, Tensor) else v for v in state["values"]]
        self.weights = list(state["weights"])
        if self.values:
            self.live = self.values[-1]

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Column:
        """Returns the column that `state_dict` was taken from."""
        column = cls(**{name: state[name] for name in _OPTIONS})
        for name in _SUMS:
            setattr(column, name, state.get(name, getattr(column, name)))
        column.alone = state.get("alone", False)
        return column


def _sum(values: Iterable[float]) -> float:
    """Returns the exact sum; inf and nan go on as in any sum, where ``math.fsum`` would raise."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


def _spread(values: list[float]) -> Part:
    """Returns sum, squared distances from the mean and number of values."""
    if not values:
        return NOTHING
    total = _sum(values)
    mean = total / len(values)
    return total, _sum((value - mean) * (value - mean) for value in values), float(len(values))


def _pooled(parts: Iterable[Part]) -> Part:
    """Returns the spread of all parts together (Chan, Golub and LeVeque, 1983)."""
    total, squares, count = NOTHING
    for own, distances, number in parts:
        if count and number:
            apart = own / number - total / count  # not ** 2, which raises where * gives inf
            squares += apart * apart * (number * count / (number + count))
        total, squares, count = total + own, squares + distances, count + number
    return total, squares, count


def _deviation(spread: Part) -> float:
    """Returns the standard deviation as ``torch.std`` does; nan for a single value."""
    _, squares, count = spread
    return math.sqrt(squares / (count - 1)) if count > 1 else math.nan
