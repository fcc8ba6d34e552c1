"""Past runs: a list of them, and how some of them differ. What ``lightkit runs`` shows."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lightkit import ledger, provenance
from lightkit.announce import short
from lightkit.checkpoint.newest import is_resumable
from lightkit.errors import ConfigError
from lightkit.history import POSITION, History
from lightkit.ledger import Record
from lightkit.screen import duration, number

#: Columns of the list; where the screen is narrow those that stand first here have their place.
_COLUMNS = ("status", "folder", "best", "epochs", "age", "steps", "task", "took")
#: Characters of a value in a comparison, where the screen does not say.
_LONGEST = 100


@dataclass(frozen=True)
class Run:
    """One past or present run.

    Attributes:
        folder: Its folder.
        task: The class of its task.
        status: "finished", "running", "failed" (by an exception), "resumable" (interrupted or
            killed, with a checkpoint), else "interrupted" or "killed".
        resumable: Whether it has not finished and has a checkpoint; a failed one may too.
        epoch: Epochs completed; of a run that is under way or was killed, as its rows tell.
        step: Optimizer steps, likewise.
        began: When it began, in seconds since 1970.
        seconds: How long it trained; 0.0 where it has not ended.
        monitor: The metric that tells its best epoch; "" for none.
        best: All metrics of that epoch.
        last: All metrics of the last epoch.
        error: What ended it, where it failed.
        record: All that ``run.json`` holds.
    """

    folder: Path
    task: str
    status: str
    resumable: bool
    epoch: int
    step: int
    began: float
    seconds: float
    monitor: str
    best: dict[str, float | None]
    last: dict[str, float | None]
    error: str
    record: Record


def find_runs(folder: str | Path = "runs") -> list[Run]:
    """Returns the runs below a folder, the newest first.

    Args:
        folder: Where they lie, at any depth; itself the folder of one run, or above several.

    Raises:
        ConfigError: There is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise ConfigError(
            f"{top}: there is no such folder. Give the one that holds the runs, which is the "
            f"Trainer's default_root_dir."
        )
    found = []
    for here, below, files in os.walk(top):
        below[:] = [name for name in below if not name.startswith(".")]
        if ledger.FILE in files:
            below.clear()  # in a run there is no other
            if (run := _read(Path(here))) is not None:
                found.append(run)
    return sorted(found, key=lambda run: run.began, reverse=True)


def _read(folder: Path) -> Run | None:
    """Returns the run of a folder; None where it holds none that can be read."""
    record = ledger.read(folder)
    if record is None:
        return None
    status = record.status
    epoch, step = record.epoch, record.global_step
    if status == "running" or not record.last:
        history = _history(folder)
        record.keep(history)
        if status == "running" and history:
            epoch, step = int(record.last["epoch"]) - 1, int(record.last.get("step") or 0)
    if status == "running" and not ledger.in_use(folder):
        status = "killed"
    resumable = status not in ("running", "finished") and any(
        is_resumable(place, record.id) for place in record.folders(folder)
    )
    if resumable and status != "failed":
        status = "resumable"
    known = [name for name, _ in record.monitors] + ["val_loss", "train_loss"]
    return Run(
        folder=folder,
        task=str(record.settings.get("task", folder.parent.name)),
        status=status,
        resumable=resumable,
        epoch=epoch,
        step=step,
        began=record.began,
        seconds=record.seconds,
        monitor=next((name for name in known if record.best.get(name) is not None), ""),
        best=record.best,
        last=record.last,
        error=record.error,
        record=record,
    )


def _history(folder: Path) -> History:
    """Returns the epochs of a run as far as the files of its rows tell."""
    epochs: dict[int, dict[str, float]] = {}
    with contextlib.suppress(OSError, csv.Error):  # what was read until then
        for row in _rows(folder):
            numbers = {k: math.nan if v is None else v for k, v in row.items()}
            if not all(isinstance(value, (int, float)) for value in numbers.values()):
                continue
            if math.isfinite(epoch := numbers.get("epoch", 0)):
                epoch = int(epoch) + 1  # rows count from 0, people from 1
                epochs.setdefault(epoch, {}).update(numbers, epoch=epoch)
    return History(epochs.values())


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of ``metrics.jsonl``, else of ``metrics.csv``; skips broken ones."""
    for name in ("metrics.jsonl", "metrics.csv"):
        if not (folder / name).exists():
            continue
        with (folder / name).open(encoding="utf-8", errors="replace", newline="") as file:
            if name.endswith(".csv"):
                for cells in csv.DictReader(file):
                    yield {k: _value(v) for k, v in cells.items() if k and v}
                return
            for line in file:
                row = _value(line)  # the last one may be cut
                if isinstance(row, dict):
                    yield row
        return


def _value(text: str) -> Any:
    """Returns what JSON or a number stands in a text; None for anything else."""
    try:
        return json.loads(text)
    except ValueError:
        return None


# --- the list ------------------------------------------------------------------------------------


def table(runs: Sequence[Run], width: int) -> str:
    """Returns a line for each run, with a header, in at most ``width`` columns.

    Where they do not fit, columns are left out and the folder loses its beginning.
    """
    rows = [_cells(run) for run in runs]
    size = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    left, shown = width + 2, []
    for name in _COLUMNS:
        if name in ("status", "folder") or size[name] + 2 <= left:
            shown.append(name)
            left -= size[name] + 2
    names = [name for name in rows[0] if name in shown]
    room = max(width - sum(size[name] + 2 for name in names[:-1]), 8)
    lines = []
    for row in ({name: name for name in names}, *rows):
        folder = row["folder"]
        folder = folder if len(folder) <= room else f"...{folder[3 - room :]}"
        cells = [f"{row[name]:<{size[name]}}" for name in names[:-1]]
        lines.append("  ".join([*cells, folder]).rstrip())
    return "\n".join(lines)


def _cells(run: Run) -> dict[str, str]:
    limits = run.record.limits
    best = run.best.get(run.monitor)
    return {
        "status": run.status,
        "task": run.task,
        "epochs": _of(run.epoch, limits.get("max_epochs")),
        "steps": _of(run.step, limits.get("max_steps")),
        "best": "-" if best is None else f"{run.monitor} {number(best)}",
        "took": duration(run.seconds) if run.seconds else "-",
        "age": age(time.time() - run.began),
        "folder": str(short(run.folder)),
    }


def _of(done: int, limit: Any) -> str:
    return f"{done}/{limit}" if isinstance(limit, int) and limit >= 0 else str(done)


def age(seconds: float) -> str:
    """Returns how long ago something was: "40 s", "5 min", "3 h" or "12 d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def as_json(run: Run) -> dict[str, Any]:
    """Returns a run as plain values."""
    return {**asdict(run), "folder": str(run.folder)}


# --- how some of them differ ---------------------------------------------------------------------


def compare(runs: Sequence[Run]) -> dict[str, dict[str, list[Any]]]:
    """Returns what differs: a value for each run by sections and names, None where there is none.

    How a run ended and its results are there also where they are equal.
    """
    best = [f" by {run.monitor}" for run in runs if run.monitor]
    by = best[0] if len(set(best)) == 1 else ""
    return {
        "run": _side_by_side([_ended(run) for run in runs], equal=True),
        "configuration": _side_by_side([_configuration(run) for run in runs]),
        "code and machine": _side_by_side([_circumstances(run) for run in runs]),
        "last epoch": _side_by_side([_metrics(run.last) for run in runs], equal=True),
        f"best epoch{by}": _side_by_side([_metrics(run.best) for run in runs], equal=True),
    }


def _side_by_side(facts: list[dict[str, Any]], *, equal: bool = False) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for one in facts for name in one)
    rows = {name: [one.get(name) for one in facts] for name in names}
    return {k: row for k, row in rows.items() if equal or any(v != row[0] for v in row)}


def _ended(run: Run) -> dict[str, Any]:
    facts = {
        "status": run.status,
        "epochs": run.epoch,
        "steps": run.step,
        "seconds": round(run.seconds, 3) or None,
        "began": datetime.fromtimestamp(run.began).isoformat(" ", "seconds"),
    }
    return facts | ({"error": run.error} if run.error else {})


def _metrics(row: Mapping[str, float | None]) -> dict[str, Any]:
    return {name: row[name] for name in ("epoch", "step") if name in row} | {
        name: value for name, value in row.items() if name not in POSITION
    }


def _configuration(run: Run) -> dict[str, Any]:
    """Returns all settings by dotted names; of several sources the most exact one holds."""
    from lightkit.config import read_sources

    last = (provenance.read(run.folder) or [{}])[-1]
    found = {f"trainer.{name}": value for name, value in (last.get("trainer") or {}).items()}
    found |= run.record.settings
    with contextlib.suppress(OSError, ValueError):
        hparams = json.loads((run.folder / "hparams.json").read_text(encoding="utf-8"))
        held = {key.partition(".")[2] for key in found if key.startswith(("task.", "data."))}
        found |= {f"hparams.{k}": v for k, v in hparams.items() if k not in held}
    if (file := run.folder / "config.yaml").exists():
        for section, tree in read_sources([file], {}, "config.yaml").tree.items():
            found |= dict(_flat(tree, section))
    return found


def _flat(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings; arguments of a class stand beside its name."""
    if not isinstance(tree, Mapping) or not tree:
        yield name, tree
        return
    for key, value in tree.items():
        yield from _flat(value, name if key == "init_args" else f"{name}.{key}")


def _circumstances(run: Run) -> dict[str, Any]:
    """Returns code, command and machine of the last start, and all revisions."""
    entries = provenance.read(run.folder) or [{}]
    last = entries[-1]
    git = last.get("git") or {}
    revisions = dict.fromkeys((e.get("git") or {}).get("revision") or "" for e in entries)
    names = ("cwd", "host", "device", "device_name", "processes", "threads", "python", "platform")
    return {
        "revision": ", ".join(filter(None, revisions)) or None,
        "branch": git.get("branch"),
        "changes": _changes(run.folder, git) if git else None,
        "argv": " ".join(map(str, last.get("argv") or ())),
        **{name: last.get(name) for name in names},
        **{f"packages.{k}": v for k, v in (last.get("packages") or {}).items()},
    }


def _changes(folder: Path, git: Mapping[str, Any]) -> str:
    """Says in a few letters what a diff holds, so that two different ones differ."""
    name, changed = git.get("diff"), git.get("changed", 0)
    if not name:
        return "none" if changed == 0 else f"{'unknown' if changed is None else changed}, no diff"
    try:
        diff = (folder / name).read_bytes()
    except OSError:
        return f"{name} is gone"
    lines = [line[:3] for line in diff.split(b"\n")]
    more, less = (sum(x[:1] == sign and x != sign * 3 for x in lines) for sign in (b"+", b"-"))
    return f"+{more} -{less} lines, {hashlib.sha256(diff).hexdigest()[:7]} ({name})"


def difference(runs: Sequence[Run], width: int) -> str:
    """Returns what `compare` finds as a table with a column for each run."""
    sections = compare(runs)
    lines = [("", [str(short(run.folder)) for run in runs])]
    for title, rows in sections.items():
        lines += [("", []), (title if rows else f"{title}: no difference", [])]
        lines += [(f"  {name}", [_shown(value) for value in row]) for name, row in rows.items()]
    head = min(max(len(name) for name, cells in lines if cells), max(width // 3, 8))
    room = max((width - head) // len(runs) - 2, 6)
    each = min(room, _LONGEST, max(len(cell) for _, cells in lines for cell in cells))
    text: list[str] = []
    for name, cells in lines:
        if not cells:
            text.append(name)
            continue
        indent = name[: -len(name.lstrip()) or None]
        name = name.lstrip()
        columns = [textwrap.wrap(name, head, initial_indent=indent, subsequent_indent="    ")]
        columns += [textwrap.wrap(cell, each) for cell in cells]
        for parts in itertools.zip_longest(*columns, fillvalue=""):
            padded = [f"{part:<{each}}" for part in parts[1:]]
            text.append("  ".join([f"{parts[0]:<{head}}", *padded]).rstrip())
    return "\n".join(text)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


# --- the command ---------------------------------------------------------------------------------


def report(folders: Sequence[str], *, as_data: bool = False) -> str:
    """Returns what ``lightkit runs`` prints.

    Args:
        folders: None or one for a list, several for a comparison.
        as_data: Whether it shall be JSON.

    Raises:
        ConfigError: There is no such folder, or no run in one of several.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    if len(folders) < 2:
        found = find_runs(*folders)
        if as_data:
            return _json([as_json(run) for run in found])
        return table(found, width) if found else f"no runs below {[*folders, 'runs'][0]}"
    chosen = [_only(Path(folder)) for folder in folders]
    if as_data:
        return _json({"runs": [as_json(run) for run in chosen], "differences": compare(chosen)})
    return difference(chosen, width)


def _only(folder: Path) -> Run:
    """Returns the run of a folder that is to be compared."""
    run = _read(folder)
    if run is None:
        raise ConfigError(
            f"{folder}: there is no {ledger.FILE}, so this is no folder of a run. "
            f"lightkit runs FOLDER lists those below a folder."
        )
    return run


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)
