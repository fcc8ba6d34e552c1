"""Tables: medians, quartiles, and ratios to the reference of the same round."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MARKS = "<!-- table: {} -->", "<!-- /table -->"


@dataclass
class Table:
    """A table of a page.

    Attributes:
        name: What its place in a page is called: "mlp/bare".
        title: What it shows.
        header: Names of the columns.
        rows: Texts of the cells.
        notes: Sentences below it.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: list[Sequence[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Returns the table as it stands in a page, its title and notes around it."""
        lines = [f"**{self.title}**", "", _row(self.header), "|" + "---|" * len(self.header)]
        lines += map(_row, self.rows)
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Spread:
    """The median of some values and their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def show(self, digits: int = 2) -> str:
        """Returns the text of a cell: "0.85 (0.83 to 0.90)"."""
        low, median, high = (f"{value:,.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Returns the spread of the ratios, value by value: both of a ratio are of one round."""
    return Spread.of([a / b for a, b in zip(values, reference, strict=True)])


def differences(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Returns the spread of the differences, value by value."""
    return Spread.of([a - b for a, b in zip(values, reference, strict=True)])


def write(table: Table, pages: Sequence[Path]) -> list[Path]:
    """Puts a table between its marks, in all pages that have them; returns these pages."""
    begin, end = MARKS[0].format(table.name), MARKS[1]
    place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    written = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if place.search(text):
            new = f"{begin}\n{table.markdown()}\n{end}"
            page.write_text(place.sub(lambda _, new=new: new, text), encoding="utf-8")
            written.append(page)
    return written
