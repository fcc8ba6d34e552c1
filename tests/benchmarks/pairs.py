"""Two ways of doing one thing, in one process and in turn: A B B A. The frame of the gains.

A module of ``tests/benchmarks/gains`` has ``pairs(quick)``, which yields a `Pair` for each row of its
table, and ``BASE`` and ``OTHER``, the names of the two ways.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks import fresh
from tests.benchmarks.tables import Spread, Table, ratios

#: Seconds that a chunk takes at least, where its number of units is chosen here.
CHUNK = 0.01
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter, "thread": time.thread_time}


@dataclass
class Pair:
    """Two ways of doing one thing.

    Attributes:
        what: What is done; the name of the row.
        base: Does it so many times in the one way.
        other: And in the other.
        unit: What is done once: "step", "batch", "epoch".
        clock: "cpu" (all threads of the process), "thread" (this one) or "wall" (for what waits).
        times: How often in a chunk; None for so often that it takes 10 ms.
        threads: Threads that torch computes with.
        busy: Processes that compute meanwhile, as on a machine that others use too.
        close: Called when it is measured.
    """

    what: str
    base: Callable[[int], Any]
    other: Callable[[int], Any]
    unit: str = "step"
    clock: str = "cpu"
    times: int | None = None
    threads: int = 1
    busy: int = 0
    close: Callable[[], Any] = lambda: None


def compare(pair: Pair, rounds: int) -> dict[str, Any]:
    """Measures a pair in so many rounds.

    Returns:
        ``what`` and ``unit``; ``base`` and ``other``: microseconds a unit, for each round.
    """
    torch.set_num_threads(pair.threads)
    with _busy(pair.busy):
        found = _in_turn(pair, rounds)
    pair.close()
    return {"what": pair.what, "unit": pair.unit, **found}


def _in_turn(pair: Pair, rounds: int) -> dict[str, list[float]]:
    clock = CLOCKS[pair.clock]
    took = 0.0
    for way in (pair.base, pair.other):
        way(1)  # whatever is made once
        began = clock()
        way(1)
        took = max(took, clock() - began)
    times = pair.times or max(1, int(CHUNK / max(took, 1e-6)))
    found: dict[str, list[float]] = {"base": [], "other": []}
    for number in range(rounds + 1):
        marks = [clock()]
        for way in (pair.base, pair.other, pair.other, pair.base):
            way(times)
            marks.append(clock())
        if number:  # the first one warms up
            a, b, c, d = (end - start for start, end in itertools.pairwise(marks))
            found["base"].append((a + d) / (2 * times) * 1e6)
            found["other"].append((b + c) / (2 * times) * 1e6)
    return found


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Keeps so many processes computing."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(module: str, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Compares all pairs of a module, in this process."""
    torch.manual_seed(0)
    return [compare(pair, rounds) for pair in importlib.import_module(module).pairs(quick)]


def tables(module: Any, *, rounds: int, quick: bool) -> Iterator[Table]:
    """Yields the table of a module of gains, measured in a fresh process; none without a row."""
    name = module.__name__
    arguments = {"module": name, "rounds": rounds, "quick": quick}
    results = fresh.call("tests.benchmarks.pairs:measure", **arguments)
    if not results:  # what needs a GPU, where there is none
        return
    title = module.__doc__.splitlines()[0].rstrip(".")
    yield gain_table(name.rpartition(".")[2], title, module.BASE, module.OTHER, results)


def gain_table(
    name: str, title: str, base: str, other: str, results: list[dict[str, Any]]
) -> Table:
    """Makes the table from what `compare` returned; below 1.00 the other way is faster."""
    rows = [
        (
            row["what"],
            row["unit"],
            f"{Spread.of(row['base']).median:,.1f}",
            f"{Spread.of(row['other']).median:,.1f}",
            ratios(row["other"], row["base"]).show(),
        )
        for row in results
    ]
    header = ("", "per", f"us, {base}", f"us, {other}", f"time of {other} to {base}")
    return Table(f"gains/{name}", title, header, rows)
