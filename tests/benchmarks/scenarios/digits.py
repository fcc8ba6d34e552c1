"""The job of configs/digits.yaml: DataLoader, schedule, validation, on each level."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.levels import level_tables
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Table


def tables(plan: Plan) -> Iterator[Table]:
    yield from level_tables("digits", plan)
