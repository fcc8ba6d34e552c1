"""The table at the top of a page, put together from the tables that stand below it."""

from __future__ import annotations

import re

from tests.benchmarks.tables import Table

#: Tables and what their columns are called.
COLUMNS = {
    "mlp/bare": "MLP: bare",
    "mlp/log": "MLP: loss logged",
    "mlp/newcomer": "MLP: as it comes",
    "mlp/full": "MLP: everything on",
    "digits/newcomer": "digits: as it comes",
    "digits/full": "digits: everything on",
    "medium/full": "medium: everything on",
}


def summary(page: str) -> Table:
    """Returns the median ratios to the loop by hand of all levels that stand in a page."""
    found: dict[str, dict[str, str]] = {}
    there = []
    for name in COLUMNS:
        block = re.search(f"<!-- table: {name} -->\n(.*?)<!-- /table -->", page, re.DOTALL)
        rows = re.findall(r"^\| (\S.*?) \| [\d,]+ \| ([\d.]+) \(", block[1] if block else "", re.M)
        if rows:
            there.append(name)
        for contender, ratio in rows:
            found.setdefault(contender, {})[name] = ratio
    cells = [
        (contender, *(ratios.get(name, "") for name in there))
        for contender, ratios in found.items()
    ]
    header = ("", *(COLUMNS[name] for name in there))
    return Table("summary", "Time of a step to that of the loop by hand, medians", header, cells)
