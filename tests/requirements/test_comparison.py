"""What docs/comparison.md says of lightkit is shown by tests that exist, and each row is whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
PEERS = re.findall(r"^\| \[(\w+)\]\(https://", PAGE, re.MULTILINE)
#: The cells of each row that compares.
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.search(r"\| [-✓~?] \| [-✓~?] \|", line)
]
PROVED = [row for row in ROWS if row[-1].startswith("`tests/")]


def test_every_peer_has_a_column_in_every_table():
    heads = [line.split("|") for line in PAGE.splitlines() if line.startswith("| | ")]
    assert len(PEERS) == 12
    assert all([cell.strip() for cell in head[2:14]] == PEERS for head in heads)
    assert all(set(row[1:13]) <= set("✓~-?") for row in ROWS)
    assert {len(row) for row in PROVED} == {15}
    assert all(row[13] in "✓~" for row in PROVED)
    assert len({row[0] for row in ROWS}) == len(ROWS) > 90


@pytest.mark.parametrize("row", PROVED, ids=lambda row: row[0])
def test_the_proof_exists(row):
    path, test = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[-1]).groups()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_is_left_to_others_names_them():
    left = [row for row in ROWS if row not in PROVED]
    assert len(left) > 10
    assert all(len(row) == 14 and row[-1] for row in left)
