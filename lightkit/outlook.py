"""What a rehearsal tells about the fit: names that nobody logs, the last batch, the disk, an error."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from lightkit import announce
from lightkit.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
from lightkit.checkpoint.savers import in_validation
from lightkit.errors import ConfigError, some
from lightkit.explaining import of_user as of_user_frame
from lightkit.hooks import Callback, of_user
from lightkit.schedules import no_such_metric
from lightkit.task import TaskModule
from lightkit.trials import changing

if TYPE_CHECKING:
    from lightkit.loggers.base import Logger
    from lightkit.run import FitRun
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
#: Callbacks that end a fit where the name that they monitor is missing.
_WATCHERS = (EarlyStopping, ModelCheckpoint)
#: Classes that log nothing themselves, and what code does that logs.
_SILENT = (Callback, *TaskModule.__mro__, *_WATCHERS, ProgressBar)
#: Errors that come of how something is written, whatever data an epoch has seen at its end.
_TYPOS = (NameError, AttributeError, KeyError, TypeError, ImportError)
_QUOTED = re.compile(r"""(f?)['"](\w[^'"\n]*|\{[^'"\n]*)['"]""")
_LOGS = re.compile(r"\.log(_dict)?\(|callback_metrics(\[.*\] *=[^=]|\.update)")


def savers_of(trainer: Trainer) -> list[ModelCheckpoint]:
    """Returns the callbacks that will write files."""
    savers = [one for one in trainer.session.callbacks if isinstance(one, ModelCheckpoint)]
    return [one for one in savers if one.save_last or one.save_top_k]


def disk(trainer: Trainer, size: int) -> tuple[int, int]:
    """Returns how many bytes are free for checkpoints, and how many those that stay will take.

    Args:
        trainer: The trainer of a fit.
        size: Bytes of one.
    """
    steps, epochs = announce.planned(trainer)
    files = 0
    for saver in savers_of(trainer):
        kept: float = saver.save_top_k
        if kept < 0:
            kept = (epochs or 0) // (saver.every_n_epochs or math.inf)
            kept += (steps or 0) // (saver.every_n_train_steps or math.inf)
        files += int(kept) + saver.save_last
    free = min(shutil.disk_usage(existing(folder)).free for folder in _folders(trainer))
    return free, size * (files + 1)  # a file goes when the next one is complete


def _folders(trainer: Trainer) -> list[Path]:
    """Returns the folders that checkpoints go to, or those above."""
    own = [Path(saver._given_dirpath) for saver in savers_of(trainer) if saver._given_dirpath]
    return [trainer.default_root_dir, *own]


def existing(folder: Path) -> Path:
    """Returns the nearest folder above, or itself, that is there."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def megabytes(count: float) -> str:
    """Returns a number of bytes as people read it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _functions(error: Exception) -> set[str]:
    return {frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)}


def explain(error: Exception, trainer: Trainer, run: FitRun) -> None:
    """Says of an error where it came from, and what it would have ended."""
    frames = _functions(error)
    if "_try_save" in frames:
        when = "at its first save"
    elif in_validation(error):
        when = f"in its first validation{_after(run)}"
    elif "train_step" in frames:
        when = "in its first steps"
    elif "_close_epoch" in frames:
        when = "at the end of its first epoch"
    else:
        when = "before its first step"
    text = (
        f"This came in the rehearsal, on a copy of the task, before the fit began: the fit would have "
        f"failed {when}. Trainer(rehearse=False) leaves the rehearsal out."
    )
    if missing := counted_on(trainer):
        text += f" (It is without {missing}: an error for want of that is none of the fit.)"
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        _log.error("%s", text)


def left_out(trainer: Trainer) -> list[Any]:
    """Returns the callbacks, and the functions of `Trainer.on`, that hear nothing of a rehearsal."""
    callbacks = trainer.session.callbacks
    there = [id(one) for one in changing(callbacks)]
    functions = [handler.function for handler in trainer._handlers]
    return [*(one for one in callbacks if id(one) not in there), *functions]


def sends(logger: Logger) -> bool:
    """Tells whether a logger may do more than write files in the folder of its run."""
    from lightkit.loggers import CSVLogger, JSONLLogger, TensorBoardLogger

    return type(logger) not in (CSVLogger, JSONLLogger, TensorBoardLogger)


def counted_on(trainer: Trainer) -> str:
    """Names what a task may count on, and what a rehearsal leaves out; "" where there is nothing.

    A callback of the user's may give the task a temperature, a logger open what a step sends to.
    """
    own = [one if inspect.isroutine(one) else type(one) for one in left_out(trainer)]
    names = [getattr(one, "__name__", str(one)) for one in own if of_user(one)]
    return some([*names, *(type(one).__name__ for one in filter(sends, trainer.loggers))])


def doubt(error: Exception, trainer: Trainer, run: FitRun) -> str:
    """Returns what to say of an error that may be one of the rehearsal alone; "" where it is none."""
    missing, frames = counted_on(trainer), _functions(error)
    if "_close_epoch" in frames and not (in_validation(error) or isinstance(error, _TYPOS)):
        missing = f"{missing} and the rest of the epoch" if missing else "the rest of the epoch"
    if (
        trainer.options.rehearse
        or not missing
        or run.strategy.world_size > 1
        or isinstance(error, ConfigError)
    ):
        return ""
    lines = [(frame, line) for frame, line in walk_tb(error.__traceback__) if of_user_frame(frame)]
    code, line = (lines[-1][0].f_code, lines[-1][1]) if lines else (None, 0)
    where = f" ({Path(code.co_filename).name}:{line}, in {code.co_name})" if code else ""
    return (
        f"it failed with {type(error).__name__}: {error}{where}. That may be for want of {missing}, "
        f"left out there, so the fit begins; Trainer(rehearse=True) makes it an error"
    )


def _after(run: FitRun) -> str:
    """Returns after how many steps the first validation comes; "" if that is not known."""
    unit, every = run.cadence.unit, run.cadence.every
    if unit == "epoch":
        if run.train_length is None:
            return ""
        batches = run.train_length * every
    elif unit in ("batches", "total"):
        batches = every
    else:
        return f", after {every:g} steps" if unit == "steps" else ""
    return f", after {math.ceil(batches / run.flow.accumulate)} steps"


def check_monitors(trainer: Trainer, run: FitRun, logged: Collection[str], sure: bool) -> None:
    """Looks for the names that callbacks and schedules read.

    Args:
        trainer: The trainer.
        run: Its fit.
        logged: The names that the rehearsal logged.
        sure: Whether the task did there all that it will do.

    Raises:
        ConfigError: One of them was not logged, and nobody's code looks as if it might be later.
    """
    watchers: list[Any] = [
        one for one in trainer.session.callbacks if not getattr(one, "_optional", False)
    ]
    asked: list[tuple[str, str, bool]] = [
        (type(one).__name__, one.monitor, getattr(one, "strict", isinstance(one, _WATCHERS)))
        for one in watchers
        if isinstance(getattr(one, "monitor", None), str)
    ]
    entries = run.plan.plateau_entries
    asked += [(type(e.scheduler).__name__, e.monitor or "", e.strict) for e in entries]
    unheard = left_out(trainer)
    for who, monitor, strict in asked:
        if monitor in logged or not sure or any(map(_may_log, unheard)):
            continue
        text = f"{no_such_metric(who, monitor, logged)} They are those of the rehearsal"
        if not strict or _names(run.task, monitor):
            _log.warning("%s, which is well only if it comes later.", text)
            continue
        raise ConfigError(
            f"{text}: the fit would have ended at its first look there{_after(run)}. Log it with "
            f"self.log({monitor!r}, ...), or monitor another name. Trainer(rehearse=False) leaves the "
            f"rehearsal out."
        )


def _sources(one: Any) -> Iterable[str]:
    """Yields the code of an object's classes, or of a function; "" where it cannot be read."""
    for kind in [one] if inspect.isroutine(one) else type(one).__mro__:
        if kind in _SILENT or kind.__module__.partition(".")[0] in ("torch", "torchmetrics"):
            continue
        try:
            yield inspect.getsource(kind)
        except (OSError, TypeError):
            yield ""


def _may_log(one: Any) -> bool:
    """Tells whether code logs something, or cannot be read."""
    return any(not text or _LOGS.search(text) for text in _sources(one))


def _names(task: TaskModule, monitor: str) -> bool:
    """Tells whether the code of a task has a name in quotes, or may compose it; or cannot be read."""
    for text in _sources(task):
        for composed, quoted in _QUOTED.findall(text):
            pattern = re.escape(quoted)
            if composed:
                pattern = re.sub(r"\\{.*?\\}", ".+", pattern)
            if re.fullmatch(pattern, monitor):
                return True
        if not text:
            return True
    return False


def check_last_batch(run: FitRun, means: Mapping[str, int]) -> None:
    """Warns where a last batch of one sample leaves batch norms a single value for each channel.

    Args:
        run: The fit.
        means: Names of batch norms, and over how many values of a whole batch they took means.
    """
    counts, length = run.counts, run.train_length
    if counts is None or counts.last != 1 or length is None or length < counts.batches:
        return
    single = [name for name, values in means.items() if values <= counts.batch_size]
    if single:
        _log.warning(
            "The last training batch of each epoch has 1 sample, of which batch norms cannot take a "
            "mean and a variance (%s). Give the loader drop_last=True, or another batch_size.",
            some(single),
        )


def check_disk(trainer: Trainer, size: int) -> None:
    """Looks whether checkpoints can be written, and compares what is free with what they will take.

    Raises:
        ConfigError: A folder cannot be written, or there is no room for one of them.
    """
    for folder in _folders(trainer):
        if not os.access(existing(folder), os.W_OK):
            raise ConfigError(
                f"Checkpoints shall go to {folder}, and {existing(folder)} cannot be written. Choose "
                f"another folder with default_root_dir= of the Trainer or dirpath= of ModelCheckpoint."
            )
    free, needed = disk(trainer, size)
    if free < size:
        raise ConfigError(
            f"A checkpoint has {megabytes(size)}, and {megabytes(free)} are free on the disk of "
            f"the run folder. Make room, or choose another with default_root_dir= or dirpath=."
        )
    if free < needed:
        _log.warning(
            "The checkpoints of this fit may take %s (%s each), and %s are free on the disk. Keep "
            "fewer of them (save_top_k=), or make room.",
            megabytes(needed),
            megabytes(size),
            megabytes(free),
        )
