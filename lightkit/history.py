"""What ``fit`` returns: one dict of plain numbers per epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from lightkit.errors import UsageError, did_you_mean
from lightkit.screen import number

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: Keys that say where a row belongs and are no metrics.
POSITION = ("epoch", "step", "time")
#: From empty to full, for the cells of a curve in characters.
_BLOCKS, _ASCII = " ▁▂▃▄▅▆▇█", " ..::||##"


class History(list[dict[str, float]]):
    """A list of one dict per epoch, oldest first.

    Each dict holds "epoch" (counted from 1), "step" (optimizer steps so far), "time" (seconds)
    and the exact epoch mean of every logged name::

        history[-1]["val_loss"]     # the last epoch
        history["val_loss"]         # one number per epoch, nan where an epoch has none
        history.best("val_loss")    # the dict of the best epoch
        history.plot()              # curves.png in the folder of the run; shown in a notebook
        print(history.sketch())     # small curves for a terminal

    Attributes:
        folder: The folder of the run; None on other ranks than zero and where nothing is written.
    """

    folder: Path | None = None

    @overload
    def __getitem__(self, key: SupportsIndex) -> dict[str, float]: ...
    @overload
    def __getitem__(self, key: slice) -> History: ...
    @overload
    def __getitem__(self, key: str) -> list[float]: ...
    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:
        """Returns an epoch's dict for a number, a History for a slice, a column for a name.

        Raises:
            KeyError: No epoch has this name.
        """
        if isinstance(key, str):
            if not any(key in row for row in self):
                raise KeyError(
                    f"no epoch has {key!r}; there are {', '.join(self.names()) or 'no metrics'}."
                    f"{did_you_mean(key, self.names())}"
                )
            return [row.get(key, math.nan) for row in self]
        if isinstance(key, slice):
            return History(super().__getitem__(key))
        return super().__getitem__(key)

    def __repr__(self) -> str:
        if not self:
            return "History(no epochs)"
        names = self.names()
        shown = [n for n in ("train_loss", "val_loss") if n in names] or names[:2]
        parts = []
        for name in shown:
            known = [value for value in self[name] if not math.isnan(value)] or [math.nan]
            arrow = f"{known[0]:.4g} -> {known[-1]:.4g}" if len(known) > 1 else f"{known[0]:.4g}"
            parts.append(f"{name} {arrow}")
        epochs = "1 epoch" if len(self) == 1 else f"{len(self)} epochs"
        return f"History({epochs}: {', '.join(parts)})" if parts else f"History({epochs})"

    def names(self) -> list[str]:
        """Returns the metrics of all epochs, in the order in which they first came."""
        seen = {name: None for row in self for name in row}
        return [name for name in seen if name not in POSITION]

    def best(self, name: str, mode: Literal["min", "max"] = "min") -> dict[str, float]:
        """Returns the dict of the best epoch, the earliest of equals; nan is never best.

        Args:
            name: A metric, for example "val_loss".
            mode: "min" where lower is better, "max" where higher is.

        Raises:
            KeyError: No epoch has this name.
            UsageError: ``mode`` is neither, or every value is nan.
        """
        if mode not in ("min", "max"):
            raise UsageError(f"mode={mode!r}; allowed are 'min' and 'max'.")
        known = [(v, row) for v, row in zip(self[name], self, strict=True) if not math.isnan(v)]
        if not known:
            raise UsageError(f"{name!r} is nan in every epoch, so no epoch is best.")
        return (min if mode == "min" else max)(known, key=lambda pair: pair[0])[1]

    def load(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Replaces all epochs, for example by those of a checkpoint."""
        self[:] = [dict(row) for row in rows]

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a ``pandas.DataFrame``: a row per epoch, with "epoch" as its index.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "History.to_pandas needs pandas: pip install pandas. "
                "(list(history) is a list of plain dicts.)"
            ) from error
        frame = pandas.DataFrame(list(self))
        return frame.set_index("epoch") if "epoch" in frame else frame

    def plot(
        self,
        path: str | Path | None = None,
        names: Sequence[str] | None = None,
        *,
        close: bool = False,
    ) -> Figure:
        """Draws the metrics over the epochs; train_x and val_x share one picture.

        A notebook shows what is returned at the end of a cell.

        Args:
            path: Save the picture there (PNG, or what the name's end says); None: as ``curves.png``
                in the folder of the run, where there is one.
            names: Only these metrics, in this order; None for all.
            close: Whether ``pyplot.show()`` shall not show it later, where the file is enough.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: matplotlib is not installed.
            KeyError: No epoch has one of the names.
        """
        pyplot = pyplot_for("History.plot")
        groups: dict[str, list[str]] = {}
        for name in self.names() if names is None else names:
            groups.setdefault(_subject(name), []).append(name)
        columns = min(len(groups), 3) or 1
        rows = math.ceil(len(groups) / columns) or 1
        size = (4.5 * columns, 3.2 * rows)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
        epochs = [row.get("epoch", i + 1) for i, row in enumerate(self)]
        for axis, (subject, members) in zip(axes.flat, groups.items(), strict=False):
            for name in members:
                # Epochs without a value are left out, so that the line goes on over them.
                points = [p for p in zip(epochs, self[name], strict=True) if not math.isnan(p[1])]
                axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name)
            axis.set(title=subject, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        for axis in axes.flat[len(groups) :]:
            axis.remove()
        if path is None and self.folder is not None:
            path = self.folder / "curves.png"
        return finished(figure, path, close=close)

    def sketch(self, width: int = 72, *, ascii_only: bool = False) -> str:
        """Returns a small curve of characters for each metric, for a terminal.

        The numbers beside a curve are its highest and its lowest value. Epochs without a finite
        value are left out; a metric of one epoch alone is its number.

        Args:
            width: Columns that a line may have, at least 20.
            ascii_only: Whether the terminal shows no other characters.
        """
        lines = []
        for name in self.names():
            points = [
                (row.get("epoch", i), row[name])
                for i, row in enumerate(self, 1)
                if math.isfinite(row.get(name, math.nan))
            ]
            if len(points) < 2:
                lines += [f"{name}, epoch {x}: {number(y)}"[:width] for x, y in points]
                continue
            lines.append(f"{name}, epochs {points[0][0]} to {points[-1][0]}"[:width])
            values = [y for _, y in points]
            labels = [number(max(values)), "", number(min(values))]
            rows = _curve(points, max(min(width, 72) - 12, 8), _ASCII if ascii_only else _BLOCKS)
            lines += [
                f"{label:>9} | {row}".rstrip() for label, row in zip(labels, rows, strict=True)
            ]
        return "\n".join(lines)


def best_epoch(
    history: History, monitors: Iterable[Sequence[str]], at_least: int = 1
) -> tuple[str, dict[str, float]] | None:
    """Returns the best epoch and the metric that tells so; None where no monitor has values.

    Args:
        history: The epochs.
        monitors: Names with "min" or "max"; the first that is known decides.
        at_least: How many epochs must have a value of it.
    """
    for name, mode in monitors:
        known = [row[name] for row in history if name in row]
        if len(known) >= at_least and not all(map(math.isnan, known)):
            return name, history.best(name, "max" if mode == "max" else "min")
    return None


def _curve(points: list[tuple[float, float]], columns: int, marks: str) -> list[str]:
    """Returns three lines with the area under the points, joined by straight lines."""
    (first, _), (last, _) = points[0], points[-1]
    low, high = min(y for _, y in points), max(y for _, y in points)
    levels = []
    for column in range(columns):
        x = first + (last - first) * column / (columns - 1)
        (x0, y0), (x1, y1) = next(
            (pair for pair in pairwise(points) if x <= pair[1][0]), points[-2:]
        )
        y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        levels.append(1 + round(23 * (y - low) / (high - low)) if high > low else 12)
    return ["".join(marks[min(max(level - b, 0), 8)] for level in levels) for b in (16, 8, 0)]


def pyplot_for(who: str) -> Any:
    """Returns ``matplotlib.pyplot``; raises `ImportError` with the name of who needs it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install matplotlib") from error
    return pyplot


def finished(figure: Figure, path: str | Path | None, *, close: bool = False) -> Figure:
    """Returns a figure that is drawn, after it was saved where there is a path."""
    from matplotlib import pyplot

    if path is not None:
        figure.savefig(path, dpi=150)
    if close or "inline" in pyplot.get_backend():
        pyplot.close(figure)  # a notebook shows what is returned; open it would be shown twice
    return figure


def _subject(name: str) -> str:
    """Returns what is measured: ``loss`` for train_loss and val_loss."""
    for stage in ("train_", "val_", "test_"):
        if name.startswith(stage) and len(name) > len(stage):
            return name[len(stage) :]
    return name
