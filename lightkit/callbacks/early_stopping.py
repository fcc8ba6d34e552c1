"""Stops a fit when a metric no longer gets better."""

from __future__ import annotations

import difflib
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.checkpoint.weights import apply_weights
from lightkit.errors import ConfigError, LoggingError, one_of
from lightkit.hooks import Callback
from lightkit.schedules import no_such_metric

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class EarlyStopping(Callback):
    """Stops a fit when ``monitor`` has not become better for ``patience`` checks.

    A check follows every validation, if validation is what logs the monitor, else every training
    epoch. Which of the two is found out at the first validation: a metric that appears there
    belongs to it. On several ranks all decide alike, from reduced values.

    Args:
        monitor: The name of a logged metric.
        min_delta: A change counts as better only beyond this.
        patience: Checks without a better value before the stop.
        verbose: Tell every better value.
        mode: "min" or "max", what better means.
        strict: Whether a missing monitor is an error (else one warning). It is one at the first
            check that could have had it.
        check_finite: Stop when the monitor is nan or infinite.
        stopping_threshold: Stop as soon as the monitor is better than this.
        divergence_threshold: Stop as soon as it is worse than this.
        check_on_train_epoch_end: True checks after training epochs, False after validations,
            None finds out.
        restore_best: Keep the best weights (a copy in CPU memory, also in the state that
            checkpoints hold, so that a resumed run has them) and load them at the end of the fit.

    Attributes:
        best_score: The best value so far, a 0-dim CPU tensor.
        best_epoch: The epoch it is from, counted from 0.
        wait_count: Checks since then.
        stopped_epoch: The epoch in which it stopped the fit, counted from 0; 0 if it did not.

    Raises:
        ConfigError: For arguments that cannot be.
        LoggingError: During the fit, when the monitor is not logged; lists the names there are.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        restore_best: bool = False,
    ) -> None:
        one_of("EarlyStopping: mode", mode, ("min", "max"))
        if type(patience) is not int or patience < 0:
            raise ConfigError(
                f"EarlyStopping(patience={patience!r}): it is a number of checks, 0 or more."
            )
        if not isinstance(monitor, str) or not monitor:
            raise ConfigError(
                f"EarlyStopping(monitor={monitor!r}): it is the name of a metric, such as "
                f"'val_loss'."
            )
        if not isinstance(min_delta, (int, float)) or not min_delta >= 0:
            raise ConfigError(f"EarlyStopping(min_delta={min_delta!r}): it is 0 or more.")
        self.monitor = monitor
        self.min_delta = min_delta
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.restore_best = restore_best
        # Whether the monitor comes from validation; None until that is known.
        self._by_validation: bool | None = (
            None if check_on_train_epoch_end is None else not check_on_train_epoch_end
        )
        self._fitting = False
        self._reset()

    def _reset(self) -> None:
        self.best_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.best_epoch = 0
        self.wait_count = 0
        self.stopped_epoch = 0
        self._there_before = False
        self._validated = False
        self._warned = False
        self._best_weights: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """The class with its monitor, so that two of them keep two states."""
        return f"{type(self).__qualname__}({self.monitor!r}, {self.mode!r})"

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Begins anew with each fit; a checkpoint that is resumed is loaded after this."""
        self._fitting = stage == "fit"
        if self._fitting:
            self._reset()

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Remembers whether the monitor is there before validation."""
        self._there_before = self.monitor in trainer.callback_metrics

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Checks, if the monitor comes from validation; the sanity check shows how that is spelled."""
        if trainer.sanity_checking and self.strict:
            self._compare(trainer)
        if trainer.sanity_checking or not self._fitting:
            return
        self._validated = True
        there = self._is_there(trainer)
        if self._by_validation is None and there:
            self._by_validation = not self._there_before
        if there and self._by_validation:
            self._check(trainer, task)
        # In the middle of an epoch its end may be hours away, so a missing monitor is told now. At
        # its end on_train_epoch_end follows, which may still bring the metric.
        early = self._by_validation is None and _within_epoch(trainer)
        if not there and (self._by_validation or early):
            self._missing(trainer)

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Checks, if the monitor comes from training."""
        if self._by_validation:
            return
        if self._is_there(trainer):
            self._check(trainer, task)
        elif self._by_validation is False or self._validated or not trainer.num_val_batches:
            self._missing(trainer)

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Loads the best weights, if asked for."""
        if self.restore_best and self._best_weights is not None:
            apply_weights(task, self._best_weights, "the best weights")  # each rank its part
            _log.info("Restored the best weights: %s.", self._best())

    def _is_there(self, trainer: Trainer) -> bool:
        """Tells whether the monitor is logged; the same on all ranks."""
        assert trainer.session.metrics is not None
        trainer.session.metrics.check_shared(self.monitor)
        return self.monitor in trainer.callback_metrics

    def _compare(self, trainer: Trainer) -> None:
        """Raises for a name that is all but one that validation logs, before hours are trained."""
        assert trainer.session.metrics is not None
        rows = trainer.session.metrics.eval_results(len(trainer.num_val_batches))
        names = sorted({name for row in rows for name in row})
        near = difflib.get_close_matches(self.monitor, names, n=1, cutoff=0.8)
        forms = (self.monitor, self.monitor.removesuffix("_epoch"))
        if near and "val" in self.monitor and not set(forms) & set(names):
            raise LoggingError(no_such_metric("EarlyStopping", self.monitor, names))

    def _missing(self, trainer: Trainer) -> None:
        text = no_such_metric("EarlyStopping", self.monitor, trainer.callback_metrics)
        if self.strict:
            log = "Else log" if text.endswith("?") else "Log"
            text += f" {log} it with self.log({self.monitor!r}, ...)."
            if _within_epoch(trainer):
                text += (
                    " If it is logged at the end of a training epoch, set "
                    "check_on_train_epoch_end=True."
                )
            raise LoggingError(text)
        if not self._warned:
            self._warned = True
            _log.warning("%s Nothing is checked without it.", text)

    def _check(self, trainer: Trainer, task: TaskModule) -> None:
        # Host sync, once per check; after an epoch the value is reduced and on the CPU already.
        # Over ranks a collective, for what a hook has logged just now.
        assert trainer.session.metrics is not None
        value = float(trainer.session.metrics.reduced(self.monitor))  # type: ignore[arg-type]
        reason = self._judge(value, trainer, task)
        if reason:
            self.stopped_epoch = trainer.current_epoch
            trainer.stop(reason)

    def _judge(self, value: float, trainer: Trainer, task: TaskModule) -> str:
        """Counts this check and returns why to stop, or an empty text."""
        name = self.monitor
        if self.check_finite and not math.isfinite(value):
            return f"{name} is {value}"
        if self.stopping_threshold is not None and self._better(value, self.stopping_threshold):
            self._improved(value, trainer, task)
            return f"{name} is {value:.4g}, better than the threshold {self.stopping_threshold}"
        worst = self.divergence_threshold
        if worst is not None and self._better(worst, value):
            return f"{name} is {value:.4g}, worse than the threshold {worst}"
        best = float(self.best_score)
        margin = -self.min_delta if self.mode == "min" else self.min_delta
        if self._better(value, best + margin):
            self._improved(value, trainer, task)
            return ""
        self.wait_count += 1
        if self.wait_count < self.patience:
            return ""
        unit = "validation" if self._by_validation else "epoch"
        return (
            f"{name} has not improved by more than {self.min_delta} for {self.wait_count} "
            f"{unit}{'' if self.wait_count == 1 else 's'} (best {self._best()})"
        )

    def _better(self, a: float, b: float) -> bool:
        return a < b if self.mode == "min" else a > b

    def _improved(self, value: float, trainer: Trainer, task: TaskModule) -> None:
        if self.verbose:
            _log.info("%s improved: %.4g -> %.4g", self.monitor, float(self.best_score), value)
        self.best_score = torch.tensor(value)
        self.best_epoch = trainer.current_epoch
        self.wait_count = 0
        if self.restore_best:
            # Host sync: the weights are copied to the CPU.
            self._best_weights = {k: _copy(v) for k, v in task.state_dict().items()}

    def _best(self) -> str:
        return f"{float(self.best_score):.4g} at epoch {self.best_epoch + 1}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters, the best value and, with ``restore_best``, the best weights."""
        return {
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "by_validation": self._by_validation,
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; the arguments given now stay as they are."""
        self.best_score = state_dict["best_score"]
        self.best_epoch = state_dict["best_epoch"]
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        if self._by_validation is None:
            self._by_validation = state_dict["by_validation"]
        self._best_weights = state_dict["best_weights"]


def _within_epoch(trainer: Trainer) -> bool:
    total = trainer.num_training_batches
    return total is None or trainer.state.batch_idx < total


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
