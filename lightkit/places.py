"""Where a run lies on disk: its folder, what is in it at the start, and checkpoints by name."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkit import checkpoint, provenance
from lightkit.callbacks import EarlyStopping, ModelCheckpoint
from lightkit.checkpoint.disk import same
from lightkit.errors import CheckpointError, ConfigError, UsageError, did_you_mean
from lightkit.ledger import Ledger, Record, read
from lightkit.loggers.base import last_version, version_of

if TYPE_CHECKING:
    from lightkit.loggers.base import Logger
    from lightkit.resuming import Start
    from lightkit.run import FitRun
    from lightkit.session import Session
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


def leaves_files(trainer: Trainer, session: Session) -> bool:
    """Tells whether a fit has a folder."""
    wanted = any(getattr(callback, "needs_folder", False) for callback in session.callbacks)
    return bool(session.loggers or trainer.options.enable_checkpointing or wanted)


def run_folder(trainer: Trainer, session: Session) -> Path | None:
    """Returns the folder of a fit, made; None where nothing shall be left behind."""
    if not leaves_files(trainer, session):
        return None
    chosen = next((d for logger in session.loggers if (d := logger.next_dir())), None)
    parent = trainer.default_root_dir / type(session.task).__name__
    try:
        if chosen is None:
            return _next_version(parent.absolute())  # whatever becomes the current folder
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = "logger=...(save_dir=...)" if chosen else "default_root_dir=..."
        raise ConfigError(
            f"The run folder {chosen or parent} cannot be made: {error.strerror}. Give another "
            f"one with Trainer({where})."
        ) from None
    return chosen.absolute()


def _next_version(parent: Path) -> Path:
    """Makes the folder of the next free number; two runs that start at once get two."""
    number = last_version(parent)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        number += 1
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def run_folders(trainer: Trainer, name: str) -> list[Path]:
    """Returns the folders in which runs of a task of class ``name`` may lie."""
    for logger in trainer.loggers:
        chosen = logger.next_dir()
        if chosen is not None:
            return [chosen.absolute(), *chosen.parent.absolute().glob("version_*")]
    return list((trainer.default_root_dir.absolute() / name).glob("version_*"))


def open_run(trainer: Trainer, run: FitRun, start: Start) -> None:
    """Opens the folder of a fit: locks it, writes its record, and lets the loggers begin.

    A run that goes on in its own folder takes back the rows that its checkpoint does not know. Over
    ranks a collective: rank zero does it, the others learn the folder and write nothing.
    """
    session, ranks = trainer.session, run.strategy.ranks
    if start.finished:  # nothing will happen, so nothing is written
        session.loggers.clear()
        session.run_dir = start.folder
        return
    session.run_dir = ranks.decide(
        lambda: start.folder or run_folder(trainer, session), "the folder of the run"
    )
    if session.run_dir is None:
        return
    run.run_id = start.record.id
    ranks.decide(lambda: _open_folder(trainer, run, start), "the opening of the run's folder")
    if not ranks.is_zero:
        session.loggers.clear()
        for logger in trainer.loggers:
            logger.follow(session.run_dir)


def _open_folder(trainer: Trainer, run: FitRun, start: Start) -> None:
    """Opens the folder of a fit, on rank zero."""
    session = trainer.session
    folder = session.run_dir
    assert folder is not None
    start.record.checkpoints = [
        _relative(callback._folder(trainer), folder) for callback in trainer.checkpoint_callbacks
    ]
    start.record.monitors = monitors(trainer)
    session.ledger = Ledger(folder, start.record, start.lock)
    session.history.folder = folder
    hparams = _logged_hparams(session)
    _write_settings(trainer, folder, run.state.global_step, hparams)
    if not trainer.rehearsing:
        provenance.keep(trainer, run, folder)
    for key, logger in keyed(session.loggers).items():
        if start.folder is None:
            logger.open(folder)
        else:
            logger.open(folder, purge_step=run.state.global_step + 1)
            logger.rewind(start.marks.get(key, {}))
    if start.path is None or start.folder is None:
        _begin_rows(session, session.ledger, hparams)


def monitors(trainer: Trainer) -> list[list[str]]:
    """Returns the names by which callbacks tell the best epoch, each with "min" or "max"."""
    savers = sorted(trainer.callbacks, key=lambda c: not isinstance(c, ModelCheckpoint))
    watchers = (c for c in savers if isinstance(c, (ModelCheckpoint, EarlyStopping)))
    return [[c.monitor, c.mode] for c in watchers if c.monitor is not None]


def _begin_rows(session: Session, ledger: Ledger, hparams: dict[str, Any]) -> None:
    """Notes where the files of the loggers begin, and writes what comes before the first row."""
    for key, logger in keyed(session.loggers).items():
        with contextlib.suppress(TypeError):  # a mark of the user's that JSON cannot hold
            ledger.record.marks[key] = json.loads(json.dumps(logger.mark()))
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(session.task)
    ledger.record.write(ledger.folder)


def _relative(path: Path, folder: Path) -> str:
    """Returns a path as it is best remembered: relative where it lies in the run folder."""
    try:
        return str(path.relative_to(folder.absolute()))
    except ValueError:
        return str(path)


def _write_settings(trainer: Trainer, folder: Path, step: int, hparams: dict[str, Any]) -> None:
    """Writes the configuration and the hyperparameters; an earlier configuration is kept."""
    if trainer.config_text is not None:
        file = folder / "config.yaml"
        if file.exists() and file.read_text(encoding="utf-8") != trainer.config_text:
            file.replace(folder / f"config_until_step_{step}.yaml")
        file.write_text(trainer.config_text, encoding="utf-8")
    if hparams:
        text = json.dumps(hparams, indent=2, default=repr)
        (folder / "hparams.json").write_text(text + "\n", encoding="utf-8")


def _logged_hparams(session: Session) -> dict[str, Any]:
    hparams: dict[str, Any] = {}
    for owner in (session.datamodule, session.task):
        if getattr(owner, "_log_hparams", True):
            hparams |= checkpoint.storable_hparams(getattr(owner, "hparams", None) or {})
    return hparams


def keyed(loggers: Sequence[Logger]) -> dict[str, Logger]:
    """Returns loggers by the names under which checkpoints hold their marks."""
    found: dict[str, Logger] = {}
    for logger in loggers:
        name = type(logger).__name__
        number = sum(key.partition("#")[0] == name for key in found)
        found[f"{name}#{number}" if number else name] = logger
    return found


def find_weights(trainer: Trainer, session: Session, given: str | Path | None) -> Path | None:
    """Returns the file that ``ckpt_path`` of an evaluation means, found by rank zero. A collective."""
    if given is None:
        return None
    task, ranks = session.task, session.strategy.ranks
    return ranks.decide(lambda: find_checkpoint(trainer, task, given), "the choice of weights")


def load_weights(session: Session, path: Path) -> None:
    """Loads the weights of a checkpoint on every rank. A collective.

    Raises:
        CheckpointError: The file cannot be read on one of them, or does not fit.
    """
    task, ranks = session.task, session.strategy.ranks
    checkpoint.on_every_rank(ranks, lambda: task.load_weights(path), "reading of the weights")
    _log.info("weights: %s", path)


def find_checkpoint(trainer: Trainer, task: TaskModule, given: str | Path) -> Path:
    """Returns the file that ``ckpt_path`` means: a path, "last" or "best"."""
    if given == "auto":
        raise ConfigError(
            "ckpt_path='auto' is for fit. Here a path, 'last' and 'best' are allowed."
        )
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"ckpt_path={given!r} is no path; allowed are a path, 'last', 'best' "
            f"and, in fit, 'auto'."
        )
    if given not in ("last", "best"):
        hint = did_you_mean(str(given), ("last", "best", "auto"))
        if hint and not Path(given).exists():
            raise CheckpointError(f"ckpt_path={given!r}: there is no such file.{hint}")
        return Path(given)
    own = trainer.session.ledger
    for callback in trainer.checkpoint_callbacks:
        known = callback.last_model_path if given == "last" else callback.best_model_path
        run = None if own is None else own.record.id
        path = _named(Path(known).parent, given, known, run) if known else None
        if path is not None:
            return path
    name = type(task).__name__
    # Where the callbacks of this trainer name folders, those of other runs are not meant.
    own_folders = [Path(c._given_dirpath) for c in trainer.checkpoint_callbacks if c._given_dirpath]
    meant = {folder.resolve() for folder in own_folders}
    for folder in sorted(run_folders(trainer, name), key=_age, reverse=True):
        record = read(folder) or Record(checkpoints=["checkpoints"], settings={"task": name})
        for place in record.folders(folder) if record.settings.get("task") in (None, name) else ():
            path = _named(place, given, place / f"{given}.ckpt", record.id)
            if path is not None and (not meant or place.resolve() in meant):
                return path
    raise UsageError(
        f"ckpt_path={given!r}: there is no {given}.ckpt, neither of this trainer's last fit nor in "
        f"a run below {trainer.default_root_dir / name}"
        f"{' that wrote to the dirpath of its ModelCheckpoint' if meant else ''}. Give the path of "
        f"a checkpoint, or leave out ckpt_path to begin anew."
    )


def _age(folder: Path) -> tuple[float, int]:
    """Returns what sorts run folders by age: when they began, else their number."""
    record, number = read(folder), version_of(folder)
    return (0.0 if record is None else record.began, -1 if number is None else number)


def _named(
    folder: Path, given: str | Path, best: str | Path, run: str | None = None
) -> Path | None:
    """Returns the newest whole checkpoint of a folder, or ``best`` if that is what is wanted."""
    if given == "last":
        return checkpoint.latest(folder, run=run)
    return Path(best) if Path(best).exists() else None


def newest_checkpoint(folder: Path, record: Record) -> Path | None:
    """Returns the newest whole checkpoint of a run, or None; ``last.ckpt`` where it is that one."""
    found = [
        (path.stat().st_mtime_ns, path)
        for place in record.folders(folder)
        if place.is_dir() and (path := checkpoint.latest(place, run=record.id)) is not None
    ]
    path = max(found)[1] if found else None
    if path is not None and (last := path.with_name("last.ckpt")).exists():
        return last if same(last, path) else path
    return path
