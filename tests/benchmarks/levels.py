"""The tables of one work: a step of each contender on each level, beside the loop by hand."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table, ratios
from tests.benchmarks.turns import Results, failed, rounds
from tests.benchmarks.works import LEVELS, WORKS

#: By level: the variant of the loop by hand that is that very loop.
TWINS = {"bare": "silent", "newcomer": "usual"}
HEADER = (
    "",
    "us a step, median",
    "time to that of the loop by hand",
    "to the loop that only trains",
    "wall to the loop by hand",
    "peak MiB",
    "weights",
)


def level_tables(work: str, plan: Plan) -> Iterator[Table]:
    """Measures a work on its levels, and yields a table for each."""
    short = {"steps": 8, "epochs": 3} if plan.quick else {}
    for level in WORKS[work].levels:
        plan.say(f"{work}, {level}")
        names = ["hand", *(name for name in plan.contenders if fits(name, work, level))]
        results = rounds(
            *("tests.benchmarks.turns:train", names, plan.rounds, plan.say),
            work=work,
            level=level,
            **short,
        )
        table = level_table(work, level, results)
        table.notes += failed(names, results)
        yield table


def fits(name: str, work: str, level: str) -> bool:
    """Tells whether a contender beside the loop by hand has something to say here."""
    return name not in {"hand", TWINS.get(level)} and CONTENDERS[name].work in ("", work)


def level_table(work: str, level: str, results: Results) -> Table:
    """Makes the table from the turns; those of "hand" have to be there."""
    by_hand = results["hand"]
    only_trains = results.get("silent", by_hand if level == "bare" else None)
    rows = []
    for name, turns in results.items():
        cpu, wall = ([turn[key] for turn in turns] for key in ("cpu", "wall"))
        same = all(a["weights"] == b["weights"] for a, b in zip(turns, by_hand, strict=True))
        rows.append(
            (
                CONTENDERS[name].title,
                f"{Spread.of(cpu).median:,.0f}",
                ratios(cpu, [turn["cpu"] for turn in by_hand]).show(),
                ratios(cpu, [turn["cpu"] for turn in only_trains]).show() if only_trains else "",
                ratios(wall, [turn["wall"] for turn in by_hand]).show(),
                f"{Spread.of([turn['peak'] for turn in turns]).median:.0f}",
                "the same" if same else "others",
            )
        )
    title = f"{WORKS[work].title}. {level.capitalize()}: {LEVELS[level]}"
    return Table(
        f"{work}/{level}", title[0].upper() + title[1:], HEADER, rows, _against_lightning(results)
    )


def _against_lightning(results: Results) -> list[str]:
    """Returns a note on how many times as long Lightning takes as lightkit, round by round."""
    if "lightning" not in results:
        return []
    theirs = [turn["cpu"] for turn in results["lightning"]]
    found = [
        f"{ratios(theirs, [turn['cpu'] for turn in results[name]]).show()} times that of "
        f"{CONTENDERS[name].title}"
        for name in ("lightkit", "choices")
        if name in results
    ]
    return [f"Lightning's time is {', '.join(found)}."] if found else []
