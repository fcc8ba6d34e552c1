"""What ``fit`` returns: one dict of plain numbers per epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from lightkit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: Keys that say where a row belongs and are no metrics.
_POSITION = ("epoch", "step", "time")


class History(list[dict[str, float]]):
    """A list of one dict per epoch, oldest first.

    Each dict holds "epoch" (counted from 1), "step" (optimizer steps so far), "time" (seconds)
    and the exact epoch mean of every logged name::

        history[-1]["val_loss"]     # the last epoch
        history["val_loss"]         # one number per epoch, nan where an epoch has none
        history.best("val_loss")    # the dict of the best epoch
        history.plot()              # curves.png in the folder of the run; shown in a notebook

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
        return [name for name in seen if name not in _POSITION]

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
