"""Where a fit begins: anew, or from which checkpoint, and in which folder it goes on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkit import checkpoint, ledger
from lightkit.distributed import job_id
from lightkit.errors import CheckpointError, ConfigError
from lightkit.places import find_checkpoint, newest_checkpoint, run_folders
from lightkit.state import TrainState

if TYPE_CHECKING:
    from lightkit.run import FitRun
    from lightkit.session import Session
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


@dataclass
class Start:
    """How a fit begins.

    Attributes:
        path: The checkpoint that it continues; None begins anew.
        saved: What is in it.
        folder: The run folder in which it goes on; None makes a new one.
        record: What ``run.json`` of that folder says.
        finished: Whether nothing is left to train, so that nothing shall be written either.
    """

    path: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    record: ledger.Record = field(default_factory=ledger.Record)
    finished: bool = False

    @property
    def marks(self) -> dict[str, Any]:
        """Where the loggers' files stood when the checkpoint was written."""
        marks: dict[str, Any] = self.saved.get("loggers", {})
        return marks


def find(trainer: Trainer, session: Session, given: str | Path | None) -> Start:
    """Returns what ``ckpt_path`` means. Reads files and changes none.

    Args:
        trainer: The trainer.
        session: The fit that is about to be opened.
        given: None, "auto", "last", "best" or a path.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: "auto" would continue a run of other settings.
        UsageError: There is no such checkpoint.
    """
    options = trainer.options
    record = ledger.Record(
        settings=ledger.settings_of(
            session.task, session.datamodule, options, drawn=trainer.seed_drawn
        ),
        limits=ledger.limits_of(trainer.limits),
        job=job_id(),
        seed=options.seed,
    )
    if given is None or (given == "auto" and options.fast_dev_run):
        return Start(record=record)
    if given == "auto":
        return _automatic(trainer, session, record)
    path = find_checkpoint(trainer, session.task, given)
    start = Start(path, checkpoint.read_checkpoint(path), record=record)
    if "loop" in start.saved and not options.fast_dev_run:
        _choose_folder(start)
        complete = start.folder is None or start.record.status == "finished"
        start.finished = complete and _reached(trainer, start.saved)
    return start


def _reached(trainer: Trainer, saved: dict[str, Any]) -> bool:
    """Tells whether the limits leave nothing to train after a checkpoint."""
    state = TrainState()
    state.load_state_dict(saved["loop"])
    return trainer.limits.reached(state)


def _choose_folder(start: Start) -> None:
    """Goes on in the folder of the checkpoint's run, if nothing that is there would be lost."""
    assert start.path is not None
    folder, header = _run_of(start.path, start.saved), start.saved["lightkit"]
    old = None if folder is None else ledger.read(folder)
    if folder is None or old is None:
        return
    newest = newest_checkpoint(folder, old)
    why = None
    if newest is None or not (
        newest.samefile(start.path) or _steps(newest) <= header["global_step"]
    ):
        why = "there are later checkpoints of it"
    elif changed := ledger.differences(old.settings, start.record.settings):
        why = f"settings changed ({'; '.join(changed)})"
    elif ledger.in_use(folder):
        why = "another process is at work on it"
    if why is not None:
        _log.info("%s stays as it is and a new run begins: %s", folder, why)
        return
    start.folder, start.record = folder, _continued(old, start.record)


def _continued(old: ledger.Record, now: ledger.Record) -> ledger.Record:
    """Returns the record of a run that goes on: itself, with what may have changed."""
    old.limits, old.job = now.limits, now.job
    return old


def _steps(path: Path) -> int:
    header = checkpoint.read_checkpoint(path)["lightkit"]
    return int(header["global_step"])


def _run_of(path: Path, saved: dict[str, Any]) -> Path | None:
    """Returns the run folder that a checkpoint belongs to, wherever the two were moved together."""
    header = saved["lightkit"]
    named = header.get("run")
    places = [*path.absolute().parents[:3], Path(header.get("folder") or "/")]
    for folder in places if named else ():
        record = ledger.read(folder)
        if record is not None and record.id == named:
            return folder
    return None


# --- ckpt_path="auto" ----------------------------------------------------------------------------


def _automatic(trainer: Trainer, session: Session, now: ledger.Record) -> Start:
    """Continues the newest run of this name, begins anew, or leaves a finished run alone."""
    if not trainer.options.enable_checkpointing:
        raise ConfigError(
            "ckpt_path='auto' continues from checkpoints, but enable_checkpointing=False writes "
            "none. Remove one of the two."
        )
    found = pick(run_folders(trainer, type(session.task).__name__), now.job)
    if found is None:
        _log.info("ckpt_path='auto': there is no run to continue, so a new one begins")
        return Start(record=now)
    folder, old = found
    if changed := ledger.differences(old.settings, now.settings):
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"ckpt_path='auto' would continue {folder}, but its settings were others:\n  {listed}\n"
            f"Put them back, or begin a new run without ckpt_path, or continue all the same from "
            f"a checkpoint that you name (ckpt_path='last')."
        )
    path = newest_checkpoint(folder, old)
    done = old.status == "finished"
    if path is None:
        if done:
            raise CheckpointError(
                f"ckpt_path='auto': {folder} is finished, but its checkpoints are gone. Begin a "
                f"new run without ckpt_path."
            )
        _log.info("%s ended before its first checkpoint, so a new run begins", folder)
        return Start(record=now)
    start = Start(path, checkpoint.read_checkpoint(path), folder)
    start.finished = done and (
        not ledger.raised(now.limits, old.limits) or _reached(trainer, start.saved)
    )
    if start.finished:
        _log.info(
            "%s is finished (%d epochs, %d steps): nothing is left to train. To train longer raise "
            "max_epochs or max_steps; to begin anew leave out ckpt_path.",
            folder,
            old.epoch,
            old.global_step,
        )
    start.record = old if start.finished else _continued(old, now)
    return start


def pick(folders: list[Path], job: str) -> tuple[Path, ledger.Record] | None:
    """Returns the run that "auto" means: the newest of this job, else the newest of all.

    Runs that another process is at work on are passed over, unless they are of this very job.
    """
    runs = [(record, folder) for folder in folders if (record := ledger.read(folder)) is not None]
    runs.sort(key=lambda run: run[0].began, reverse=True)
    own = [run for run in runs if job and run[0].job == job]
    for record, folder in own or runs:
        if own or not ledger.in_use(folder):
            return folder, record
        _log.info("%s is passed over: another process is at work on it", folder)
    return None


def earlier_seed(trainer: Trainer, name: str, given: str) -> int | None:
    """Returns the seed of the run that ``ckpt_path`` continues; None where it is not known.

    Data that is split or made at random must be the same again, so who draws a seed asks here.
    """
    if given in ("auto", "last", "best"):
        found = pick(run_folders(trainer, name), job_id())
        return None if found is None else found[1].seed
    records = (ledger.read(folder) for folder in Path(given).absolute().parents[:3])
    return next((record.seed for record in records if record is not None), None)


# --- putting it back -----------------------------------------------------------------------------


def restore(trainer: Trainer, run: FitRun, start: Start) -> str | None:
    """Restores a run from the checkpoint of its start and returns its path, None where it is new."""
    if start.path is None:
        return None
    checkpoint.restore(run, start.saved)
    run.rng = start.saved["rng"][0]
    run.sanity_batches = 0
    run.flow.validated_step = run.state.global_step
    cut_off = start.folder is not None and start.record.status != "finished"
    if start.finished or cut_off:  # one that was cut off was perhaps about to end
        run.flow.stop_reason = start.saved.get("flow", {}).get("stop_reason")
    if start.finished and start.folder is None:
        _log.warning(
            "%s is at step %d of epoch %d, where this run already ends: nothing to train. Raise "
            "max_epochs or max_steps.",
            start.path,
            run.state.global_step,
            run.state.epoch,
        )
    start.saved = {"loggers": start.marks}  # the tensors are copied: their memory is needed
    return str(start.path)
