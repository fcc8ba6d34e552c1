"""Finds a learning rate and a batch size by short trials of an ordinary fit.

A trial is a fit by a Trainer with the same options, on a copy of the task. So weights, optimizers,
metrics, loggers and the trainer that was given are never touched; random states and what the loader
keeps are put back. Loggers, checkpoints, displays, validations and callbacks are left out, but for
callbacks that change what is trained: those with ``on_loss``, those that unfreeze, and
``GradientAccumulationScheduler``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightkit import opening, optim, rng, trials
from lightkit.data import DataModule
from lightkit.distributed import launched
from lightkit.errors import ConfigError, UsageError, one_of
from lightkit.history import finished, pyplot_for
from lightkit.hooks import Callback
from lightkit.run import FitRun
from lightkit.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")


# --- the learning rate ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RateSweep:
    """What `lr_find` returns.

    Attributes:
        rates: The learning rate of each optimizer step, rising.
        losses: The loss of each; over several ranks the mean of theirs.
        smoothed: The same as an exponential mean over the steps before.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float:
        """Returns the rate at which the smoothed loss falls fastest, over the logarithm of rates.

        The rule of fastai's first learning rate finder, after Smith (2015), "Cyclical Learning
        Rates for Training Neural Networks". Look at `plot` too: it is a place to begin at.

        Args:
            skip_begin: Leave out so many steps at the start, where the mean is over few.
            skip_end: And so many at the end.

        Raises:
            ConfigError: One of them is not a whole number from 0 on.
            UsageError: Fewer than three steps are left, or the loss fell nowhere.
        """
        if any(type(skip) is not int or skip < 0 for skip in (skip_begin, skip_end)):
            raise ConfigError(
                f"suggestion: skip_begin={skip_begin!r}, skip_end={skip_end!r} is not possible: "
                f"both are whole numbers from 0 on."
            )
        losses = self.smoothed[skip_begin : len(self.smoothed) - skip_end]
        if len(losses) < 3:
            raise UsageError(
                f"lr_find took {len(self.rates)} steps before the loss exploded, too few to suggest "
                f"a rate. Begin lower (min_lr), take more steps, or skip fewer."
            )
        slopes = [(after - before) / 2 for before, after in zip(losses, losses[2:], strict=False)]
        slopes = [losses[1] - losses[0], *slopes, losses[-1] - losses[-2]]
        steepest = min(range(len(slopes)), key=slopes.__getitem__)
        if slopes[steepest] >= 0:
            raise UsageError(
                f"The loss fell at no rate between {self.rates[0]:.3g} and {self.rates[-1]:.3g}, so "
                f"none is suggested. Look at plot(), and try another range (min_lr, max_lr)."
            )
        return self.rates[skip_begin + steepest]

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws losses over rates, with a mark at the suggestion if there is one.

        Args:
            path: Save the picture there.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, axis = pyplot_for("RateSweep.plot").subplots(layout="constrained")
        axis.plot(self.rates, self.losses, color="lightgray", label="loss")
        axis.plot(self.rates, self.smoothed, label="smoothed")
        with contextlib.suppress(UsageError):
            rate = self.suggestion()
            loss = self.smoothed[self.rates.index(rate)]
            axis.plot([rate], [loss], "o", label=f"steepest: {rate:.3g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axis.legend()
        return finished(figure, path)


def lr_find(
    trainer: Trainer,
    task: TaskModule,
    loader: Any = None,
    *,
    datamodule: Any = None,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    stop_at: float | None = 4.0,
    smoothing: float = 0.98,
) -> RateSweep:
    """Trains a copy of the task while the learning rate rises from step to step.

    Every step takes a rate that is the same multiple of the one before. Of several groups of
    parameters the one with the highest rate has this rate, and the others keep their proportions to
    it. Schedules are left out. Afterwards everything is as it was: a fit gives the same bits as
    without this call. Over ranks a collective, and the result is the same on all of them.

    Args:
        trainer: The trainer of the later fit, whose options hold; it is not used itself.
        task: The task; not changed.
        loader: The training loader; a data module or one by ``datamodule`` works as in ``fit``.
        datamodule: An object with ``train_dataloader``, instead of a loader.
        min_lr: The first rate.
        max_lr: The last rate.
        steps: Optimizer steps; a short loader is gone through again.
        stop_at: End when the smoothed loss is more than so many times the lowest one, or is not
            finite; None for the latter alone.
        smoothing: What each smoothed loss keeps of the one before, from 0 to below 1.

    Raises:
        ConfigError: The range or another number is not possible.
        UsageError: The trainer is at work, the task cannot be copied or has no optimizer, the
            loader gives its batches only once, or the step returned no loss.
    """
    numbers = (min_lr, max_lr, smoothing, 4.0 if stop_at is None else stop_at)
    possible = type(steps) is int and all(isinstance(number, (int, float)) for number in numbers)
    possible = possible and 0 < min_lr < max_lr < math.inf and 0 <= smoothing < 1
    if not (possible and steps >= 3 and numbers[-1] > 1):
        raise ConfigError(
            f"lr_find: min_lr={min_lr!r}, max_lr={max_lr!r}, steps={steps!r}, stop_at={stop_at!r}, "
            f"smoothing={smoothing!r} is not possible: rates rise from above 0, in a whole number "
            f"of at least 3 steps, stop_at is above 1 or None, smoothing is from 0 to below 1."
        )
    grow = math.log(max_lr / min_lr) / (steps - 1)
    sweep = _Sweep([min_lr * math.exp(grow * step) for step in range(steps)], smoothing, stop_at)
    _log.info("lr_find: at most %d steps, lr %.3g -> %.3g", steps, min_lr, max_lr)
    _trial(trainer, task, loader, datamodule, sweep, steps)
    if not sweep.losses:
        raise UsageError(
            f"lr_find needs the loss of every step, and {type(task).__name__}.training_step returned "
            f"none that is finite. Return the loss, or a mapping with 'loss', in manual optimization "
            f"too; and begin lower (min_lr) where it was nan."
        )
    smoothed = list(_smoothed(sweep.losses, smoothing))
    return RateSweep(sweep.taken[: len(smoothed)], sweep.losses, smoothed)


def _smoothed(losses: list[float], kept: float) -> Iterator[float]:
    mean = 0.0
    for number, loss in enumerate(losses, start=1):
        mean = kept * mean + (1 - kept) * loss
        yield mean / (1 - kept**number)


class _Trial(Callback):
    """What a trial notes of its run, so that the loader can be put back."""

    def __init__(self) -> None:
        self.samples: int | None = None
        self.put_back: Callable[[], None] = lambda: None

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        run = trainer._run
        assert isinstance(run, FitRun)
        self.put_back = trials.keep(run)
        with contextlib.suppress(TypeError, AttributeError):  # no length: a stream
            self.samples = len(run.train_loader.dataset)


class _Sweep(_Trial):
    """Sets the rates, and notes the losses."""

    def __init__(self, rates: list[float], smoothing: float, stop_at: float | None) -> None:
        super().__init__()
        self.rates, self.smoothing, self.stop_at = rates, smoothing, stop_at
        self.taken: list[float] = []
        self.losses: list[float] = []
        self._step = 0
        self._group: list[float] = []
        self._shares: list[tuple[dict[str, Any], float]] = []

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        if not trainer.optimizers:
            raise UsageError(f"{type(task).__name__} has no optimizer, so it has no learning rate.")

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        if len(groups) > len(self._shares):  # also those that joined in between
            # A schedule that was made has set its first rate, which may be 0, and kept the given.
            given = [float(group.get("initial_lr", group["lr"])) for group in groups]
            highest = max(given) or 1.0
            self._shares = [(g, lr / highest) for g, lr in zip(groups, given, strict=True)]
        for group, share in self._shares:
            group["lr"] = self.rates[trainer.global_step] * share

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            self._group.append(float(loss))  # host sync: the next rate may be one too many
        if trainer.global_step == self._step:
            return  # within a group of batches
        self._step, losses, self._group = trainer.global_step, self._group, []
        if not losses:
            return
        mean = sum(losses) / len(losses)
        self.losses.append(mean)
        self.taken.append(self.rates[self._step - 1])
        means = list(_smoothed(self.losses, self.smoothing))
        exploded = self.stop_at is not None and means[-1] > self.stop_at * min(means)
        if exploded or not math.isfinite(mean):
            trainer.stop("the loss exploded")

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        every = trainer.strategy.ranks.exchange(self.losses, "losses of lr_find")  # a collective
        means = [sum(column) / len(column) for column in zip(*every, strict=True)]
        ends = [number for number, loss in enumerate(means) if not math.isfinite(loss)]
        self.losses = means[: ends[0]] if ends else means


# --- the batch size ------------------------------------------------------------------------------


def scale_batch_size(
    trainer: Trainer,
    task: TaskModule,
    loader: Any,
    *,
    mode: Literal["power", "binsearch"] = "power",
    start: int = 2,
    most: int | None = None,
    steps: int = 3,
) -> int:
    """Returns the largest batch size with which a few steps of training fit into memory.

    Nothing is changed by it: see `lr_find`. For one process; what is free on a device must be so
    later too.

    Args:
        trainer: The trainer of the later fit, whose options hold; it is not used itself.
        task: The task; not changed.
        loader: A function that returns a training loader of a batch size, such as ``lambda size:
            DataLoader(data, size, shuffle=True)``; or a data module with an attribute
            ``batch_size``, which is put back.
        mode: "power" doubles the size until memory ends; "binsearch" halves the gap from there on.
        start: The first size.
        most: The largest size that is tried; the number of samples if that is smaller, or with
            None. A data set without a length needs it.
        steps: Optimizer steps of each trial.

    Raises:
        ConfigError: For numbers or a mode that are not possible.
        UsageError: Not even ``start`` fits, there are several processes, ``loader`` is neither, or
            nothing says where to end.
    """
    one_of("scale_batch_size: mode", mode, ("power", "binsearch"))
    whole = all(type(number) is int for number in (start, steps, start if most is None else most))
    if not (whole and start >= 1 and steps >= 1 and (most is None or most >= start)):
        raise ConfigError(
            f"scale_batch_size: start={start!r}, most={most!r}, steps={steps!r} is not possible: "
            f"sizes and steps are whole numbers from 1 on, and most is not below start."
        )
    if launched().world_size > 1:
        raise UsageError("scale_batch_size works in one process: call it without torchrun.")
    fits = _Sizes(trainer, task, loader, steps)
    good, size, bad = 0, start, None
    while bad is None and size > good:
        if fits(size):
            limits = [number for number in (most, fits.samples) if number is not None]
            if not limits:  # a stream that ends would fit for ever
                raise UsageError("The data set has no length, so say where to end: give most=.")
            limit = max(size, min(limits))
            good, size = size, size * 2
            if size > limit:
                size = limit if mode == "binsearch" else good
        else:
            bad = size
    while mode == "binsearch" and bad is not None and bad - good > 1:
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    if good < 1:
        raise UsageError(f"Not even a batch size of {start} fits into memory. Lower start.")
    return good


class _Sizes:
    """Tells whether a batch size fits."""

    def __init__(self, trainer: Trainer, task: TaskModule, loader: Any, steps: int) -> None:
        self._given, self._loader, self._steps = (trainer, task), loader, steps
        self.samples: int | None = None
        self._by_attribute = hasattr(loader, "train_dataloader") and hasattr(loader, "batch_size")
        if not self._by_attribute and not (callable(loader) and not isinstance(loader, type)):
            raise UsageError(
                f"scale_batch_size: {type(loader).__name__} cannot be given another batch size. Give "
                f"a function such as lambda size: DataLoader(data, size, shuffle=True), or a data "
                f"module with an attribute batch_size that its train_dataloader uses."
            )

    def __call__(self, size: int) -> bool:
        trial = _Trial()
        try:
            with rng.preserved(), self._sized(size) as (loader, datamodule):
                _trial(*self._given, loader, datamodule, trial, self._steps)
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not trials.is_out_of_memory(error):
                raise
            fits = False
        gc.collect()  # what the traceback held
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        self.samples = trial.samples
        _log.info("batch size %d %s", size, "fits" if fits else "is too large")
        return fits

    @contextlib.contextmanager
    def _sized(self, size: int) -> Iterator[tuple[Any, Any]]:
        """Yields loader and data module of a batch size."""
        if not self._by_attribute:
            yield self._loader(size), None
            return
        before, self._loader.batch_size = self._loader.batch_size, size
        try:
            yield None, self._loader
        finally:
            self._loader.batch_size = before


# --- one trial -----------------------------------------------------------------------------------


def _trial(
    trainer: Trainer, task: TaskModule, loader: Any, datamodule: Any, own: _Trial, steps: int
) -> None:
    """Trains a copy of the task for some steps; all that could be drawn from is put back."""
    if not isinstance(trainer, Trainer):
        raise UsageError(
            f"First comes the trainer, then the task; got {type(trainer).__name__} first."
        )
    opening.check_task(task, {"configure_optimizers": "returns the optimizer"})
    if trainer.stage is not None:
        raise UsageError(
            f"The trainer is in the middle of {trainer.stage.value}. Look for a learning rate or a "
            f"batch size before fit."
        )
    if hasattr(type(loader), "__next__"):
        raise UsageError(
            f"The loader ({type(loader).__name__}) gives its batches only once, so those of a trial "
            f"would be missing afterwards. Give a DataLoader, or anything that begins anew."
        )
    try:
        twin = trials.copied(task, {})
    except Exception as error:
        raise UsageError(
            f"A trial trains a copy of the task, and {type(task).__name__} cannot be copied: {error}"
        ) from error
    _without_schedules(twin)
    loader, datamodule = opening.as_datamodule(loader, datamodule)
    before = datamodule.trainer if isinstance(datamodule, DataModule) else None
    callbacks = [*copy.deepcopy(trials.changing(trainer._callbacks)), own]
    changed: dict[str, Any] = {
        "max_epochs": steps,  # enough, and a number from which a task may make its schedules
        "max_steps": steps,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": 1,
    }
    changed |= dict.fromkeys(("min_epochs", "min_steps", "val_check_interval"))
    changed |= dict.fromkeys(("logger", "terminate_on_nan"), False)
    try:
        with rng.preserved(), trials.silent():
            trial = trials.like(Trainer, trainer, callbacks, **changed)
            trial.fit(twin, loader, datamodule=datamodule)
    finally:
        if isinstance(datamodule, DataModule):
            datamodule.trainer = before
        own.put_back()


def _without_schedules(task: TaskModule) -> None:
    """Takes the schedules from a copy of the task."""
    configured = task.configure_optimizers

    def configure_optimizers() -> Any:
        given = configured()
        optimizers, schedules = optim.read(given)
        if task.automatic_optimization:
            return optimizers or None
        for schedule, _, _ in schedules:  # the task itself moves them: they stay, and rest
            of = schedule["scheduler"] if isinstance(schedule, Mapping) else schedule
            of.step = lambda *_, **__: None
        return given

    vars(task)["configure_optimizers"] = configure_optimizers
