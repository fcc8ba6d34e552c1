"""Starts lives of a run, kills them, and compares what they leave behind with a run left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.faults.victim import Settings

REPOSITORY = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


def environment(**changes: str) -> dict[str, str]:
    """Returns the environment of a process that imports this repository, with one thread."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, **changes)


class Nursery:
    """A warm process that forks lives; see nursery.py.

    Args:
        hash_seed: Its PYTHONHASHSEED: two nurseries order sets and hash texts differently.
    """

    def __init__(self, hash_seed: int):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with it
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-W", "error"),
                *("-W", "ignore:This DataLoader will create:UserWarning"),  # on few cores
                *("-m", "tests.faults.nursery"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(PYTHONHASHSEED=str(hash_seed)),
            cwd=REPOSITORY,
            bufsize=0,
        )

    def start(self, call: str, arguments: dict[str, Any], log: Path) -> int:
        """Forks a life that calls ``module:function`` and returns its process id."""
        request = {"call": call, "arguments": arguments, "log": str(log)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return self._number(60.0)

    def wait(self, pid: int, timeout: float = 60.0) -> int:
        """Returns the exit code of the life that was started last (minus the signal)."""
        try:
            return self._number(timeout)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._number(10.0)
            raise

    def _number(self, timeout: float) -> int:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"nothing came from the nursery within {timeout} s")
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise AssertionError(f"the nursery has died: {self.errors.read()[-2000:].decode()}")
        return int(line)

    def close(self) -> None:
        """Ends it."""
        with self.process, self.errors:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(10)


class Lives:
    """Lives of runs, in turn from two nurseries, so that no two in a row are alike in hashes."""

    def __init__(self) -> None:
        self._nurseries: list[Nursery] = []
        self.count = 0

    def start(self, call: str, arguments: dict[str, Any], log: Path) -> tuple[Nursery, int]:
        """Starts a life."""
        if not self._nurseries:
            self._nurseries = [Nursery(1), Nursery(2)]
        nursery = self._nurseries[self.count % 2]
        self.count += 1
        log.parent.mkdir(parents=True, exist_ok=True)
        return nursery, nursery.start(call, arguments, log)

    def begin(self, settings: Settings) -> tuple[Nursery, int]:
        """Starts a life of a run and returns who waits for it, and its process id."""
        log = Path(settings.root) / "log.txt"
        return self.start("tests.faults.victim:live", dataclasses.asdict(settings), log)

    def live(self, settings: Settings, timeout: float = 60.0) -> int:
        """Lives once and returns the exit code."""
        nursery, pid = self.begin(settings)
        return nursery.wait(pid, timeout)

    def command(self, words: list[str], folder: Path) -> int:
        """Runs ``lightkit`` with these words in a folder and returns the exit code."""
        arguments = {"words": words, "folder": str(folder)}
        nursery, pid = self.start("tests.faults.victim:command", arguments, folder / "log.txt")
        return nursery.wait(pid)

    def run(self, settings: Settings, *kills: dict[str, Any], timeout: float = 60.0) -> Outcome:
        """Lives and dies once for each kill, then lives to the end."""
        for kill in kills:
            code = self.live(dataclasses.replace(settings, kill=kill), timeout)
            assert code == KILLED, f"{kill} never came: exit code {code}\n{log_of(settings.root)}"
        code = self.live(settings, timeout)
        assert code == 0, f"exit code {code} in the last life\n{log_of(settings.root)}"
        return Outcome.of(settings.root)

    def close(self) -> None:
        """Ends the nurseries."""
        for nursery in self._nurseries:
            nursery.close()


def log_of(root: str | Path) -> str:
    """Returns the end of what the lives of a run have written."""
    return (Path(root) / "log.txt").read_text()[-6000:]


# --- what a run leaves behind --------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """All that a finished run leaves behind, without names of folders and times.

    Attributes:
        dump: What the last life wrote at its end.
        rows: The bytes of metrics.jsonl and metrics.csv, by name.
        curves: The scalars of TensorBoard: tag to [(step, value)].
        batches: What was trained, completed steps only: (epoch, batch) to (indices, loss).
        repeated: Every batch that any life trained, also those that were done again.
        folders: The folders of the run.
    """

    dump: dict[str, Any]
    rows: dict[str, bytes]
    curves: dict[str, list[tuple[int, float]]]
    batches: dict[tuple[int, int], tuple[list[int], str]]
    repeated: list[tuple[tuple[int, int], tuple[list[int], str]]]
    folders: list[str]

    @classmethod
    def of(cls, root: str | Path) -> Outcome:
        """Reads it."""
        root = Path(root)
        dump = torch.load(root / "dump.pt", weights_only=True)
        folder = Path(dump.pop("run_dir"))
        rows = {p.name: p.read_bytes() for p in sorted(folder.glob("metrics.*"))}
        batches, repeated = _batches(root / "seen.jsonl")
        folders = sorted(p.name for p in folder.parent.glob("version_*"))
        run_id = json.loads((folder / "run.json").read_text())["id"]
        dump = _without(dump, str(folder), run_id)
        dump.pop("events")
        return cls(dump, rows, curves(folder), batches, repeated, folders)

    def differences(self, other: Outcome) -> list[str]:
        """Returns what is not the same in another outcome, in words."""
        found: list[str] = []
        for name in ("dump", "curves", "batches"):
            compare(getattr(self, name), getattr(other, name), name, found)
        compare(sorted(self.rows), sorted(other.rows), "files of rows", found)
        for name in self.rows.keys() & other.rows.keys():
            compare(
                self.rows[name].decode().splitlines(keepends=True),
                other.rows[name].decode().splitlines(keepends=True),
                name,
                found,
            )
        for place, batch in other.repeated:
            if self.batches.get(place) != batch:
                found.append(f"batch {place} was {batch} in one life, {self.batches.get(place)}")
        return found


def _batches(path: Path):
    """Returns the batches that count, and all of them; a later life takes back what it redoes."""
    kept: dict[tuple[int, int], tuple[list[int], str]] = {}
    repeated = []
    for line in path.read_bytes().splitlines():
        kind, epoch, batch, *rest = json.loads(line)
        if kind == "life":
            kept = {place: it for place, it in kept.items() if place < (epoch, batch)}
        else:
            assert (epoch, batch) not in kept, f"batch {epoch, batch} was trained twice in a life"
            kept[epoch, batch] = tuple(rest)
            repeated.append(((epoch, batch), tuple(rest)))
    return kept, repeated


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def _without(item: Any, *names: str) -> Any:
    """Returns ``item`` with the run's own names taken out of all texts."""
    if isinstance(item, str):
        for name in names:
            item = item.replace(name, "RUN")
    if isinstance(item, dict):
        return {_without(k, *names): _without(v, *names) for k, v in item.items()}
    if isinstance(item, (list, tuple)):
        return [_without(value, *names) for value in item]
    return item


def compare(one: Any, two: Any, name: str, found: list[str]) -> None:
    """Adds to ``found`` where two plain objects are not the same, in bits, types and order.

    Stricter than what lightkit compares itself with, and apart from it on purpose.
    """
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            found.append(f"{name}: {one.dtype} {one.shape} and {two.dtype} {two.shape}")
        elif not torch.equal(_bits(one), _bits(two)):
            most = (one.double() - two.double()).abs().max()
            found.append(f"{name}: differs by up to {float(most):.3g}")
    elif isinstance(one, dict) and isinstance(two, dict):
        if list(one) != list(two):
            found.append(f"{name}: the keys {list(one)} and {list(two)}")
        for key in one.keys() & two.keys():
            compare(one[key], two[key], f"{name}[{key!r}]", found)
    elif isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            found.append(f"{name}: {len(one)} and {len(two)} items")
        for i, (a, b) in enumerate(zip(one, two, strict=False)):
            compare(a, b, f"{name}[{i}]", found)
    elif type(one) is not type(two) or (one != two and not (one != one and two != two)):
        found.append(f"{name}: {one!r:.200} and {two!r:.200}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def ended(pids: list[int], within: float) -> list[int]:
    """Waits for processes of a life, and returns (and ends) those that live on."""
    end = time.monotonic() + within
    while (alive := [pid for pid in pids if _alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
