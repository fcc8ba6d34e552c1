"""Calls a function in a process of its own, which shows what it has to say to a terminal.

A fresh process has no warm caches of another turn, no leftover threads, and its own modules. The
terminal is there because progress displays are cheaper, or off, where there is none.
"""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.pseudo_terminal import converse

ROOT = Path(__file__).parents[2]
LIMIT = 1800.0  # seconds for one call
#: One thread each, and no word from a launcher.
OWN = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "100"}


class FailedError(RuntimeError):
    """A call that did not come to its end; holds the last lines that it wrote."""


def call(target: str, *, limit: float = LIMIT, **arguments: Any) -> Any:
    """Calls ``module:function`` with arguments that JSON can hold, and returns its result."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "tests.benchmarks.fresh", target, json.dumps(arguments)]
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*command, str(result)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        try:
            said, in_time = converse(ours, lambda: process.poll() is not None, timeout=limit)
        finally:
            if process.poll() is None and not _ends(process):
                process.kill()
            status = process.wait()
            os.close(ours)
        if status or not in_time:
            tail = "\n".join(said.splitlines()[-25:])
            raise FailedError(f"{target} {arguments} ended with {status}:\n{tail}")
        return json.loads(result.read_text(encoding="utf-8"))


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Tells whether a process that has closed its terminal comes to its end."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        return False
    return True


def environment() -> dict[str, str]:
    """Returns the environment of a turn: this one, with one thread and the root on the path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {**os.environ, **OWN, "PYTHONPATH": path}
    # Installed packages have byte code; a clone has it from its second import on, if it may.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    return found


def main() -> None:
    target, arguments, path = sys.argv[1:]
    module, _, name = target.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
