"""What was public in a release is there, under its name and with its arguments."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightkit
from lightkit.hook_names import TASK_NAMES
from tests.stability.surface import surface

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "stability.md"
RELEASES = sorted(Path(__file__).parent.glob("surface_*.txt"))


def table(heading: str) -> list[str]:
    """Returns the names in the table below a heading of docs/stability.md."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)


def split(line: str) -> tuple[str, str]:
    name, bracket, arguments = line.partition("(")
    return name, bracket + arguments


def parsed(arguments: str) -> ast.arguments:
    return ast.parse(f"def f{arguments}: ...").body[0].args


def broken(before: str, now: str, *, hook: bool) -> str:
    """Returns how a call of before fails now; "" if it does not."""
    if bool(before) != bool(now):
        return "was called and is not, or the other way round"
    if before == now:
        return ""
    if hook:  # users write it, lightkit calls it
        return "the arguments of a hook changed"
    old, new = parsed(before), parsed(now)
    positional = [[a.arg for a in (*p.posonlyargs, *p.args)] for p in (old, new)]
    named = [{a.arg for a in (*p.args, *p.kwonlyargs)} for p in (old, new)]
    defaults = [_defaults(p) for p in (old, new)]
    required = [
        {*places, *names} - defaults[i].keys()
        for i, (places, names) in enumerate(zip(positional, named, strict=True))
    ]
    checks = {
        "its places changed": positional[1][: len(positional[0])] == positional[0],
        "an argument is gone": named[0] <= named[1],
        "*args or **kwargs are gone": (new.vararg or not old.vararg)
        and (new.kwarg or not old.kwarg),
        "a default changed": all(defaults[1].get(k, v) == v for k, v in defaults[0].items()),
        "it asks for more": required[1] <= required[0],
    }
    return ", ".join(what for what, holds in checks.items() if not holds)


def _defaults(arguments: ast.arguments) -> dict[str, str]:
    places = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    found = dict(zip(places[::-1], map(ast.unparse, arguments.defaults[::-1]), strict=False))
    for name, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if value is not None:
            found[name.arg] = ast.unparse(value)
    return found


def changes(path: Path) -> dict[str, str]:
    """Returns what a release had and the code has not, and how it differs."""
    now, found = surface(), {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, arguments = split(line)
        if name not in now:
            found[name] = "gone"
        elif how := broken(arguments, now[name], hook=name.rpartition(".")[2] in TASK_NAMES):
            found[name] = how
    return found


@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_what_was_public_holds(path):
    listed = table("Gone or changed")
    assert {name: how for name, how in changes(path).items() if name not in listed} == {}


def test_what_the_page_lists_as_changed_is_changed():
    assert set(table("Gone or changed")) == {name for path in RELEASES for name in changes(path)}


def test_every_release_wrote_its_names_down():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    minors = {f"surface_{x}_{y}_0" for x, y in re.findall(r"^## \[(\d+)\.(\d+)\.", text, re.M)}
    assert {path.stem for path in RELEASES} == minors
    assert "surface_{}_{}_0".format(*lightkit.__version__.split(".")) in minors


def too_early(row: str) -> str:
    """Returns what is wrong with a row of "Deprecated now"; "" if it waits long enough."""
    pattern = (
        r"\| `[\w.]+` \| since (\d+)\.(\d+)\.0 \((\d{4})-(\d\d-\d\d)\) "
        r"\| ends in (\d+)\.(\d+)\.0, not before (\d{4})-(\d\d-\d\d) \| .+ \|"
    )
    found = re.fullmatch(pattern, row)
    if found is None:
        return "not a row as the page describes it"
    major, minor, year, day, to_major, to_minor, to_year, to_day = found.groups()
    if int(to_major) == int(major) and int(to_minor) < int(minor) + 2:
        return "less than two minor releases"
    return "less than a year" if (int(to_year) - 1, to_day) < (int(year), day) else ""


def test_what_is_deprecated_waits_two_minor_releases_and_a_year():
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("\n## Deprecated now\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert {row: wrong for row in rows if (wrong := too_early(row))} == {}
    assert len(rows) == len(table("Deprecated now"))
    (form,) = re.findall(r"^`(\| what .+ \|)`", section, re.MULTILINE)
    assert too_early(form.replace("what", "`a.b`", 1)) == ""


@pytest.mark.parametrize(
    ("since", "ends", "wrong"),
    [
        ("0.3.0 (2027-02-01)", "0.5.0, not before 2028-02-01", ""),
        ("0.3.0 (2027-02-01)", "1.0.0, not before 2028-03-01", ""),
        ("0.3.0 (2027-02-01)", "0.4.0, not before 2028-02-01", "less than two minor releases"),
        ("0.3.0 (2027-02-01)", "0.6.0, not before 2028-01-31", "less than a year"),
        ("0.3.0", "0.6.0", "not a row as the page describes it"),
    ],
)
def test_what_counts_as_too_early(since, ends, wrong):
    assert too_early(f"| `lightkit.old` | since {since} | ends in {ends} | `new` |") == wrong


def test_what_warns_stands_on_the_page():
    """One row for each place in the code that tells of a deprecation."""
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "lightkit").rglob("*.py")]
    assert sum(text.count("FutureWarning") for text in code) == len(table("Deprecated now"))


@pytest.mark.parametrize(
    ("before", "now", "hook", "how"),
    [
        ("(a, b=1)", "(a, b=1, c=2)", False, ""),
        ("(a, b=1)", "(a, b=1, *, c=2)", False, ""),
        ("(a, *, b)", "(a, *, b=1)", False, ""),
        ("(a)", "(a=1, **kwargs)", False, ""),
        ("(a, b=1)", "(a, c=2, b=1)", False, "its places changed"),
        ("(a, b=1)", "(a, b=2)", False, "a default changed"),
        ("(a, b=1)", "(a)", False, "its places changed, an argument is gone"),
        ("(a, b=1)", "(a, *, b=1)", False, "its places changed"),
        ("(a, *, b=1)", "(a)", False, "an argument is gone"),
        ("(a)", "(a, *, b)", False, "it asks for more"),
        ("(a, b=1)", "(a, b)", False, "it asks for more"),
        ("(*args)", "()", False, "*args or **kwargs are gone"),
        ("(a)", "(a, b=1)", True, "the arguments of a hook changed"),
        ("", "()", False, "was called and is not, or the other way round"),
    ],
)
def test_what_counts_as_broken(before, now, hook, how):
    assert broken(before, now, hook=hook) == how
