"""The script that measures steps per second runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.distributed.harness import LIMIT, ROOT, environment


@pytest.mark.slow
def test_it_measures_all_networks():
    command = [sys.executable, "-m", "tests.distributed.throughput", "2", "4"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    number = r"(\d+(?:\.\d+)?)"
    row = rf"^\| 2 \| (\w+) \| ([\w ,]+) \| {number} \| {number} \| {number} \({number} to {number}\) \|$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert [found[:2] for found in rows] == [
        (name, what) for name in ("MLP", "CNN") for what in ("nothing", "logs, metric")
    ]
    assert all(float(value) > 0 for found in rows for value in found[2:])
