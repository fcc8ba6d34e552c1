"""The page of examples: as short as it says, and shorter than where they come from (S1-09, S1-11)."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs/examples.md").read_text(encoding="utf-8")
#: Lines that make data, which are no part of a program.
DATA = ("images = ", "pixels = ", "y = torch", "points = ")


def lines(code: str) -> int:
    return sum(
        bool(line.strip()) and not line.startswith((*DATA, "#")) for line in code.splitlines()
    )


def test_the_lines_are_those_of_the_table():
    """The examples themselves are run by tests/test_docs.py."""
    first, *sections = re.split(r"^## ", PAGE, flags=re.M)
    blocks = r"```python\n(.*?)```"
    imports = lines(re.findall(blocks, first, re.S)[0])
    counted = {}
    for section in sections:
        program = re.findall(blocks, section, re.S)[0]
        counted[section.partition("\n")[0]] = imports + lines(program)
    rows = re.findall(r"^\| ([A-Z][\w ]+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
    assert {name: int(here) for name, here, _ in rows} == counted
    assert all(int(here) < int(there) for _, here, there in rows)
