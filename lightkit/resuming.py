"""Where a fit begins: anew, or from which checkpoint, and in which folder it goes on."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkit import checkpoint, ledger
from lightkit.checkpoint.disk import same
from lightkit.checkpoint.files import peek
from lightkit.distributed import job_id
from lightkit.errors import CheckpointError, ConfigError, UsageError
from lightkit.places import find_checkpoint, newest_checkpoint, run_folders
from lightkit.state import TrainState

if TYPE_CHECKING:
    from lightkit.limits import Limits
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
        lock: The lock of the folder in which it goes on; on rank zero only.
    """

    path: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    record: ledger.Record = field(default_factory=ledger.Record)
    finished: bool = False
    lock: ledger.Lock | None = None

    def close(self) -> None:
        """Lets other processes into the folder again."""
        if self.lock is not None:
            self.lock.release()

    @property
    def marks(self) -> dict[str, Any]:
        """Where the loggers' files stood when the checkpoint was written."""
        marks: dict[str, Any] = self.saved.get("loggers", {})
        return marks


def find(trainer: Trainer, session: Session, given: str | Path | None) -> Start:
    """Returns what ``ckpt_path`` means, and locks the folder in which a run goes on.

    From the lock on nobody else writes there, so what is read stays true. Call its ``close``.
    Over ranks a collective: rank zero looks, decides and locks, and each rank reads the file.

    Args:
        trainer: The trainer.
        session: The fit that is about to be opened.
        given: None, "auto", "last", "best" or a path.

    Raises:
        CheckpointError: The file cannot be read.
        ConfigError: "auto" would continue a run of other settings.
        UsageError: There is no such checkpoint.
    """
    ranks = session.strategy.ranks
    if ranks.world_size == 1:
        return _find(trainer, session, given)
    own = Start()

    def decided() -> tuple[Any, ...]:
        nonlocal own
        own = _find(trainer, session, given)
        # The checkpoint itself is too much to be sent, and the lock holds in this process only.
        return own.path, own.saved if own.path is None else {}, own.folder, own.record, own.finished

    def read() -> dict[str, Any]:
        assert start.path is not None
        mmap = session.strategy.sharded  # each rank needs a part only
        return own.saved or checkpoint.read_checkpoint(start.path, lazy=True, mmap=mmap)

    try:
        path, saved, folder, record, finished = ranks.decide(decided, "where the fit begins")
        start = Start(path, saved, folder, record, finished, own.lock)
        if start.path is not None:
            start.saved = checkpoint.on_every_rank(ranks, read, "reading of the checkpoint")
    except BaseException:
        own.close()
        raise
    return start


def _find(trainer: Trainer, session: Session, given: str | Path | None) -> Start:
    """Returns how a fit begins; see `find`."""
    options = trainer.options
    record = ledger.Record(
        settings=ledger.settings_of(
            session.task,
            session.datamodule,
            options,
            drawn=trainer.seed_drawn,
            loader=session.given_train,
            processes=session.strategy.world_size,
        ),
        limits=ledger.limits_of(session.limits),
        job=job_id(),
        seed=options.seed,
    )
    if given is None or (given == "auto" and options.fast_dev_run):
        return Start(record=record)
    if given == "auto":
        return _automatic(trainer, session, record)
    path = find_checkpoint(trainer, session.task, given)
    start = Start(path, checkpoint.read_checkpoint(path, lazy=True), record=record)
    if "loop" in start.saved and not options.fast_dev_run:
        _choose_folder(start)
        complete = start.folder is None or start.record.status == "finished"
        start.finished = complete and _reached(session.limits, start.saved)
    return start


def _reached(limits: Limits, saved: dict[str, Any]) -> bool:
    """Tells whether the limits leave nothing to train after a checkpoint."""
    state = TrainState()
    state.load_state_dict(saved["loop"])
    return limits.reached(state)


def _choose_folder(start: Start) -> None:
    """Goes on in the folder of the checkpoint's run, if nothing that is there would be lost."""
    assert start.path is not None
    folder, header = _run_of(start.path, start.saved), start.saved["lightkit"]
    old = None if folder is None else ledger.read(folder)
    if folder is None or old is None:
        return
    newest, why = newest_checkpoint(folder, old), None
    if newest is None or not (
        same(newest, start.path) or peek(newest)["lightkit"]["global_step"] <= header["global_step"]
    ):
        why = "there are later checkpoints of it"
    elif changed := ledger.differences(old.settings, start.record.settings):
        why = f"settings changed ({'; '.join(changed)})"
        _log.warning(
            "What the checkpoint holds goes on: weights, and optimizers with their learning rates. "
            "To start from the weights alone: task.load_weights(%r), and fit without ckpt_path.",
            str(start.path),
        )
    elif not os.access(folder, os.W_OK):
        why = "its folder cannot be written"
    else:
        try:
            start.lock = ledger.Lock(folder)
        except UsageError:
            why = "another fit is at work on it"
    if why is not None:
        _log.info("%s stays as it is and a new run begins: %s", folder, why)
        return
    start.folder, start.record = folder, _continued(ledger.read(folder) or old, start.record)


def _continued(old: ledger.Record, now: ledger.Record) -> ledger.Record:
    """Returns the record of a run that goes on: itself, with what may have changed."""
    old.limits, old.job = now.limits, now.job
    return old


def _run_of(path: Path, saved: dict[str, Any]) -> Path | None:
    """Returns the run folder that a checkpoint belongs to, wherever the two were moved together."""
    header = saved["lightkit"]
    named = header.get("run")
    places = [*path.absolute().parents[:3], Path(header.get("folder") or "/")]
    for folder in places if named else ():
        record = ledger.read(folder)
        if record is not None and record.id == named:
            own = [place.resolve() for place in record.folders(folder)]
            return folder if path.resolve().parent in own else None  # else it is a copy
    return None


# --- ckpt_path="auto" ----------------------------------------------------------------------------


def _automatic(trainer: Trainer, session: Session, now: ledger.Record) -> Start:
    """Continues the newest run of this name, begins anew, or leaves a finished run alone."""
    if not trainer.options.enable_checkpointing:
        raise ConfigError(
            "ckpt_path='auto' continues from checkpoints, but enable_checkpointing=False writes "
            "none. Remove one of the two."
        )
    name = type(session.task).__name__
    for folder, record in candidates(run_folders(trainer, name), name, now.job):
        if record.status == "finished" and not ledger.raised(now.limits, record.limits):
            return _judge(session.limits, folder, record, now, None)
        try:
            lock = ledger.Lock(folder)
        except UsageError:
            _log.info("%s is passed over: another fit is at work on it", folder)
            continue
        try:  # what the record says by now: from here on nobody else writes
            start = _judge(session.limits, folder, ledger.read(folder) or record, now, lock)
        except BaseException:
            lock.release()
            raise
        if start.lock is None:
            lock.release()
        return start
    _log.info("ckpt_path='auto': there is no run to continue, so a new one begins")
    return Start(record=now)


def _judge(
    limits: Limits, folder: Path, old: ledger.Record, now: ledger.Record, lock: ledger.Lock | None
) -> Start:
    """Returns how a fit goes on with a run, or that there is nothing to go on with."""
    path, done = newest_checkpoint(folder, old), old.status == "finished"
    changed = ledger.differences(old.settings, now.settings)
    if path is None and not done:
        _log.info("%s ended before its first checkpoint, so it begins anew", folder)
        if changed:
            return Start(record=now)
        return Start(folder=folder, saved={"loggers": old.marks}, record=old, lock=lock)
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"ckpt_path='auto' would continue {folder}, but its settings were others:\n  {listed}\n"
            f"Put them back, or begin a new run without ckpt_path (task.load_weights({str(path)!r}) "
            f"starts it from these weights), or continue all the same with ckpt_path='last': then "
            f"optimizers and their learning rates go on as they are in the checkpoint."
        )
    if path is None:
        raise CheckpointError(
            f"ckpt_path='auto': {folder} is finished, but its checkpoints are gone. Begin a new "
            f"run without ckpt_path."
        )
    saved = checkpoint.read_checkpoint(path, lazy=True)
    if done and (not ledger.raised(now.limits, old.limits) or _reached(limits, saved)):
        _log.info(
            "%s is finished (%d epochs, %d steps): nothing is left to train. To train longer raise "
            "max_epochs or max_steps; to begin anew leave out ckpt_path.",
            folder,
            old.epoch,
            old.global_step,
        )
        return Start(path, saved, folder, old, finished=True)
    return Start(path, saved, folder, _continued(old, now), lock=lock)


def candidates(folders: list[Path], name: str, job: str) -> list[tuple[Path, ledger.Record]]:
    """Returns the runs that "auto" may mean: those of this job, newest first, then all others.

    Args:
        folders: Where to look.
        name: The class of the task.
        job: The job of a cluster that this process belongs to; "" for none.
    """
    runs = [(folder, record) for folder in folders if (record := ledger.read(folder)) is not None]
    runs = [run for run in runs if run[1].settings.get("task") in (None, name)]
    return sorted(runs, key=lambda run: (bool(job) and run[1].job == job, run[1].began))[::-1]


def earlier_seed(trainer: Trainer, name: str, given: str) -> int | None:
    """Returns the seed of the run that ``ckpt_path`` continues; None where it is not known.

    Data that is split or made at random must be the same again, so who draws a seed asks here.
    """
    if given in ("auto", "last", "best"):
        found = candidates(run_folders(trainer, name), name, job_id())
        return found[0][1].seed if found else None
    records = (ledger.read(folder) for folder in Path(given).absolute().parents[:3])
    return next((record.seed for record in records if record is not None), None)


# --- putting it back -----------------------------------------------------------------------------


def restore(trainer: Trainer, run: FitRun, start: Start) -> str | None:
    """Restores a run from the checkpoint of its start and returns its path, None where it is new."""
    if start.path is None:
        return None
    header = start.saved.get("lightkit", {})
    checkpoint.restore(run, start.saved)
    run.rng = checkpoint.random_states(start.saved, run.strategy.data_ranks[0])
    _change_ranks(run, start)
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
    exact = header.get("exact", True)
    return f"{start.path}{'' if exact else ', saved after an error: not bit for bit'}"


def _change_ranks(run: FitRun, start: Start) -> None:
    """Keeps the batches of an optimizer step where another number of ranks goes on, and tells."""
    before, now = checkpoint.saved_ranks(start.saved), run.strategy.data_ranks[1]
    if before == now:
        return
    was, own = start.saved.get("flow", {}).get("batches_per_step"), run.flow.accumulate
    told = ""
    if was is not None and was != now * own:
        if start.folder is not None and run.automatic and was % now == 0:
            run.flow.accumulate = was // now
            told = (
                f"; accumulate_grad_batches is {was // now} now, so that a step has {was} as before"
            )
        else:
            told = f"; a step has {now * own} batches now and had {was}: mind the learning rate"
    _log.info(
        "saved by %d %s, goes on with %d: the order of the data is the same, dropout and whatever "
        "else a step draws cannot be%s",
        before,
        "process" if before == 1 else "processes",
        now,
        told,
    )
