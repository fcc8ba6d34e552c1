"""Which checkpoints a fit writes, under which names, and which of them stay."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightkit import checkpoint
from lightkit.checkpoint.files import SUFFIX
from lightkit.checkpoint.retention import Retention
from lightkit.checkpoint.savers import (
    best_name,
    check_monitor,
    check_settings,
    check_written,
    collect_garbage,
    file_path,
    leaves_a_state,
    new_score,
    point_all,
    take_over,
)
from lightkit.distributed import Ranks
from lightkit.errors import CheckpointError
from lightkit.flow import Flow
from lightkit.hooks import Callback
from lightkit.limits import parse_duration
from lightkit.state import TrainState

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
#: How often a Trainer saves by itself within an epoch.
_DEFAULT_INTERVAL = timedelta(minutes=5)
#: What tells several in one run apart, besides the folder.
_SETTINGS = (
    *("filename", "monitor", "mode", "every_n_epochs", "every_n_train_steps"),
    *("train_time_interval", "save_weights_only"),
)


class ModelCheckpoint(Callback):
    """Writes checkpoints while a fit runs.

    A save falls where everything about a step is known: after the validation that is due at it, so
    the monitored value is never an old one. Without any interval given, that is the end of every
    epoch and, with a monitor, every validation within an epoch. The end of the run is always saved
    unless ``save_last=False``.

    The files are called ``step_000123.ckpt`` (the number of optimizer steps) or as ``filename``
    says. ``last.ckpt`` is a second name of the newest one, ``best.ckpt`` of the best one: hard
    links, which cost no space. A file is removed only when the next one is complete, and only if
    this object wrote it. Names never get a ``-v1``; a file of the same name is replaced whole.

    A Trainer has one of these by itself, see `default`: it saves at the end of every epoch, after
    every validation and every 5 minutes, so there always is a ``last`` that is no older.

    A file that cannot be written is tried once more after a second; those of before stay intact. A
    fit that was asked to save and could not even once ends with an error.

    Every rank comes to every save, and rank zero decides, writes and removes for all.

    Args:
        dirpath: The folder. Default: ``checkpoints`` in the folder of the run.
        filename: A template of ``{epoch}`` (counted from 1, as it is shown), ``{step}`` and names
            of metrics: ``"{epoch}-{val_loss:.2f}"`` makes ``epoch=3-val_loss=0.12.ckpt``. With a
            monitor it names the files kept as best; others are called by their step.
        monitor: The metric that tells which is best. A name that is not logged is an error at the
            first validation, or at the end of the first epoch for a metric of the training.
        mode: "min" where lower is better, "max" where higher is.
        save_top_k: So many best files stay (1); -1 keeps all, 0 none. Without a monitor 1 keeps
            the newest.
        every_n_epochs: Save at the end of every so many-th epoch; 0 never.
        every_n_train_steps: Save after every so many optimizer steps; 0 never. With a monitor of
            the validation let it be a multiple of the steps between validations: a file is judged
            only once by a value.
        train_time_interval: Save at the first step after so much time: a timedelta or "30 min".
        save_last: Keep the newest file in any case, also as ``last.ckpt``. When a signal ends the
            run, the newest state is saved also without it.
        save_weights_only: Leave out what is only needed to continue the run.
        save_on_train_epoch_end: Accepted for ported code: every save comes after the validation
            and after the end of the epoch's hooks.
        restore_best: Put the best weights back into the task when the fit ends.
        verbose: Say a line for each file.
        auto_insert_metric_name: Write ``name=`` before each value in ``filename``.
        enable_version_counter: Accepted for ported code; there are no version counters.
        async_save: True copies the state into memory kept for it (as many bytes as a file has) and
            writes the file in the background: training waits for the copy only. None writes the
            file at once and waits for the disk in the background (with one process; with several
            it is as False). ``last`` and ``best`` move once the file is complete. False waits for
            the disk too, as the last save of a run always does.
        on_error: "raise" ends the fit with the error of a file that could not be written; "warn"
            says it and trains on.
        save_on_exception: Save the last completed step when your code raises (if ``save_last``, or
            without a monitor; with one process). Such a file says ``"exact": False``: what the failed step had begun
            stays in it (random states, running statistics, logged values), so a run that goes on
            from it is sound, but not bit by bit the one that would have been. Nothing is saved
            where the error came out of the update; in manual optimization, optimizers that stepped
            before it have stepped.

    Attributes:
        current_score: The value that was judged last.
        dirpath: The folder, known from the start of the fit.

    Raises:
        ConfigError: Arguments that contradict each other or are out of range.
    """

    order = 100

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | str | None = None,
        save_last: bool = True,
        save_weights_only: bool = False,
        save_on_train_epoch_end: bool | None = None,
        restore_best: bool = False,
        verbose: bool = False,
        auto_insert_metric_name: bool = True,
        enable_version_counter: bool = True,
        async_save: bool | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        save_on_exception: bool = True,
    ) -> None:
        self._given_dirpath = None if dirpath is None else str(dirpath)
        self.dirpath = self._given_dirpath
        self.filename = None if filename is None else str(filename).removesuffix(SUFFIX)
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        intervals = (every_n_epochs, every_n_train_steps, train_time_interval)
        self._has_interval = any(interval is not None for interval in intervals)
        self._at_validations = not self._has_interval
        self.every_n_epochs = every_n_epochs or 0 if self._has_interval else 1
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = parse_duration(train_time_interval, "train_time_interval")
        self.save_last, self.save_weights_only = bool(save_last), save_weights_only
        self.restore_best, self.verbose, self.async_save = restore_best, verbose, async_save
        self.auto_insert_metric_name = auto_insert_metric_name
        self.on_error, self.save_on_exception = on_error, save_on_exception
        self._optional, self._loaded_run = False, ""
        check_settings(self)
        self._reset()

    def _reset(self) -> None:
        """Sets what belongs to one fit."""
        self._files = Retention(
            self.mode, self.save_top_k, self.monitor is not None, self.save_last
        )
        self.current_score: Tensor | None = None
        self.dirpath = self._given_dirpath
        self._active = False  # whether this fit keeps checkpoints
        self._loaded_dirpath: str | None = None
        self._siblings: list[ModelCheckpoint] = []
        self._validations = 0  # rounds seen
        self._before_validation: Tensor | None = None
        self._from_validation = False  # whether the validation makes the monitored value
        self._fresh = False  # whether it made one since the last time a file was judged
        self._measured_at = 0  # the step at which it did
        self._monitor_found = self.monitor is None or self._optional
        self._validated = False  # whether there was a validation in this fit
        self._names_known = False  # whether all metrics were logged once in this fit
        self._told_misaligned, self._best_name = False, "best"
        self._flow, self._state, self._ranks = Flow(), TrainState(), Ranks()
        self._began = 0  # the step at which this fit began
        self._due_step = -1  # at which a save was last due
        self._saved_step = -1
        self._good_at: float | None = None  # when a file of this fit was last complete
        self._due_at = math.inf
        self._wanted = False  # whether a save was due
        self._undo: Retention | None = None  # the files as they were, until a new one is complete
        self._error: Exception | None = None  # of a file written in the background
        self._reason = ""  # why the last file could not be written

    @classmethod
    def default(cls) -> ModelCheckpoint:
        """Returns what a Trainer adds by itself: the newest file and the one of least ``val_loss``.

        Saved at the end of every epoch, after every validation, and within an epoch every 5
        minutes. If no validation logs ``val_loss``, only the newest stays.
        """
        callback = cls(monitor="val_loss", every_n_epochs=1, train_time_interval=_DEFAULT_INTERVAL)
        callback._optional = callback._at_validations = True
        return callback

    @property
    def state_key(self) -> str:
        """Names the settings, so that several of this class have a state each."""
        if self._optional:
            return "ModelCheckpoint"
        settings = {"dirpath": self._given_dirpath}
        settings |= {name: getattr(self, name) for name in _SETTINGS}
        return f"ModelCheckpoint{settings}"

    @property
    def best_model_path(self) -> str:
        """The best file; the newest where nothing is monitored. "" before the first."""
        unjudged = self._complete_files.newest if self._optional else ""
        return self._complete_files.best_path or unjudged

    @property
    def best_model_score(self) -> Tensor | None:
        """The monitored value of the best file."""
        return self._complete_files.best_score

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The files kept as best, with their values."""
        return dict(self._complete_files.best)

    @property
    def kth_best_model_path(self) -> str:
        """The worst of the files kept as best; "" if there is none."""
        return self._complete_files.worst_path

    @property
    def last_model_path(self) -> str:
        """The second name of the newest file, once there is one; without it the newest file."""
        newest = self._complete_files.newest
        if not newest or self.dirpath is None or not self.save_last:
            return newest
        return str(Path(self.dirpath) / f"last{SUFFIX}")

    @property
    def _complete_files(self) -> Retention:
        """The files as they are on the disk, also while the next one is being written."""
        if not self.async_save:
            checkpoint.settle()  # all but there
        return self._undo or self._files

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Leaves what is known of the files to be read until the next fit."""
        self._loaded_dirpath, self._loaded_run, self._active = None, "", False

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds the folder and checks that it can be written, before anything is trained.

        Files of an earlier fit are forgotten, unless a checkpoint that was loaded knows them.
        """
        if self._loaded_dirpath is None:
            self._reset()
        if trainer.run_dir is None or not (self.save_last or self.save_top_k):
            return  # a run that leaves nothing behind
        folder, self._ranks = self._folder(trainer), trainer.session.strategy.ranks
        self._find_siblings(trainer, folder)
        take = partial(take_over, self, trainer, folder)
        self._files, self.dirpath = self._ranks.decide(take, "the folder for checkpoints")
        self._flow, self._state = trainer.session.flow, trainer.state
        self._validations = self._state.validations
        self._began = self._saved_step = trainer.global_step
        self._set_clock()
        self._active = True

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Notes the monitored value, to see whether the validation makes a new one."""
        if self.monitor is not None:
            self._before_validation = trainer.callback_metrics.get(self.monitor)

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Learns whether the monitored value comes from the validation."""
        if self.monitor is None or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None and value is not self._before_validation:
            self._from_validation = self._fresh = True
            self._measured_at = trainer.global_step

    def on_save_point(self, trainer: Trainer, task: TaskModule) -> None:
        """Saves, if a save is due here."""
        state, flow, every = self._state, self._flow, self.every_n_train_steps
        if not self._active or not (
            flow.epoch_ended
            or flow.ending
            or (every and state.global_step % every == 0)
            or flow.clock() >= self._due_at
            or state.validations != self._validations
            or self._error is not None
        ):
            return  # most steps end here
        self._surface()
        validated = state.validations != self._validations
        self._validations = state.validations
        if validated or flow.epoch_ended:
            check_monitor(self, trainer, validated)
        last = self.save_last or trainer.interrupted is not None
        due = self._is_due(trainer, validated)
        if due or (flow.ending and last):
            if due and not state.pending_validation:  # else it is due again after that
                self._due_step = state.global_step
            self._wanted = True
            with flow.times.checkpoint:
                self._save(trainer)

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Saves the last completed step, where that can be done and was not done yet."""
        checkpoint.settle()
        try:
            self._surface()
        except Exception as error:  # noqa: BLE001  # the exception under way stays the one seen
            _log.warning("%s", error)
        if self._ranks.world_size > 1:
            return  # the others are elsewhere: whoever waited for them now would wait for ever
        wanted = self.save_on_exception and (self.save_last or self.monitor is None)
        step = trainer.global_step
        saved = (self._began, *(saver._saved_step for saver in (self, *self._siblings)))
        if step in saved or not (self._active and wanted and leaves_a_state(exception)):
            return
        try:
            self._save(trainer, exact=False)
            _log.info("saved step %d, the last before the error: %s", step, self._files.newest)
        except Exception as error:  # noqa: BLE001  # likewise
            _log.warning("Step %d, the last before the error, was not saved: %s", step, error)

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Restores the best weights on request; complains if nothing was ever saved."""
        if not self._active:
            return
        self._files = self._ranks.decide(lambda: self._end(trainer), "the end of saving")
        self._undo, self._active = None, False
        if not self.restore_best:
            return
        path, score = self.best_model_path, self.best_model_score
        if not path or score is None:
            _log.warning("No best weights to restore: %s was never judged.", self.monitor)
            return
        read = partial(checkpoint.load_weights, task, path)
        checkpoint.on_every_rank(self._ranks, read, "reading of the best weights")
        _log.info("best weights: %s=%.5g from %s", self.monitor, float(score), path)

    def on_load_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learns of which run the files are that the state will name."""
        self._loaded_run = checkpoint["lightkit"].get("run", "")

    def state_dict(self) -> dict[str, Any]:
        """Returns which files there are and how good they are."""
        return {
            "dirpath": self.dirpath,
            "files": self._files.state_dict(),
            "current_score": self.current_score,
            "from_validation": self._from_validation,
            "fresh": self._fresh,
            "measured_at": self._measured_at,
            "due_step": self._due_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back; the folder is compared when the fit starts."""
        self._reset()
        self._loaded_dirpath = state_dict["dirpath"]
        self._files.load_state_dict(state_dict["files"])
        self.current_score = state_dict["current_score"]
        self._from_validation = state_dict["from_validation"]
        self._fresh, self._measured_at = state_dict["fresh"], state_dict["measured_at"]
        self._due_step = state_dict.get("due_step", -1)  # not in the oldest files

    def _is_due(self, trainer: Trainer, validated: bool) -> bool:
        """Tells whether an interval ends at this save point."""
        if trainer.epoch_ended and self.every_n_epochs:
            if trainer.state.epoch % self.every_n_epochs == 0:
                return True
        elif self._at_validations and validated and self._from_validation:
            return True
        step = trainer.global_step
        if step == self._due_step:  # a batch without a step
            return False
        if self.every_n_train_steps and step % self.every_n_train_steps == 0:
            return True
        return self._flow.clock() >= self._due_at

    def _set_clock(self) -> None:
        """Lets the interval of time begin anew."""
        if self.train_time_interval is not None:
            self._due_at = self._flow.clock() + self.train_time_interval

    def _save(self, trainer: Trainer, *, exact: bool = True) -> None:
        """Writes a file if it stays, then renews the second names and removes what was replaced."""
        score = new_score(self, trainer) if exact else None
        # Only rank zero knows what became of the file before.
        chosen = self._ranks.decide(lambda: self._choose(trainer, score), "a checkpoint's file")
        self._files, self._undo, enters, path = chosen[0], None, *chosen[1:]
        if score is not None:
            self.current_score, self._fresh = score, False
        last = self.save_last or trainer.interrupted is not None
        if not enters and not last:
            return
        self._set_clock()  # also if it fails: not again at every step
        step = trainer.global_step
        behind: bool | Literal["disk"] = bool(self.async_save)
        if self.async_save is None and self._ranks.world_size == 1:
            behind = "disk"
        self._undo = self._files
        # The file holds this very state, so the files are counted before it is written.
        now = dataclasses.replace(self._files, keep_newest=last)
        self._files = now.accept(path, step, score, enters)
        self._saved_step = step
        try:
            trainer.save_checkpoint(
                path,
                self.save_weights_only,
                background=behind if exact and not self._flow.ending else False,
                then=lambda: self._complete(trainer, path, score),
                failed=self._note,
                exact=exact,
            )
        except BaseException as error:
            if not exact or not isinstance(error, CheckpointError):
                self._take_back()
                raise
            self._note(error)
        found = self._ranks.decide(self._outcome, "a checkpoint's end")
        if not trainer.is_global_zero:
            self._error, (self._files, self._undo) = None, found

    def _choose(self, trainer: Trainer, score: Tensor | None) -> tuple[Retention, bool, str]:
        """Returns the files that there are, whether one of this score is among the best, its path."""
        checkpoint.settle()  # until then the files are in the hands of the writer
        self._surface()
        enters = self._files.enters(score)
        return self._files, enters, file_path(self, trainer, enters, score)

    def _outcome(self) -> tuple[Retention, Retention | None]:
        """Returns the files after a save, and those of before while it is under way."""
        self._surface()
        return self._files, self._undo

    def _end(self, trainer: Trainer) -> Retention:
        """Waits for the last file and returns those that there are; complains if there is none."""
        checkpoint.settle()
        self._surface()
        self._active = False
        check_written(self, trainer)
        return self._files

    def _complete(self, trainer: Trainer, path: str, score: Tensor | None) -> None:
        """Goes on when a file is complete; in the background this is another thread."""
        self._undo, self._good_at = None, time.monotonic()
        assert self.dirpath is not None
        point_all(self._files, Path(self.dirpath), self._best_name, last=self.save_last)
        self._files.garbage = collect_garbage(self._files, self._siblings)
        told = "" if score is None else f" ({self.monitor}={float(score):.5g})"
        told += ", the best so far" if score is not None and self.best_model_path == path else ""
        level = logging.INFO if self.verbose else logging.DEBUG
        _log.log(level, "saved %s%s", path, told)

    def _note(self, error: Exception) -> None:
        """Remembers why a file could not be written, and forgets the file."""
        self._take_back()
        self._error, self._reason = error, str(error)

    def _take_back(self) -> None:
        """Forgets a file that did not become complete."""
        if self._undo is not None:
            self._files, self._undo, self._saved_step = self._undo, None, -1

    def _surface(self) -> None:
        """Raises or tells what went wrong with the last file."""
        error, self._error = self._error, None
        if error is None:
            return
        if self.on_error == "raise" or not isinstance(error, CheckpointError):
            raise error
        good = "there is none of this fit yet"
        if self._good_at is not None:
            age = (time.monotonic() - self._good_at) / 60
            good = f"the last good one is {self._files.newest}, {age:.1f} min old"
        _log.warning("Training goes on without a checkpoint (%s): %s", good, error)

    def _folder(self, trainer: Trainer) -> Path:
        """Returns the folder for the files of this run."""
        assert trainer.run_dir is not None
        folder = Path(self._given_dirpath or trainer.run_dir / "checkpoints")
        return folder.expanduser().absolute()

    def _find_siblings(self, trainer: Trainer, folder: Path) -> None:
        """Finds the others of this class that write to the same folder, and settles who is who."""
        all_here = [c for c in trainer.checkpoint_callbacks if c._folder(trainer) == folder]
        self._siblings = [other for other in all_here if other is not self]
        name = best_name(self, self._siblings, folder)
        first = next((c for c in all_here if c.monitor is not None), self)
        self._best_name = "best" if first is self or self.monitor is None else name
