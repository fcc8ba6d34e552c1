"""What a ModelCheckpoint asks before it saves, and what it does with files afterwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from lightkit.checkpoint.disk import point, prepare_folder, remove
from lightkit.checkpoint.files import SUFFIX
from lightkit.checkpoint.names import check_template, render
from lightkit.checkpoint.newest import orphans
from lightkit.errors import CheckpointError, ConfigError, NonFiniteError, did_you_mean, one_of

if TYPE_CHECKING:
    from lightkit.callbacks import ModelCheckpoint
    from lightkit.checkpoint.retention import Retention
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
#: Functions of the loop in which weights, counters and schedules are moved, one after the other.
_UPDATES = {"step_optimizer", "step_schedulers", "step_plateau"}
#: What the loop calls at the end of an epoch besides the hooks of it.
_NO_HOOKS = {"end_steps", "reduce", "due_after_epoch", "validate", "end_epoch"}


def check_settings(given: ModelCheckpoint) -> None:
    """Raises `ConfigError` for arguments that are out of range or contradict others."""
    one_of("ModelCheckpoint: mode", given.mode, ("min", "max"))
    one_of("ModelCheckpoint: on_error", given.on_error, ("raise", "warn"))
    for name, least in (("save_top_k", -1), ("every_n_epochs", 0), ("every_n_train_steps", 0)):
        value = getattr(given, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}={value!r}; it must be an integer, at least {least}.")
    k, fields = given.save_top_k, []
    if given.filename is not None:
        fields = check_template(given.filename)
    if given.monitor is None and k > 1:
        raise ConfigError(
            f"save_top_k={k} keeps the best {k} files, so it needs monitor=, the metric that tells "
            f"which are best. Without a monitor: 1 keeps the newest, -1 all, 0 none."
        )
    if given.restore_best and (given.monitor is None or k == 0):
        raise ConfigError(
            "restore_best=True needs monitor=, the metric that tells which is best, and a "
            "save_top_k other than 0."
        )
    if k == 0 and not given.save_last and given._has_interval:
        raise ConfigError(
            "save_top_k=0 and save_last=False save nothing, but an interval was given. Remove the "
            "interval, or let one of the two keep files."
        )
    if given.filename is not None and not fields and k not in (0, 1):
        raise ConfigError(
            f"filename={given.filename!r} is the same for every file, but save_top_k={k} keeps "
            f"several. Put {{epoch}} or {{step}} into it."
        )
    if given.filename == "last" and given.monitor is not None:
        raise ConfigError(
            f"filename='last': last{SUFFIX} is always the newest file, so the best one needs "
            f"another name."
        )


def best_name(one: ModelCheckpoint, others: Sequence[ModelCheckpoint], folder: Path) -> str:
    """Returns what the best file of ``one`` is called beside others that write to one folder.

    Raises:
        ConfigError: They would replace each other's files.
    """
    for other in others:
        if other.save_weights_only != one.save_weights_only or (
            one.filename is not None and other.filename == one.filename
        ):
            raise ConfigError(
                f"Two ModelCheckpoints would replace each other's files in {folder}. Give one "
                f"of them a dirpath of its own (or, if both save everything, another filename)."
            )
    monitors = [c.monitor for c in (one, *others) if c.monitor is not None]
    if one.monitor is not None and len(set(monitors)) < len(monitors):
        raise ConfigError(
            f"Two ModelCheckpoints monitor {one.monitor!r} in {folder}, but there is one "
            f"best{SUFFIX}. Give one of them a dirpath of its own."
        )
    return f"best_{one.monitor}".replace("/", "_")


def take_over(one: ModelCheckpoint, trainer: Trainer, folder: Path) -> tuple[Retention, str]:
    """Gets a folder ready for the files of a fit, and returns those that are in it already.

    Where the fit goes on in it, what the run was about to do when it was killed is done. On rank
    zero.

    Raises:
        CheckpointError: The folder cannot be made or written.
    """
    prepare_folder(folder)
    files, ledger = one._files, trainer.session.ledger
    if one._loaded_dirpath is None:
        return files, str(folder)
    same = one._loaded_dirpath == str(folder)
    # Without a ledger nothing is left to train, so that nothing is written or removed.
    own = ledger is None or ledger.record.id == one._loaded_run
    files.adopt(folder, same=same, own=own)
    if same and own and ledger is not None:
        newest = files.written.get(files.newest) == trainer.global_step
        last = one.save_last and newest  # else another one wrote the file that is resumed
        point_all(files, folder, one._best_name, last=last)
        files.garbage = collect_garbage(files, one._siblings)
        files.garbage += orphans(folder, one._loaded_run, trainer.global_step)
    return files, str(folder)


def check_written(one: ModelCheckpoint, trainer: Trainer) -> None:
    """Raises at the end of a fit that was asked to save and never could; on rank zero.

    Raises:
        CheckpointError: There is no file.
    """
    made = trainer.global_step > one._began
    if one._good_at is None and made and one._wanted:
        if one._reason or not one._files.newest:
            raise CheckpointError(
                f"The fit is over, but none of its checkpoints is in {one.dirpath}: "
                f"{one._reason or f'{one.monitor} was never a number to judge by.'}"
            )
    elif not one._files.newest:
        why = "none was due" if trainer.global_step else "no step was made"
        _log.warning("No checkpoint was written: %s.", why)


def leaves_a_state(exception: BaseException) -> bool:
    """Tells whether an exception left the state of the last completed step behind.

    Not if the numbers are bad, if saving itself failed, if the loop ended for a signal, or if it
    came out of an update, where some weights may have moved and others not.
    """
    if not isinstance(exception, Exception):
        return False
    if isinstance(exception, (NonFiniteError, CheckpointError)):
        return False
    for frame in _frames(exception):
        if _is_ours(frame, _UPDATES):
            return False
        if frame.f_code.co_name == "step" and isinstance(frame.f_locals.get("self"), Optimizer):
            return False  # manual optimization
    return True


def in_validation(exception: BaseException | None) -> bool:
    """Tells whether an exception came out of a validation within a fit."""
    return any(_is_ours(frame, {"validate"}) for frame in _frames(exception))


def at_an_end(exception: BaseException | None) -> bool:
    """Tells whether an exception came out of a hook of the end of a validation or of an epoch.

    Those before it have counted the validation or the epoch already.
    """
    frames = list(_frames(exception))
    for number, frame in enumerate(frames):
        if _is_ours(frame, {"_fire"}) and frame.f_locals["places"][0].endswith("end"):
            return True
        called = frames[number + 1 : number + 2]
        if _is_ours(frame, {"_close_epoch"}) and not any(_is_ours(f, _NO_HOOKS) for f in called):
            return True
    return False


def _frames(exception: BaseException | None) -> Iterator[FrameType]:
    """Yields the frames that an exception passed."""
    trace = None if exception is None else exception.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _is_ours(frame: FrameType, names: set[str]) -> bool:
    """Tells whether a frame is one of our functions of these names."""
    module = frame.f_globals.get("__name__", "")
    return frame.f_code.co_name in names and module.startswith("lightkit.")


def check_monitor(given: ModelCheckpoint, trainer: Trainer, validated: bool) -> None:
    """Raises when the monitored name is not logged although it should be by now.

    Args:
        given: The callback.
        trainer: The trainer.
        validated: Whether a validation has come to its end since the last time.
    """
    given._validated = given._validated or validated
    none_comes = all(n == 0 for n in trainer.num_val_batches)
    if trainer.epoch_ended and (given._validated or none_comes):
        given._names_known = True
    if given.monitor is None:
        return
    assert trainer.session.metrics is not None
    trainer.session.metrics.check_shared(given.monitor)
    if given._monitor_found or given.monitor in trainer.callback_metrics:
        given._monitor_found = True
        return
    names = sorted(trainer.callback_metrics)
    near = did_you_mean(given.monitor, names)
    # Within the first epoch a metric of the training's epoch end may still come.
    early = given._validated and (near or "val" in given.monitor.lower())
    if given._names_known or early:
        raise ConfigError(
            f"ModelCheckpoint(monitor={given.monitor!r}): nothing of that name is logged.{near} "
            f"There are: {', '.join(names) or 'no metrics'}."
        )


def new_score(given: ModelCheckpoint, trainer: Trainer) -> Tensor | None:
    """Returns the monitored value if it is new since a file was judged, else None.

    Over ranks a collective: what was logged since the last row is each one's own.
    """
    if given.monitor is None or (given._from_validation and not given._fresh):
        return None
    assert trainer.session.metrics is not None
    value = trainer.session.metrics.reduced(given.monitor)
    if value is None:
        return None
    step = trainer.global_step
    if given._from_validation and given._measured_at != step and not given._told_misaligned:
        given._told_misaligned = True
        _log.warning(
            "ModelCheckpoint judges the weights of step %d by %s of step %d. Let its interval "
            "be a multiple of the steps between validations.",
            step,
            given.monitor,
            given._measured_at,
        )
    return value.detach().cpu().clone()  # host sync, at a save only


def file_path(given: ModelCheckpoint, trainer: Trainer, enters: bool, score: Tensor | None) -> str:
    """Returns where the file of this save point goes.

    Args:
        given: The callback.
        trainer: The trainer.
        enters: Whether the file is one of the best.
        score: The monitored value, if there is a new one; it is that of all ranks.
    """
    assert given.dirpath is not None
    plain = f"step_{trainer.global_step:06d}"
    name = plain
    if given.filename is not None and enters:
        values: dict[str, float] = dict.fromkeys(trainer.callback_metrics, math.nan)
        values["epoch"] = trainer.state.epoch + (0 if trainer.epoch_ended else 1)
        values["step"] = trainer.global_step
        fields = check_template(given.filename)
        for field in fields:
            if field == given.monitor and score is not None:
                values[field] = float(score)
            elif field in trainer.callback_metrics:
                values[field] = float(trainer.callback_metrics[field])  # host sync, at a save only
        # Before the first validation some metrics are not there yet, and nothing is wrong.
        if given._names_known or values.keys() >= set(fields):
            name = render(given.filename, values, given.auto_insert_metric_name)
    path = str(Path(given.dirpath) / (name + SUFFIX))
    if given.save_top_k not in (0, 1):
        at = given._files.written.get(path, trainer.global_step)
        if at != trainer.global_step:  # a file that stays is never replaced by another's name
            path = str(Path(given.dirpath) / f"{name}-{plain}{SUFFIX}")
    return path


def point_all(files: Retention, folder: Path, best: str, *, last: bool) -> None:
    """Renews the second names of the newest and of the best file."""
    if last and files.newest:
        point(folder / f"last{SUFFIX}", Path(files.newest))
    if files.best_path in files.best:
        point(folder / f"{best}{SUFFIX}", Path(files.best_path))


def collect_garbage(files: Retention, others: Sequence[ModelCheckpoint]) -> list[str]:
    """Removes files that were replaced, except where another ModelCheckpoint keeps them.

    Returns:
        Those that could not be removed, to be tried again at the next save.
    """
    kept = {path for other in others for path in other._files.written}
    failed = []
    for path in files.garbage:
        try:
            if path not in kept:
                remove(Path(path))
        except OSError as error:
            _log.warning("%s could not be removed: %s", path, error.strerror)
            failed.append(path)
    return failed
