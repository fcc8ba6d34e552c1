"""Where a run lies on disk: its folder, what is in it at the start, and checkpoints by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkit import checkpoint
from lightkit.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from lightkit.session import Session
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer


def run_folder(trainer: Trainer, session: Session) -> Path | None:
    """Returns the folder of a fit, made; None where nothing shall be left behind."""
    if not (session.loggers or trainer.options.enable_checkpointing):
        return None
    chosen = next((d for logger in session.loggers if (d := logger.next_dir())), None)
    parent = trainer.default_root_dir / type(session.task).__name__
    try:
        if chosen is None:
            return _next_version(parent)
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = "logger=...(save_dir=...)" if chosen else "default_root_dir=..."
        raise ConfigError(
            f"The run folder {chosen or parent} cannot be made: {error.strerror}. Give another "
            f"one with Trainer({where})."
        ) from None
    return chosen


def _next_version(parent: Path) -> Path:
    """Makes the folder of the next free number; two runs that start at once get two."""
    number = max(map(int, _versions(parent)), default=-1)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        number += 1
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _versions(parent: Path) -> list[str]:
    return [p.name[8:] for p in parent.glob("version_*") if p.name[8:].isdigit()]


def open_loggers(trainer: Trainer, session: Session) -> None:
    """Opens the loggers and writes what is known before the first step."""
    folder = session.run_dir
    if folder is None:
        return
    if trainer.config_text is not None:
        (folder / "config.yaml").write_text(trainer.config_text, encoding="utf-8")
    hparams: dict[str, Any] = {}
    for owner in (session.datamodule, session.task):
        if getattr(owner, "_log_hparams", True):
            hparams |= checkpoint.storable_hparams(getattr(owner, "hparams", None) or {})
    if hparams:
        text = json.dumps(hparams, indent=2, default=repr)
        (folder / "hparams.json").write_text(text + "\n", encoding="utf-8")
    for logger in session.loggers:
        logger.open(folder)
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(session.task)


def find_checkpoint(trainer: Trainer, task: TaskModule, given: str | Path) -> Path:
    """Returns the file that ``ckpt_path`` means: a path, "last" or "best"."""
    if given == "auto":
        raise ConfigError(
            "ckpt_path='auto' is not in this version. Allowed: a path, 'last' or 'best'."
        )
    if given not in ("last", "best"):
        return Path(given)
    for callback in trainer.checkpoint_callbacks:
        known = callback.last_model_path if given == "last" else callback.best_model_path
        path = _named(Path(known).parent, given, known) if known else None
        if path is not None:
            return path
    root = trainer.default_root_dir / type(task).__name__
    for number in sorted(map(int, _versions(root)), reverse=True):
        folder = root / f"version_{number}" / "checkpoints"
        path = _named(folder, given, folder / f"{given}.ckpt")
        if path is not None:
            return path
    raise UsageError(
        f"ckpt_path={given!r}: there is no {given}.ckpt, neither of this trainer's last fit nor in "
        f"a run below {root}. Give the path of a checkpoint."
    )


def _named(folder: Path, given: str | Path, best: str | Path) -> Path | None:
    """Returns the newest whole checkpoint of a folder, or ``best`` if that is what is wanted."""
    if given == "last":
        return checkpoint.latest(folder)
    return Path(best) if Path(best).exists() else None
