"""The files of the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Put together here, so that this file does not contain them.
FOREIGN = tuple("".join(parts) for parts in (
    ("pypi", ".org"),
    ("python", "hosted", ".org"),
    ("download", ".pytorch"),
    ("anaconda", ".org"),
    ("--index", "-url"),
    ("--extra-index", "-url"),
    ("--find", "-links"),
    ("/opt", "/"),
    ("/work", "/"),
    ("/tmp", "/venv"),
))  # fmt: skip
SKIPPED = {".git", ".venv", "__pycache__", "runs", "shared", "site", "build", "dist"}
SKIPPED |= {".mypy_cache", ".pytest_cache", ".ruff_cache"}


def tracked() -> list[Path]:
    """Returns the files that git knows or would add; all of them where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if SKIPPED.isdisjoint(path.parts)]
    else:
        files = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="ignore")


@pytest.mark.parametrize("foreign", FOREIGN)
def test_no_registry_and_no_path_of_one_machine(foreign):
    found = [str(path.relative_to(ROOT)) for path in tracked() if foreign in text(path)]
    assert found == []


def test_no_large_file():
    assert [path.name for path in tracked() if path.stat().st_size > 500_000] == []


def test_tests_mirror_the_code():
    """Every module of a package has a test file of its name in the folder of its name."""
    for folder in ("callbacks", "checkpoint", "data", "distributed", "loggers"):
        code = {path.stem for path in (ROOT / "lightkit" / folder).glob("[!_]*.py")}
        tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("*.py")}
        assert code <= tests, f"no tests/{folder}/test_<name>.py for {sorted(code - tests)}"
