"""Importing: time and modules beyond those of torch."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator

from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table
from tests.benchmarks.turns import failed, rounds


def measure(contender: str) -> dict[str, float]:
    """Imports what a user of a contender imports, after torch; milliseconds of the process."""
    import torch  # noqa: F401

    name = CONTENDERS[contender].imports
    before, began = len(sys.modules), time.process_time()
    importlib.import_module(str(name))
    return {"ms": (time.process_time() - began) * 1e3, "modules": len(sys.modules) - before}


def tables(plan: Plan) -> Iterator[Table]:
    names = [name for name in plan.contenders if CONTENDERS[name].imports]
    results = rounds("tests.benchmarks.scenarios.imports:measure", names, plan.rounds)
    rows = [
        (
            f"`import {CONTENDERS[name].imports}`",
            Spread.of([turn["ms"] for turn in turns]).show(0),
            f"{max(turn['modules'] for turn in turns):,}",
        )
        for name, turns in results.items()
    ]
    header = ("", "ms of process time", "modules beyond torch's")
    notes = failed(names, results)
    yield Table("imports", "Importing, after torch", header, rows, notes)
