"""Between two epochs: from the last step of one to the first step of the next."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator

from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table
from tests.benchmarks.turns import failed, rounds

#: With the MLP there is nothing but the boundary; digits has a DataLoader and a validation.
PLACES = (("mlp", "bare"), ("mlp", "full"), ("digits", "bare"), ("digits", "full"))


def measure(contender: str, work: str, level: str, epochs: int) -> dict[str, float]:
    """Returns the milliseconds that a boundary takes beyond a step, process and wall: medians."""
    import torch

    from tests.benchmarks.works import Each, make_job

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(work, level, folder, steps=40, epochs=epochs)
        job.net.marks = Each()
        CONTENDERS[contender].load()(job)
    length, read = len(job.train), job.net.marks.read
    found = {}
    for i, name in enumerate(("cpu", "wall")):
        steps = [b[i] - a[i] for a, b in itertools.pairwise(read)]
        over = steps[2 * length - 1 :: length]  # the first boundary warms up
        found[name] = (statistics.median(over) - statistics.median(steps)) * 1e3
    return found


def tables(plan: Plan) -> Iterator[Table]:
    names = plan.trainers()
    for work, level in PLACES:
        plan.say(f"boundary, {work}, {level}")
        results = rounds(
            *("tests.benchmarks.scenarios.boundary:measure", names, plan.rounds),
            work=work,
            level=level,
            epochs=4 if plan.quick else 12,
        )
        rows = [
            (
                CONTENDERS[name].title,
                *(Spread.of([turn[key] for turn in turns]).show() for key in ("cpu", "wall")),
            )
            for name, turns in results.items()
        ]
        header = ("", "ms of the process, beyond a step", "ms of the wall")
        title = f"Between two epochs: {work}, {level}"
        notes = failed(names, results)
        yield Table(f"boundary/{work}/{level}", title, header, rows, notes)
