"""Which checkpoints a fit writes, under which names, and which of them stay."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightkit import checkpoint
from lightkit.checkpoint.files import SUFFIX, point, prepare_folder
from lightkit.checkpoint.names import check_template, render
from lightkit.checkpoint.retention import Retention
from lightkit.errors import ConfigError, did_you_mean
from lightkit.hooks import Callback
from lightkit.limits import parse_duration

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


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

    Decisions are taken on every rank alike; files are written and removed on rank zero.

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
        save_last: Keep the newest file in any case, also as ``last.ckpt``.
        save_weights_only: Leave out what is only needed to continue the run.
        save_on_train_epoch_end: Accepted for ported code: every save comes after the validation
            and after the end of the epoch's hooks.
        restore_best: Put the best weights back into the task when the fit ends.
        verbose: Say a line for each file.
        auto_insert_metric_name: Write ``name=`` before each value in ``filename``.
        enable_version_counter: Accepted for ported code; there are no version counters.

    Attributes:
        best_model_path: The best file; without a monitor the newest. "" before the first.
        best_model_score: Its monitored value.
        best_k_models: The files kept as best, with their values.
        kth_best_model_path: The worst of these.
        last_model_path: ``last.ckpt``, once it exists.
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
    ) -> None:
        self._given_dirpath = None if dirpath is None else str(dirpath)
        self.dirpath = self._given_dirpath
        self.filename = None if filename is None else str(filename).removesuffix(SUFFIX)
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        intervals = (every_n_epochs, every_n_train_steps, train_time_interval)
        self._no_interval = all(interval is None for interval in intervals)
        self.every_n_epochs = 1 if self._no_interval else every_n_epochs or 0
        self.every_n_train_steps = every_n_train_steps or 0
        self.train_time_interval = parse_duration(train_time_interval, "train_time_interval")
        self._within_epochs = bool(every_n_train_steps or train_time_interval)
        self.save_last, self.save_weights_only = bool(save_last), save_weights_only
        self.restore_best, self.verbose = restore_best, verbose
        self.auto_insert_metric_name = auto_insert_metric_name
        self._optional = False
        _check(self)
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
        self._told_misaligned = False
        self._best_name = "best"
        self._saved_at = 0.0
        self._saved_step = -1

    @classmethod
    def default(cls) -> ModelCheckpoint:
        """Returns what a Trainer adds by itself: the newest file and the one of least ``val_loss``.

        If no validation logs ``val_loss``, only the newest.
        """
        callback = cls(monitor="val_loss")
        callback._optional = True
        return callback

    @property
    def state_key(self) -> str:
        """Names the settings, so that several of this class have a state each."""
        if self._optional:
            return "ModelCheckpoint"
        settings = {
            "dirpath": self._given_dirpath,
            "filename": self.filename,
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_epochs": self.every_n_epochs,
            "every_n_train_steps": self.every_n_train_steps,
            "train_time_interval": self.train_time_interval,
            "save_weights_only": self.save_weights_only,
        }
        return f"ModelCheckpoint{settings}"

    @property
    def best_model_path(self) -> str:
        """The best file; the newest where nothing is monitored. "" before the first."""
        unjudged = self._files.newest if self._optional else ""
        return self._files.best_path or unjudged

    @property
    def best_model_score(self) -> Tensor | None:
        """The monitored value of the best file."""
        return self._files.best_score

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The files kept as best, with their values."""
        return dict(self._files.best)

    @property
    def kth_best_model_path(self) -> str:
        """The worst of the files kept as best; "" if there is none."""
        return self._files.worst_path

    @property
    def last_model_path(self) -> str:
        """The second name of the newest file, once there is one; without it the newest file."""
        if not self._files.newest or self.dirpath is None or not self.save_last:
            return self._files.newest
        return str(Path(self.dirpath) / f"last{SUFFIX}")

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Leaves what is known of the files to be read until the next fit."""
        self._loaded_dirpath = None

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds the folder and checks that it can be written, before anything is trained.

        Files of an earlier fit are forgotten, unless a checkpoint that was loaded knows them.
        """
        if self._loaded_dirpath is None:
            self._reset()
        if trainer.run_dir is None or not (self.save_last or self.save_top_k):
            return  # a run that leaves nothing behind
        folder = self._folder(trainer)
        self._find_siblings(trainer)
        if self._loaded_dirpath is not None:
            self._files.adopt(folder, same=self._loaded_dirpath == str(folder))
        self.dirpath = str(folder)
        self._validations = trainer.state.validations
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            prepare_folder(folder)
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
        if not self._active:
            return
        validated = trainer.state.validations != self._validations
        if not (validated or self._within_epochs or trainer.epoch_ended or trainer.run_ending):
            return  # most steps end here
        self._validations = trainer.state.validations
        if validated or trainer.epoch_ended:
            self._check_monitor(trainer, validated)
        if self._is_due(trainer, validated) or (trainer.run_ending and self.save_last):
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Restores the best weights on request; warns if nothing was ever saved."""
        if not self._active:
            return
        if not self._files.newest:
            why = "no step was made" if trainer.global_step == 0 else "none was due"
            _log.warning("No checkpoint was written: %s.", why)
        if not self.restore_best:
            return
        if not self.best_model_path or self.best_model_score is None:
            _log.warning("No best weights to restore: %s was never judged.", self.monitor)
            return
        checkpoint.load_weights(task, self.best_model_path)
        score = float(self.best_model_score)
        _log.info("best weights: %s=%.5g from %s", self.monitor, score, self.best_model_path)

    def state_dict(self) -> dict[str, Any]:
        """Returns which files there are and how good they are."""
        return {
            "dirpath": self.dirpath,
            "files": self._files.state_dict(),
            "current_score": self.current_score,
            "from_validation": self._from_validation,
            "fresh": self._fresh,
            "measured_at": self._measured_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back; the folder is compared when the fit starts."""
        self._reset()
        self._loaded_dirpath = state_dict["dirpath"]
        self._files.load_state_dict(state_dict["files"])
        self.current_score = state_dict["current_score"]
        self._from_validation = state_dict["from_validation"]
        self._fresh, self._measured_at = state_dict["fresh"], state_dict["measured_at"]

    def _check_monitor(self, trainer: Trainer, validated: bool) -> None:
        """Raises when the monitored name is not logged although it should be by now."""
        self._validated = self._validated or validated
        if trainer.epoch_ended and (
            self._validated or all(n == 0 for n in trainer.num_val_batches)
        ):
            self._names_known = True
        if self._monitor_found or self.monitor in trainer.callback_metrics:
            self._monitor_found = True
            return
        assert self.monitor is not None
        names = sorted(trainer.callback_metrics)
        near = did_you_mean(self.monitor, names)
        # Within the first epoch a metric of the training's epoch end may still come.
        if self._names_known or (self._validated and (near or "val" in self.monitor.lower())):
            raise ConfigError(
                f"ModelCheckpoint(monitor={self.monitor!r}): nothing of that name is logged.{near} "
                f"There are: {', '.join(names) or 'no metrics'}."
            )

    def _is_due(self, trainer: Trainer, validated: bool) -> bool:
        """Tells whether an interval ends at this save point."""
        if trainer.epoch_ended and self.every_n_epochs:
            if trainer.state.epoch % self.every_n_epochs == 0:
                return True
        elif self._no_interval and validated and self._from_validation:
            return True
        step = trainer.global_step
        if step == self._saved_step:  # a batch without a step
            return False
        if self.every_n_train_steps and step % self.every_n_train_steps == 0:
            return True
        interval = self.train_time_interval
        return interval is not None and time.monotonic() - self._saved_at >= interval

    def _save(self, trainer: Trainer) -> None:
        """Writes a file if it stays, then renews the second names and removes what was replaced."""
        score = self._score(trainer)
        enters = self._files.enters(score)
        if score is not None:
            self.current_score, self._fresh = score, False
        if not enters and not self.save_last:
            return
        path = self._path(trainer, enters)
        before = self._files
        # The file holds this very state, so the files are counted before it is written.
        self._files = before.accept(path, trainer.global_step, score, enters)
        try:
            trainer.save_checkpoint(path, weights_only=self.save_weights_only)
        except BaseException:
            self._files = before
            raise
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            self._point()
            self._collect_garbage()
        judged = "" if score is None else f" ({self.monitor}={float(score):.5g})"
        best = ", the best so far" if score is not None and self.best_model_path == path else ""
        _log.log(
            logging.INFO if self.verbose else logging.DEBUG, "saved %s%s%s", path, judged, best
        )

    def _score(self, trainer: Trainer) -> Tensor | None:
        """Returns the monitored value if it is new since a file was judged, else None."""
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        if value is None or (self._from_validation and not self._fresh):
            return None
        step = trainer.global_step
        if self._from_validation and self._measured_at != step and not self._told_misaligned:
            self._told_misaligned = True
            _log.warning(
                "ModelCheckpoint judges the weights of step %d by %s of step %d. Let its interval "
                "be a multiple of the steps between validations.",
                step,
                self.monitor,
                self._measured_at,
            )
        return value.detach().cpu().clone()  # host sync, at a save only

    def _path(self, trainer: Trainer, enters: bool) -> str:
        """Returns where the file of this save point goes."""
        assert self.dirpath is not None
        plain = f"step_{trainer.global_step:06d}"
        name = plain
        if self.filename is not None and enters:
            values: dict[str, float] = dict.fromkeys(trainer.callback_metrics, math.nan)
            values["epoch"] = trainer.state.epoch + (0 if trainer.epoch_ended else 1)
            values["step"] = trainer.global_step
            fields = check_template(self.filename)
            for field in fields:
                if field in trainer.callback_metrics:
                    values[field] = float(trainer.callback_metrics[field])  # host sync, likewise
            # Before the first validation some metrics are not there yet, and nothing is wrong.
            if self._names_known or values.keys() >= set(fields):
                name = render(self.filename, values, self.auto_insert_metric_name)
        path = str(Path(self.dirpath) / (name + SUFFIX))
        if self.save_top_k not in (0, 1):
            at = self._files.written.get(path, trainer.global_step)
            if at != trainer.global_step:  # a file that stays is never replaced by another's name
                path = str(Path(self.dirpath) / f"{name}-{plain}{SUFFIX}")
        return path

    def _point(self) -> None:
        """Renews the second names of the newest and of the best file."""
        assert self.dirpath is not None
        folder, files = Path(self.dirpath), self._files
        if self.save_last:
            point(folder / f"last{SUFFIX}", Path(files.newest))
        if files.best_path in files.best:
            point(folder / f"{self._best_name}{SUFFIX}", Path(files.best_path))

    def _collect_garbage(self) -> None:
        """Removes files that were replaced, except where another ModelCheckpoint keeps them."""
        kept = {path for other in self._siblings for path in other._files.written}
        failed = []
        for path in self._files.garbage:
            try:
                if path not in kept:
                    Path(path).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s could not be removed: %s", path, error.strerror)
                failed.append(path)  # tried again at the next save
        self._files.garbage = failed

    def _folder(self, trainer: Trainer) -> Path:
        """Returns the folder for the files of this run."""
        assert trainer.run_dir is not None
        folder = Path(self._given_dirpath or trainer.run_dir / "checkpoints")
        return folder.expanduser().absolute()

    def _find_siblings(self, trainer: Trainer) -> None:
        """Finds the others of this class that write to the same folder, and settles who is who."""
        folder = self._folder(trainer)
        all_here = [
            other
            for other in trainer.callbacks
            if isinstance(other, ModelCheckpoint) and other._folder(trainer) == folder
        ]
        self._siblings = [other for other in all_here if other is not self]
        for other in self._siblings:
            if other.save_weights_only != self.save_weights_only or (
                self.filename is not None and other.filename == self.filename
            ):
                raise ConfigError(
                    f"Two ModelCheckpoints would replace each other's files in {folder}. Give one "
                    f"of them a dirpath of its own (or, if both save everything, another filename)."
                )
        monitors = [other.monitor for other in all_here if other.monitor is not None]
        if self.monitor is not None and len(set(monitors)) < len(monitors):
            raise ConfigError(
                f"Two ModelCheckpoints monitor {self.monitor!r} in {folder}, but there is one "
                f"best{SUFFIX}. Give one of them a dirpath of its own."
            )
        first = self.monitor is None or self.monitor == monitors[0]
        self._best_name = "best" if first else f"best_{self.monitor}".replace("/", "_")


def _check(given: ModelCheckpoint) -> None:
    """Raises `ConfigError` for arguments that are out of range or contradict each other."""
    if given.mode not in ("min", "max"):
        raise ConfigError(
            f"mode={given.mode!r}; allowed are 'min' and 'max'."
            f"{did_you_mean(str(given.mode), ('min', 'max'))}"
        )
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
    if k == 0 and not given.save_last and not given._no_interval:
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
