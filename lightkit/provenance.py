"""``provenance.json`` and ``code.diff``: with which code, on which machine a run was made.

Each start of a fit in a run folder adds an entry, so a run that was resumed has several. Nothing is
sent anywhere, and nothing of it can end a fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightkit.distributed.env import environment
from lightkit.ledger import plain

if TYPE_CHECKING:
    from lightkit.run import FitRun
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")

FILE, DIFF = "provenance.json", "code.diff"
#: Bytes of a diff, seconds for an answer of git, and names of files that git does not know.
MOST_BYTES, MOST_SECONDS, MOST_NAMES = 1 << 20, 3.0, 50
_SECRET = (
    r"(?:token|key|passw(?:or)?d|passphrase|pwd|secret|credentials?|auth|authorization)(?:_id)?"  # noqa: S105
)
#: ``--api_key=x``, ``{"password": "x"}``, ``url?token=x``: all that follows is masked.
_INSIDE = re.compile(rf"({_SECRET}[\"']?\s*[=:]).+", re.IGNORECASE | re.DOTALL)
_BEFORE = re.compile(rf"[\w.-]*{_SECRET}", re.IGNORECASE)
_MASK = "***"
#: What a hook of git sets, so that git answers of another repository than that of a folder.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")


def keep(trainer: Trainer, run: FitRun, folder: Path) -> None:
    """Adds an entry to the record of a run folder; on rank zero, where a fit begins there.

    Never raises: what cannot be found out or written is no reason to end a fit.

    Args:
        trainer: The trainer of the fit.
        run: The fit.
        folder: Its folder.
    """
    try:
        entries = read(folder)
        text = json.dumps([*entries, _entry(trainer, run, folder, entries)], indent=2)
        part = folder / f".{FILE}.part"  # a kill leaves the earlier entries as they are
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, folder / FILE)
    except Exception as error:  # noqa: BLE001
        _log.warning("%s could not be written: %s", folder / FILE, error)


def _entry(
    trainer: Trainer, run: FitRun, folder: Path, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the facts of a start, and writes the diff of its code."""
    options = trainer.options
    names = [field.name for field in dataclasses.fields(options)]
    git = _git(_folder_of_code(run.task))
    if git is not None:
        name = _write_diff(folder, git["diff"], entries) if git["diff"] else None
        git = {**git, "diff": name}
    return {
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": run.state.global_step,
        "argv": masked(sys.orig_argv),
        "cwd": str(Path.cwd()),
        "host": platform.node(),
        "device": str(run.device),
        "device_name": _device_name(run.device),
        "processes": run.strategy.world_size,
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "git": git,
        "trainer": {name: plain(getattr(options, name)) for name in names},
        **_installed(),
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """Returns the entries of a run folder, oldest first; none where there is nothing readable."""
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def masked(words: Iterable[str]) -> list[str]:
    """Returns words of a command line without the values of tokens, keys and passwords."""
    shown: list[str] = []
    hidden = False
    for word in words:
        if hidden and not word.startswith("--"):
            shown.append(_MASK)
            hidden = False
            continue
        hidden = _BEFORE.fullmatch(word) is not None
        word = re.sub(r"://[^/\s]+@", f"://{_MASK}@", word)
        shown.append(_INSIDE.sub(rf"\1{_MASK}", word))
    return shown


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


@functools.cache
def _installed() -> dict[str, Any]:
    """Returns Python and the packages that it finds, by the names of their folders."""
    packages: dict[str, str] = {}
    for place in map(Path, reversed(sys.path)):  # what comes first is what is imported
        for found in place.glob("*.dist-info"):
            name, _, version = found.stem.partition("-")
            packages[name] = version
    packages["lightkit"] = sys.modules["lightkit"].__version__
    packages["torch"] = str(torch.__version__)
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items())),
    }


# --- the code ------------------------------------------------------------------------------------


def _folder_of_code(task: Any) -> Path:
    """Returns the folder of the file that defines a task; of lightkit's own the current one."""
    module = type(task).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    own = file is None or module.partition(".")[0] == "lightkit"
    return Path.cwd() if own else Path(file).absolute().parent  # type: ignore[arg-type]


@functools.cache
def _git(folder: Path) -> dict[str, Any] | None:
    """Returns what git knows of a folder; None where it knows nothing.

    Asked once per process: what runs is the code as it was read at the start.
    """
    # Neither a hook is run nor a lock taken, and of the user's ways to show a diff none would apply.
    settings = ("core.fsmonitor=false", "diff.noprefix=false", "diff.relative=false")
    git = ["git", "-C", str(folder), "--no-optional-locks"]
    git += [word for setting in settings for word in ("-c", setting)]
    status = _output([*git, "status", "--porcelain=v2", "--branch"])
    known = status is not None
    if status is None:  # no repository, or one too large to be looked through in time
        revision = _output([*git, "rev-parse", "HEAD"])
        if revision is None:
            return None
        status = b"# branch.oid " + revision
    lines = status.decode(errors="replace").splitlines()
    names = dict(line.split(" ", 2)[1:] for line in lines if line.startswith("# branch."))
    oid, branch = names.get("branch.oid", "("), names.get("branch.head", "(")
    changed = [line for line in lines if line[:1] in "12u"]
    diff = None
    if changed and not oid.startswith("("):  # "(initial)": nothing is committed yet
        git += ["diff", "--no-color", "--no-ext-diff", "--no-textconv", "-U3"]
        diff = _output([*git, "--binary", "HEAD"])
        if diff is None or len(diff) > MOST_BYTES:  # without what is in binary files
            diff = _output([*git, "HEAD"])
    return {
        "folder": str(folder),
        "revision": None if oid.startswith("(") else oid,
        "branch": None if branch.startswith("(") else branch,
        "changed": len(changed) if known else None,
        "untracked": [line[2:] for line in lines if line.startswith("? ")][:MOST_NAMES],
        "read": datetime.now().astimezone().isoformat(timespec="seconds"),
        "diff": diff,
    }


def _output(command: list[str]) -> bytes | None:
    """Returns what a command writes, cut a byte above the most that is kept; None if it fails."""
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(  # noqa: S603  nothing of it is given from outside but a folder
            command,
            stdin=nothing,
            stdout=pipe,
            stderr=nothing,
            env=environment(without=_ELSEWHERE),
            start_new_session=True,
        )
    except OSError:  # there is no git
        return None
    timer = threading.Timer(MOST_SECONDS, _kill, [process])
    timer.start()
    with process:
        assert process.stdout is not None
        output = process.stdout.read(MOST_BYTES + 1)
        if len(output) > MOST_BYTES:
            _kill(process)
        timer.cancel()
    return output if process.returncode == 0 or len(output) > MOST_BYTES else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it started (a filter, say), which holds its output open."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _write_diff(folder: Path, diff: bytes, entries: list[dict[str, Any]]) -> str:
    """Writes a diff beside those of earlier starts; returns the file, perhaps one of those."""
    if len(diff) > MOST_BYTES:
        whole = diff[:MOST_BYTES].rpartition(b"\n")[0]
        diff = whole + b"\n# cut here: the diff is longer than %d bytes\n" % MOST_BYTES
    last = (entries[-1].get("git") or {}).get("diff") if entries else None
    if last and (folder / last).is_file() and (folder / last).read_bytes() == diff:
        return str(last)
    name = DIFF if not entries else f"code_{len(entries)}.diff"
    (folder / name).write_bytes(diff)
    return name
