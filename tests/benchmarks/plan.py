"""What a call of the suite is to measure, and how long."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from tests.benchmarks import gains, pairs, scenarios
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.tables import Table

#: Packages of scenarios by the name of the group: each module has ``tables(plan)``.
GROUPS = {"scenarios": scenarios, "gains": gains}


@dataclass
class Plan:
    """Handed to every scenario.

    Attributes:
        contenders: Names of those that take part and are installed.
        rounds: Rounds of fresh processes.
        quick: Whether everything is cut short, to see that it works; its numbers say nothing.
        long: Whether what takes many minutes is measured too.
        out: Where progress is told.
    """

    contenders: list[str] = field(default_factory=lambda: installed(list(CONTENDERS)))
    rounds: int = 9
    quick: bool = False
    long: bool = False
    out: TextIO = field(default_factory=lambda: sys.stderr)

    def say(self, text: str) -> None:
        """Tells what is going on."""
        print(f"  {text}", file=self.out, flush=True)

    def trainers(self) -> list[str]:
        """Returns the loop by hand and the others that take part, without variants."""
        return ["hand", *(n for n in self.contenders if n != "hand" and not CONTENDERS[n].variant)]


def installed(names: list[str]) -> list[str]:
    """Returns those of the contenders that can run here."""
    return [name for name in names if CONTENDERS[name].installed]


def left_out(names: list[str]) -> str:
    """Returns a sentence on the contenders that are not installed; empty where all are."""
    missing = [name for name in names if not CONTENDERS[name].installed]
    if not missing:
        return ""
    packages = dict.fromkeys(str(CONTENDERS[name].package) for name in missing)
    return f"Left out, not installed: {', '.join(missing)} (pip install {' '.join(packages)})."


def known() -> dict[str, Any]:
    """Returns all scenarios: their modules by name, those of ``scenarios`` before the gains."""
    found: dict[str, Any] = {}
    for package in GROUPS.values():
        for info in pkgutil.iter_modules(package.__path__):
            found[info.name] = importlib.import_module(f"{package.__name__}.{info.name}")
    return found


def run(name: str, plan: Plan) -> Iterator[Table]:
    """Yields the tables of a scenario, each as soon as it is measured.

    A module of gains that has no ``tables`` has ``pairs``, and nothing to say here if there are none.
    """
    module = known()[name]
    if hasattr(module, "tables"):
        yield from module.tables(plan)
    else:
        yield from pairs.tables(module, rounds=5 * plan.rounds, quick=plan.quick)
