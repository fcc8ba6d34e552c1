"""What the page about many devices shows is what its script does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import LIMIT, ROOT, environment

PAGE = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")


def block(mark: str, language: str) -> str:
    """Returns the block after a comment of the page."""
    found = PAGE.partition(f"<!-- {mark} -->\n```{language}\n")[2].partition("\n```")[0]
    assert found, mark
    return found + "\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(block("file: train.py", "python"), encoding="utf-8")
    return tmp_path


def run(folder: Path, *words: str) -> str:
    """Runs Python with these words in a folder and returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_script_runs_on_one_process_and_on_four(script):
    command = next(
        line for line in PAGE.splitlines() if line.startswith("torchrun") and line.endswith(".py")
    )
    alone = run(script, "train.py")
    several = run(script, "-m", "torch.distributed.run", *command.split()[1:])
    for line in block("of the second command", "text").splitlines():
        assert several.count(line) == 1, several  # rank zero alone speaks
    values = [re.findall(r"^val_mae (\S+)$", output, re.MULTILINE) for output in (alone, several)]
    assert [len(found) for found in values] == [1, 1]
    folders = sorted(os.listdir(script / "runs" / "Net"))
    assert folders == ["version_0", "version_1"]  # one for each command
    assert "device:   cpu, precision 32-true" in alone
