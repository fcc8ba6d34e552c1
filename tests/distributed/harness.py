"""Starts functions in several processes by the real torchrun, on gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds for one torchrun


@dataclass
class Outcome:
    """How a torchrun ended.

    Attributes:
        code: Its exit status.
        output: What all processes and torchrun itself printed.
        seconds: How long it took.
        results: What the function returned on each rank; fewer where some did not come to the end.
    """

    code: int
    output: str
    seconds: float
    results: list[Any] = field(default_factory=list)


def start(
    target: str, processes: int, root: Path, *, flags: tuple[str, ...] = (), env=None, **arguments
) -> subprocess.Popen[str]:
    """Starts torchrun over ``module:function``; its arguments are plain types (JSON)."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *flags, "-m", "tests.distributed.member"]
    return begin([*command, target, json.dumps(arguments), str(root)], env)


def begin(command: list[str], env=None) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, whose output `finish` returns."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def environment(more=None) -> dict[str, str]:
    """Returns the environment for processes of tests: one thread each, warnings are errors."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    return {**os.environ, **own, **(more or {})}


def finish(process: subprocess.Popen[str], root: Path, limit: float = LIMIT) -> Outcome:
    """Waits for the end of a torchrun; kills it and all of its processes after the limit."""
    begun = time.monotonic()
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun then ends its own processes
        try:
            output, _ = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise AssertionError(f"torchrun did not end within {limit} s:\n{output}") from None
    paths = sorted(root.glob("rank_*.pt"), key=lambda path: int(path.stem[5:]))
    results = [torch.load(path, weights_only=False) for path in paths]
    return Outcome(process.returncode, output, time.monotonic() - begun, results)


def torchrun(target: str, processes: int, root: Path, *, flags=(), env=None, **arguments) -> list:
    """Calls ``module:function`` in so many processes and returns what each rank returned."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob("rank_*.pt"):
        old.unlink()
    process = start(target, processes, root, flags=tuple(flags), env=env, **arguments)
    outcome = finish(process, root)
    assert outcome.code == 0, outcome.output
    assert len(outcome.results) == processes
    return outcome.results
