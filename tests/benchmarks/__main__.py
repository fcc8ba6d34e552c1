"""The command: ``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from pathlib import Path

from tests.benchmarks.contenders import CONTENDERS, versions
from tests.benchmarks.fresh import ROOT
from tests.benchmarks.plan import GROUPS, Plan, installed, known, left_out, run
from tests.benchmarks.summary import summary
from tests.benchmarks.tables import Table, write

#: Where most tables stand.
PAGE = ROOT / "docs" / "performance.md"


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for, and prints the tables."""
    parser = make_parser()
    words = sys.argv[1:] if arguments is None else arguments
    asked = parser.parse_args(words)
    if asked.list:
        for name, module in known().items():
            print(f"{name:12} {module.__doc__.splitlines()[0]}")
        return 0
    contenders = asked.contenders.split(",") if asked.contenders else list(CONTENDERS)
    for name in contenders:
        if name not in CONTENDERS:
            parser.error(f"no contender {name!r}; there are {', '.join(CONTENDERS)}")
    names = chosen(asked.scenarios, parser)
    if not CONTENDERS["hand"].installed:
        parser.error("the loop by hand has a bar of tqdm: pip install -e '.[benchmarks]'")
    plan = Plan(installed(contenders), rounds_of(asked), asked.quick, asked.long)
    show(machine(contenders), write_it=asked.write)
    for name in names:
        print(f"{name}: {known()[name].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
        before = os.getloadavg()[0]
        for table in run(name, plan):
            table.notes.append(made_by(command_of(name, asked), plan, before))
            show(table, write_it=asked.write)
            before = os.getloadavg()[0]
    if asked.write:
        show(summary(PAGE.read_text(encoding="utf-8")), write_it=True)
    return 0


def rounds_of(asked: argparse.Namespace) -> int:
    """Returns the number of rounds that was asked for."""
    return asked.rounds or (2 if asked.quick else 9)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measures lightkit beside a loop written by hand and beside other trainers.",
    )
    parser.add_argument("scenarios", nargs="*", help=f"what to measure, or {' or '.join(GROUPS)}")
    parser.add_argument("--list", action="store_true", help="say what can be measured")
    parser.add_argument("--contenders", help=f"separated by commas: {','.join(CONTENDERS)}")
    parser.add_argument("--rounds", type=int, help="rounds of fresh processes (default 9)")
    parser.add_argument("--quick", action="store_true", help="cut short, to see that it works")
    parser.add_argument("--long", action="store_true", help="what takes many minutes too")
    parser.add_argument(
        "--write", action="store_true", help="put the tables in their places in docs/*.md"
    )
    return parser


def chosen(scenarios: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Returns the names of what was asked for; all where nothing was."""
    found: list[str] = []
    for name in scenarios or list(GROUPS):
        if name in GROUPS:
            inside = f"{GROUPS[name].__name__}."
            found += [key for key, module in known().items() if module.__name__.startswith(inside)]
        elif name in known():
            found.append(name)
        else:
            parser.error(f"no scenario {name!r}; there are {', '.join([*known(), *GROUPS])}")
    return list(dict.fromkeys(found))


def command_of(scenario: str, asked: argparse.Namespace) -> str:
    """Returns the command that measures this scenario alone."""
    words = ["python", "-m", "tests.benchmarks", scenario]
    for option in ("contenders", "rounds"):
        if getattr(asked, option):
            words += [f"--{option}", str(getattr(asked, option))]
    words += [f"--{option}" for option in ("quick", "long") if getattr(asked, option)]
    return shlex.join(words)


def machine(contenders: list[str]) -> Table:
    """Returns what the figures were measured with; names the contenders that are not here."""
    rows = [
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cores", f"{os.cpu_count()}; each turn has one thread"),
        ("packages", versions()),
    ]
    missing = left_out(contenders)
    return Table("machine", "Measured with", ("", ""), rows, [missing] if missing else [])


def made_by(command: str, plan: Plan, before: float) -> str:
    """Returns the line below a table: what made it, and how busy the machine was."""
    line = f"`{command}`; load {before:.1f} before, {os.getloadavg()[0]:.1f} after."
    if plan.quick:
        line += " **Cut short (--quick): the numbers say nothing.**"
    return line


def show(table: Table, *, write_it: bool) -> None:
    """Prints a table, and writes it into the pages that have a place for it."""
    print(table.markdown() + "\n", flush=True)
    if write_it:
        pages = write(table, sorted(Path(ROOT, "docs").glob("*.md")))
        where = ", ".join(page.name for page in pages) or f"no page has a place for {table.name}"
        print(f"  written: {where}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
