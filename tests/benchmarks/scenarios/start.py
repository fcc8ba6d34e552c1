"""From the call that trains to the first step: with all imports, and with imports done before."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table, differences
from tests.benchmarks.turns import Results, failed, rounds

LEVELS = ("bare", "full")
#: What lightkit does on the way, one thing at a time: the options that switch it on.
PARTS = {
    "nothing": {},
    "loggers": {"logger": True},
    "checkpoints": {"enable_checkpointing": True},
    "bar": {"enable_progress_bar": True},
    "model summary": {"enable_model_summary": True},
    "sanity check": {"num_sanity_val_steps": 2},
}


class Start:
    """Marks of a network that read the clock at the first step, and the collections until then.

    Attributes:
        seconds: Of the process, from the beginning to the first step.
        collecting: Those of them that went into garbage collections.
    """

    def __init__(self) -> None:
        self.seconds, self.collecting, self.collection = 0.0, 0.0, 0.0

    def __enter__(self) -> Start:
        gc.callbacks.append(self._collected)
        self.began = time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        if self._collected in gc.callbacks:
            gc.callbacks.remove(self._collected)

    def __call__(self) -> None:
        if not self.seconds:
            self.seconds = time.process_time() - self.began
            gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.collection = time.process_time()
        else:
            self.collecting += time.process_time() - self.collection


def measure(contender: str, level: str) -> dict[str, float]:
    """Returns milliseconds of the process to the first step.

    Returns:
        ``first``: with the imports of the contender and of what it imports on the way, torch aside;
        ``again``: for a second job in the same process, which has nothing left to import.
        ``first_gc``, ``again_gc``: what of them went into garbage collections.
    """
    import torch

    from tests.benchmarks.works import make_job

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "again"):
            job = make_job("mlp", level, Path(folder, name), steps=4, epochs=3)
            job.folder.mkdir()
            with Start() as start:
                job.net.marks = start
                CONTENDERS[contender].load()(job)
            found[name] = start.seconds * 1e3
            found[f"{name}_gc"] = start.collecting * 1e3
    return found


def measure_part(contender: str) -> float:
    """Returns milliseconds to the first step of a second fit, with one part of lightkit on."""
    import torch

    import lightkit as lk
    from tests.benchmarks.contenders.ours import BARE, Task
    from tests.benchmarks.works import make_job

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            job = make_job("mlp", "full", folder, steps=4, epochs=1)
            options = {**BARE, **PARTS[contender]}
            with Start() as start:
                job.net.marks = start
                trainer = lk.Trainer(
                    max_epochs=1, accelerator="cpu", default_root_dir=folder, **options
                )
                trainer.fit(Task(job), job.train, job.val)
    return (start.seconds - start.collecting) * 1e3


def tables(plan: Plan) -> Iterator[Table]:
    names = plan.trainers()
    for level in LEVELS:
        plan.say(f"start, {level}")
        results = rounds(
            "tests.benchmarks.scenarios.start:measure", names, plan.rounds, level=level
        )
        table = start_table(level, results)
        table.notes += failed(names, results)
        yield table
    plan.say("start, the parts")
    parts = rounds("tests.benchmarks.scenarios.start:measure_part", PARTS, plan.rounds)
    rows = [
        (name, Spread.of(values).show(1), differences(values, parts["nothing"]).show(1))
        for name, values in parts.items()
    ]
    header = ("lightkit with", "ms to the first step", "beyond nothing")
    yield Table("start/parts", "The parts of a start, imports and collections aside", header, rows)


def start_table(level: str, results: Results) -> Table:
    """Makes the table from the turns; those of "hand" have to be there."""
    by_hand, rows = results["hand"], []
    for name, turns in results.items():
        first = [turn["first"] for turn in turns]
        rows.append(
            (
                CONTENDERS[name].title,
                Spread.of(first).show(0),
                differences(first, [turn["first"] for turn in by_hand]).show(0),
                f"{Spread.of([turn['first_gc'] for turn in turns]).median:.0f}",
                differences(_aside(turns), _aside(by_hand)).show(1),
            )
        )
    header = (
        "",
        "ms to the first step, with imports",
        "beyond the loop by hand",
        "collections in it",
        "beyond the loop by hand, imports and collections aside",
    )
    return Table(f"start/{level}", f"From the call to the first step, {level}", header, rows)


def _aside(turns: list[dict[str, float]]) -> list[float]:
    return [turn["again"] - turn["again_gc"] for turn in turns]
