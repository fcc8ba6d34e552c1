"""Every requirement has exactly one test, or a line in README.md that says why it has none."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
#: How many requirements each of the five texts asks for.
NUMBER = {"S0": 28, "S1": 20, "S2": 14, "S3": 10, "S4": 12}


def named_tests() -> list[tuple[str, str]]:
    """Returns the file and the id of each test that is named after one."""
    found = []
    for path in sorted(HERE.glob("test_s?.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = re.match(r"test_(S\d)_(\d\d)_\w", node.name)
                assert name, f"{path.name}: {node.name} is named after no requirement"
                found.append((path.stem, f"{name[1]}-{name[2]}"))
    return found


def rows() -> dict[str, str]:
    """Returns the reason for each id in the table of README.md."""
    page = (HERE / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (S\d-\d\d) \| (.+) \|$", page, re.MULTILINE))


def test_every_requirement_has_one_test_or_a_reason():
    ids = {f"{text}-{n:02}" for text, number in NUMBER.items() for n in range(1, number + 1)}
    counted = Counter([*(name for _, name in named_tests()), *rows()])
    assert set(counted) == ids
    assert [name for name, times in counted.items() if times > 1] == []


def test_each_stands_in_the_file_of_its_text():
    assert [name for file, name in named_tests() if file != f"test_{name[:2].lower()}"] == []


def test_reasons_are_sentences():
    assert all(len(reason.split()) > 8 and reason.endswith(".") for reason in rows().values())
