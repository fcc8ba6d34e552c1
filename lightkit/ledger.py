"""``run.json``: what a run is and how it ended, so that it can be found and continued.

One small file in each run folder, replaced as a whole when a fit begins and when it ends. A run
that was killed says "running" for ever; whether somebody is still at work on it tells a lock, which
the operating system takes away with the process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightkit.errors import ConfigError, UsageError
from lightkit.history import History, best_epoch

if TYPE_CHECKING:
    from lightkit.limits import Limits
    from lightkit.options import Options
    from lightkit.state import TrainState

fcntl: Any = None  # on Windows: runs are not locked there
with contextlib.suppress(ImportError):
    import fcntl

_log = logging.getLogger("lightkit")

FILE = "run.json"
_LOCK = ".lock"
_ACCUMULATE = "trainer.accumulate_grad_batches"
#: The Trainer's arguments that a run's numbers depend on. How long it trains may change.
_NUMBERS = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "fused",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "precision",
    "seed",
    "val_check_interval",
)


@dataclass
class Record:
    """What ``run.json`` holds.

    Attributes:
        id: Name of the run, the same in all its checkpoints.
        status: "running", "finished", "interrupted" (Ctrl-C, a signal) or "failed".
        settings: What the numbers of the run depend on, as plain values by name.
        limits: How far it was to train: epochs, steps (-1: no limit) and seconds.
        checkpoints: The folders of its checkpoints, relative to the run folder where below it.
        marks: Where the loggers' files stood when it began, by their names.
        job: The job of a cluster that it belongs to; "" for none.
        seed: The Trainer's seed, also one that was drawn.
        began: When it began, in seconds since 1970.
        process: Who writes it: the number of the process and its machine.
        epoch: Epochs completed when it ended.
        global_step: Steps completed when it ended.
        seconds: How long it had trained then.
        error: What ended it, where it failed.
        monitors: Names that tell which epoch is the best, and "min" or "max", in their order.
        last: The last epoch of the history; None for what is not finite.
        best: The best one.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = "running"
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    marks: dict[str, Any] = field(default_factory=dict)
    job: str = ""
    seed: int | None = None
    began: float = field(default_factory=time.time)
    process: str = ""
    epoch: int = 0
    global_step: int = 0
    seconds: float = 0.0
    error: str = ""
    monitors: list[list[str]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replaces the file of a run folder as a whole."""
        part = folder / f".{FILE}.part"
        part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / FILE)

    def keep(self, history: History) -> None:
        """Takes the last and the best epoch of a history."""
        best = best_epoch(history, [*self.monitors, ("val_loss", "min"), ("train_loss", "min")])
        last = history[-1] if history else {}
        self.last, self.best = (
            {name: value if math.isfinite(value) else None for name, value in row.items()}
            for row in (last, best[1] if best else {})
        )

    def folders(self, run_dir: Path) -> list[Path]:
        """Returns the folders of the checkpoints."""
        return [run_dir / name for name in self.checkpoints]


def read(folder: Path) -> Record | None:
    """Returns what is known about the run of a folder; None where there is nothing readable."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        known = {k: v for k, v in values.items() if k in Record.__dataclass_fields__}
        return Record(id=known.pop("id"), **known)  # without one it is another program's file
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def this_process() -> str:
    """Returns what tells this process from others on all machines."""
    return f"{os.getpid()} on {platform.node()}"


def limits_of(limits: Limits) -> dict[str, Any]:
    """Returns how far a fit trains."""
    return {
        "max_epochs": limits.max_epochs,
        "max_steps": limits.max_steps,
        "seconds": limits.seconds,
    }


def raised(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Tells whether one of the limits allows more than it did."""

    def open_end(value: Any) -> float:
        return float("inf") if value is None or value < 0 else value

    return any(open_end(now[name]) > open_end(before.get(name)) for name in now)


def settings_of(
    task: Any,
    datamodule: Any,
    options: Options,
    *,
    drawn: bool,
    loader: Any = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Returns what the numbers of a run depend on, as far as arguments tell.

    Args:
        task: The task; its class and its constructor arguments count.
        datamodule: The data module or None.
        options: The Trainer's arguments; those that change the numbers count.
        drawn: Whether the seed was drawn and not given, so that it may be another one.
        loader: The training loader, where it was given to fit.
        processes: How many train together.
    """
    found: dict[str, Any] = {"task": type(task).__name__, "processes": processes}
    for word, owner in (("task", task), ("data", datamodule)):
        for name, value in (getattr(owner, "hparams", None) or {}).items():
            found[f"{word}.{name}"] = plain(value)
    for name in _NUMBERS:
        value = None if name == "seed" and drawn else getattr(options, name)
        found[f"trainer.{name}"] = plain(value)
    if options.prefetch:  # else reading draws in its turn, whatever was said
        found["trainer.prefetch"] = options.prefetch
    for name, size in (
        ("batch_size", getattr(loader, "batch_size", None)),
        ("samples", _len(loader)),
    ):
        if isinstance(size, int):
            found[f"loader.{name}"] = size
    return found


def _len(loader: Any) -> int | None:
    """Returns the number of samples of a DataLoader's dataset; None where it is not known."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each setting that is another one now.

    A run goes on with any number of processes. What it accumulates may change with that number, if
    a step has as many batches as before.
    """
    lines = []
    passed = {"processes"} | ({_ACCUMULATE} if _per_step(before) == _per_step(now) else set())
    for name in sorted((before.keys() | now.keys()) - passed):
        old, new = (
            json.dumps(s[name], sort_keys=True) if name in s else "not there" for s in (before, now)
        )
        if old != new and not (name == "trainer.seed" and "null" in (old, new)):
            lines.append(f"{name}: {old} in the run, {new} now")
    return lines


def _per_step(settings: Mapping[str, Any]) -> int:
    """Returns the batches of an optimizer step over all processes."""
    return int(settings.get("processes", 1) * settings.get(_ACCUMULATE, 1))


def plain(value: Any) -> Any:
    """Returns what JSON can hold and two processes agree on: of other objects only the class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    kind = value if isinstance(value, type) else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"


class Ledger:
    """The record of a run that is under way in this process.

    Args:
        folder: The run folder.
        record: What is known of the run.
        lock: The lock of the folder where it is held already; taken here else.

    Raises:
        UsageError: Another process is at work in the folder.
        ConfigError: The folder cannot be written.
    """

    def __init__(self, folder: Path, record: Record, lock: Lock | None = None) -> None:
        self.folder, self.record = folder, record
        self._lock = Lock(folder) if lock is None else lock
        record.status, record.process, record.error = "running", this_process(), ""
        try:
            record.write(folder)
        except OSError as error:
            self._lock.release()
            raise ConfigError(
                f"The run folder {folder} cannot be written: {error.strerror}. Give another one "
                f"with Trainer(default_root_dir=...)."
            ) from None

    def close(self, error: BaseException | None, state: TrainState, history: History) -> None:
        """Writes how the run ended, and lets other processes go on with it."""
        record, stopped = self.record, isinstance(error, (KeyboardInterrupt, SystemExit))
        record.status = "interrupted" if stopped else "failed" if error else "finished"
        record.epoch, record.global_step = state.epoch, state.global_step
        record.seconds = state.seconds
        if record.status == "failed":
            first = next(iter(str(error).splitlines()), "")
            record.error = f"{type(error).__name__}: {first}"[:200]
        record.keep(history)
        try:
            record.write(self.folder)
        except OSError as problem:  # a full disk; the checkpoints tell all that is needed
            _log.warning("%s could not be written: %s", self.folder / FILE, problem.strerror)
        finally:
            self._lock.release()


# --- the lock ------------------------------------------------------------------------------------

#: Folders that this process has locked. (To ask for a lock of one's own would release it.)
_held: set[Path] = set()


class Lock:
    """Keeps other processes from writing to the same run folder.

    A record lock: worker processes do not inherit it, and it ends with the process that holds it,
    however that ends.

    Raises:
        UsageError: Another process is at work in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._file: IO[bytes] | None = None
        if self._folder in _held:
            raise UsageError(f"{folder} is in use by another fit of this process.")
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks, or one that is full
                self._file = open(folder / _LOCK, "wb")  # noqa: SIM115  # held until release
        if self._file is not None:
            self._take(self._file, folder)
        _held.add(self._folder)

    def _take(self, file: IO[bytes], folder: Path) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            record = read(folder)
            who = f" (process {record.process})" if record is not None and record.process else ""
            raise UsageError(
                f"{folder} is in use by another process{who}. Wait until it has ended, or begin a "
                f"new run without ckpt_path."
            ) from None
        except OSError:  # no locks on this file system
            pass

    def release(self) -> None:
        """Lets others in again; does nothing the second time."""
        _held.discard(self._folder)
        file, self._file, self._folder = self._file, None, Path()
        if file is not None:
            file.close()


def in_use(folder: Path) -> bool:
    """Tells whether a process is at work in a run folder; True where locks cannot tell."""
    # To open the file of a lock that this process holds would release it.
    if fcntl is None or folder.resolve() in _held:
        return True
    try:
        with open(folder / _LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such file, or no locks on this file system
        return (folder / _LOCK).exists()
    return False
