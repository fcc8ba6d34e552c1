"""The rehearsal: a few batches of a fit, its first validation and its first save, on a copy.

A run that fails late fails for something that could have been tried in a second: a validation step, a
checkpoint that cannot be written, a monitored name that nobody logs. So a copy of the task goes
through one short epoch before a fresh fit begins, by the same loop, with a trainer of its own that
has the same options. Nothing of it remains: weights, optimizers, metrics, loggers and callbacks are
copies or left out, and random states and what the data keep are put back.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightkit import calls, checkpoint, loops, outlook, rng, trials
from lightkit.checkpoint.disk import nbytes
from lightkit.data import move_to_device
from lightkit.differences import compare
from lightkit.errors import CheckpointError, some
from lightkit.hooks import Callback, of_user
from lightkit.limits import Cadence, Limits
from lightkit.loggers.base import Logger, NullExperiment
from lightkit.places import leaves_files
from lightkit.run import FitRun
from lightkit.signals import ended_by
from lightkit.trainer import Trainer

if TYPE_CHECKING:
    from lightkit.session import Session
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")
_clock = time.perf_counter

#: Groups of training batches and batches of each validation loader.
BATCHES = 2
#: Seconds after which it goes on with its next part; each has one batch at least.
SECONDS = 2.0
#: Bytes of a checkpoint above which none is written.
LARGEST = 500 * 10**6
#: Optimizer steps of a small model that take no longer than their rehearsal.
SHORT = 100
#: Of the parameters' bytes so many must be free on a card: the copy, gradients, optimizer, batch.
_TIMES = 5
#: What the task has done already, or what belongs to the end of a run.
_OFF = (
    *("prepare_data", "setup", "teardown", "configure_model"),
    *("on_train_end", "on_fit_end", "on_exception"),
)


@dataclass
class Rehearsed:
    """What a rehearsal did, and what it saw.

    Attributes:
        train: Training batches.
        val: Validation batches.
        seconds: What all of it took.
        step: Seconds of a training batch, with the update.
        validation: Seconds of a validation batch.
        size: Bytes of a checkpoint; 0 where none is to be written.
        written: Whether one was written.
        states: Bytes of the optimizers' states.
        peak: Bytes that were in use on the card at the most; None elsewhere.
    """

    train: int = 0
    val: int = 0
    seconds: float = 0.0
    step: float = 0.0
    validation: float = 0.0
    size: int = 0
    written: bool = False
    states: int = 0
    peak: int | None = None

    def __str__(self) -> str:
        batches = f"{self.train} batch{'es' if self.train > 1 else ''} of training"
        parts = [batches, *([f"{self.val} of validation"] if self.val else [])]
        if self.size:
            unsaved = "" if self.written else " (not written: too large to be tried)"
            parts.append(f"a checkpoint of {outlook.megabytes(self.size)}{unsaved}")
        return f"{', '.join(parts)}, {self.seconds:.1f} s"


def before(trainer: Trainer, run: FitRun, own: Mapping[str, int | None], steps: int | None) -> None:
    """Rehearses a fresh fit, where that is wanted, and leaves out its sanity check then.

    Args:
        trainer: The trainer.
        run: The fit that is about to begin.
        own: The limits of the call.
        steps: Its optimizer steps; None if unknown.
    """
    if not _wanted(trainer, run, steps):
        return
    found: Rehearsed | str
    asked, doubt = trainer.options.rehearse, ""
    missing = "" if asked or run.strategy.world_size == 1 else outlook.counted_on(trainer)
    if missing:  # after an error several processes cannot go on
        found = f"it would be without {missing}; Trainer(rehearse=True) rehearses all the same"
    else:
        try:
            found = rehearse(trainer, run, own)
        except Exception as error:
            found = doubt = outlook.doubt(error, trainer, run)
            if not doubt:
                raise
    told = isinstance(found, str)
    if trainer.is_global_zero:
        level = logging.WARNING if doubt or (told and asked) else logging.INFO
        _log.log(level, "%s: %s", "not rehearsed" if told else "rehearsed", found)
    if told:
        return
    hooks = (*run.hooks.on_sanity_check_start, *run.hooks.on_sanity_check_end)
    if trainer.options.num_sanity_val_steps is None and not any(map(of_user, hooks)):
        run.sanity_batches = 0


def _wanted(trainer: Trainer, run: FitRun, steps: int | None) -> bool:
    options = trainer.options
    if options.fast_dev_run or options.rehearse is not None:
        return bool(options.rehearse) and not options.fast_dev_run
    short = steps is not None and steps <= SHORT and calls.is_small(run.task)
    return not (short or options.overfit_batches)


def rehearse(
    trainer: Trainer, run: FitRun, own: Mapping[str, int | None], batches: int = BATCHES
) -> Rehearsed | str:
    """Rehearses a fit. Over ranks a collective.

    Args:
        trainer: The trainer.
        run: The fit that is about to begin.
        own: The limits of the call.
        batches: How many of each part at the most.

    Returns:
        What was seen; or why it cannot be rehearsed.

    Raises:
        Exception: What would have ended the fit later.
    """
    if run.strategy.sharded:
        return "the model is sharded, and there is no room for a second one"
    alone = run.strategy.world_size == 1
    watch = _Watch(_clock(), batches, alone)
    put_back, restore = trials.keep(run, *_given(trainer)), _keep_tensors(run.task)
    try:
        found = _rehearsed(trainer, run, own, watch)
    except Exception as error:
        if alone and on_card(run) and trials.is_out_of_memory(error):
            return "the memory of the card has no room for a copy of the task"
        outlook.explain(error, trainer, run)
        raise
    finally:
        put_back()
        restore()
        if on_card(run):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)
    if isinstance(found, Rehearsed):
        outlook.check_monitors(trainer, run, watch.logged, watch.sure)
        outlook.check_last_batch(run, watch.means)
        if found.size:
            outlook.check_disk(trainer, found.size)
        found.seconds = _clock() - watch.start
    return found


def _rehearsed(
    trainer: Trainer, run: FitRun, own: Mapping[str, int | None], watch: _Watch
) -> Rehearsed | str:
    """Does what `rehearse` says, but for putting back what the data keep."""
    session = trainer.session
    with rng.preserved(), trials.silent(), _folder(trainer, session) as folder:
        watch.needs_folder = leaves_files(trainer, session)
        twin = _twin(trainer, folder, watch)
        made = _obstacle(run) or _copy(trainer, run, twin)
        why = made if isinstance(made, str) else ""
        whys = run.strategy.ranks.gather(why, "whether the fit can be rehearsed")
        if isinstance(made, str) or any(whys):
            return max(whys)
        _play(twin, *made, own, watch)
    if (signal := twin.session.flow.signal) is not None:  # in a notebook, where a fit ends quietly
        session.flow.signal = signal
        raise ended_by(signal)
    watch.logged, watch.sure = set(twin.callback_metrics), not (twin.asked or twin.should_stop)
    return watch.seen


def on_card(run: FitRun) -> bool:
    """Tells whether a fit computes on a CUDA device."""
    return run.device.type == "cuda"


def _given(trainer: Trainer) -> tuple[Any, Any, Any]:
    """Returns the data of a fit: as they were given, or as a data module or the task made them."""
    session = trainer.session
    return session.given_train, session.given.get("validation"), session.datamodule


# --- the copy ------------------------------------------------------------------------------------


class _Understudy(Trainer):
    """The trainer of a rehearsal. Its loop ends early, but it tells the lengths of the real fit."""

    rehearsing = True
    stands_for: Trainer
    asked = False  # whether the task asked if this is the sanity check
    most = 0  # training batches

    @property
    def is_last_batch(self) -> bool:
        """Whether the epoch ends here, which is shorter than it says: what waits for that comes."""
        return super().is_last_batch or self.session.state.batch_idx + 1 == self.most

    @property
    def sanity_checking(self) -> bool:
        """Whether a validation runs: code that leaves it out of the sanity check does so here."""
        self.asked = self.asked or self.session.flow.validating
        return self.session.flow.validating

    @property
    def callbacks(self) -> list[Callback]:
        """Those of the real fit, to be looked at: here they listen to nothing."""
        return self.stands_for.callbacks


class _Silent(Logger):
    """Stands for a logger that writes elsewhere: takes every call and does nothing."""

    def __init__(self, one: Logger) -> None:
        super().__init__()
        self._one = one

    @property  # type: ignore[misc]
    def __class__(self) -> type[Logger]:  # type: ignore[override]
        return type(self._one)

    @property
    def experiment(self) -> Any:
        return NullExperiment()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        found = inspect.getattr_static(self._one, name, None)  # asks no property
        return (
            found if isinstance(found, (str, int, float, Path)) else getattr(NullExperiment(), name)
        )


def _twin(trainer: Trainer, folder: Path, watch: _Watch) -> _Understudy:
    """Returns the trainer of the rehearsal."""
    loggers: list[Logger] = []
    for one in trainer.loggers:
        first = not any(type(other) is type(one) for other in loggers)
        loggers.append(_Silent(one) if outlook.sends(one) or not first else type(one)())
    twin: _Understudy = trials.like(
        _Understudy,
        trainer,
        [watch],
        logger=loggers,
        default_root_dir=folder,
        strategy=trainer.strategy.fresh(),
        compile=False,
        prefetch=False,
        reload_dataloaders_every_n_epochs=0,
        log_every_n_steps=1,
    )
    twin.stands_for = trainer
    return twin


def _obstacle(run: FitRun) -> str:
    """Returns why a fit cannot be rehearsed, as far as it can be seen before."""
    if any(map(is_lazy, run.task.parameters())):
        return "layers of the task get their sizes from the first batch"
    if on_card(run):
        needed = _TIMES * nbytes([*run.task.parameters()])
        free = torch.cuda.mem_get_info(run.device)[0]
        if free < needed:
            return f"{outlook.megabytes(free)} are free on the card, less than {outlook.megabytes(needed)}"
    whys = (trials.gives_once(feed.loader) for feed in run.feeds())
    return next(filter(None, whys), "")


def _copy(
    trainer: Trainer, run: FitRun, twin: _Understudy
) -> tuple[TaskModule, tuple[Any, Any, Any]] | str:
    """Returns a copy of the task and its data; gives the twin the callbacks it needs.

    A text says why there is none.
    """
    train, val, datamodule = _given(trainer)
    loaders = [feed.loader for feed in run.feeds()]
    shared = [*loaders, *trials.bulk(run.task, loaders)]
    memo: dict[int, Any] = {id(one): one for one in shared} | {id(trainer): twin}
    # Those of the run, which nobody makes a second time.
    own: dict[str, Any] = {"train_dataloader": lambda: train, "val_dataloader": lambda: val}
    try:
        data = train, val, None
        if datamodule is not None:
            data = None, None, copy.copy(datamodule)
            memo[id(datamodule)] = data[2]
            vars(data[2]).update({**dict.fromkeys(_OFF, _nothing), **own})
        task = trials.copied(run.task, memo)
        twin._callbacks[:0] = copy.deepcopy(trials.changing(trainer._callbacks), memo)
    except Exception as error:  # noqa: BLE001  whatever an object raises when it is copied
        return f"{type(run.task).__name__} or its data cannot be copied: {error}"
    vars(task).update({**dict.fromkeys(_OFF, _nothing), **own})
    return task, data


def _keep_tensors(task: TaskModule) -> Callable[[], None]:
    """Returns what puts gradients and buffers back, where a function of the copy holds the task.

    A copy of ``lambda x: self.net(x)`` calls the network of the task itself.
    """
    gradients = [(p, p.grad) for p in task.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers() if not is_lazy(buffer)]

    def restore() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    return restore


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def _folder(trainer: Trainer, session: Session) -> Iterator[Path]:
    """Yields a folder on the disk where the run's will lie. Over ranks a collective."""
    ranks = session.strategy.ranks

    def make() -> str:
        chosen = next((d for logger in session.loggers if (d := logger.next_dir())), None)
        parent = outlook.existing(Path(chosen or trainer.default_root_dir))
        if leaves_files(trainer, session):
            with contextlib.suppress(OSError):  # which is said where the folder is made
                return tempfile.mkdtemp(prefix=".lightkit-rehearsal-", dir=parent)
        return tempfile.mkdtemp(prefix="lightkit-rehearsal-")

    folder = Path(ranks.decide(make, "the folder of the rehearsal"))
    try:
        yield folder
    finally:
        if ranks.is_zero:
            shutil.rmtree(folder, ignore_errors=True)


# --- the fit of the copy -------------------------------------------------------------------------


class _Watch(Callback):
    """Looks on: counts, takes times, and ends a part whose time is over."""

    order = 1000

    def __init__(self, start: float, batches: int, alone: bool) -> None:
        self.start, self.batches, self.alone = start, batches, alone
        self.needs_folder = False
        self.seen = Rehearsed()
        self.saved: Any = None
        #: The names that were logged, and whether the task did all that it will do.
        self.logged: set[str] = set()
        self.sure = True
        #: Names of batch norms, and over how many values for each channel they took their means.
        self.means: dict[str, int] = {}
        self._last, self._steps = start, list[float]()

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        self._last = _clock()
        for name, module in task.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(partial(self._measure, name))

    def _measure(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and inputs:
            self.means[name] = inputs[0].numel() // inputs[0].shape[1]

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.train += 1
        self._steps.append(self._took())
        self.seen.step = statistics.median(self._steps[1:] or self._steps)  # the first warms up
        run = trainer._run
        assert isinstance(run, FitRun)
        self._end_late(SECONDS / 2, run.feed.stream)

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        self._last = _clock()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.seen.val, self.seen.validation = self.seen.val + 1, self._took()
        run: Any = trainer._run
        self._end_late(SECONDS, run.validation.loaders[dataloader_idx].feed.stream)

    def on_save_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = dict(checkpoint)

    def _took(self) -> float:
        before, self._last = self._last, _clock()
        return self._last - before

    def _end_late(self, seconds: float, stream: Any) -> None:
        # Several ranks go on to the end, for their clocks differ.
        if self.alone and _clock() - self.start > seconds and not stream.ended:
            stream.close()


def _play(
    twin: _Understudy,
    task: TaskModule,
    data: tuple[Any, Any, Any],
    own: Mapping[str, int | None],
    watch: _Watch,
) -> None:
    """Trains the copy for a few batches, validates it and saves it."""
    savers = outlook.savers_of(twin.stands_for)
    with calls.open_fit(twin, task, data, None, **own) as run:
        run.limits, run.cadence = Limits(1, -1, 0, 0, None), Cadence("epoch", 1)
        twin.most = watch.batches * run.flow.accumulate
        run.train_limit = run.feed.at_most(twin.most, run.train_limit)
        for plan in () if run.validation is None else run.validation.loaders:
            plan.limit = plan.feed.at_most(watch.batches, plan.limit)
        for entry in run.plan.plateau_entries:
            entry.strict = False  # a missing monitor is told by `_check_monitors`
        if on_card(run):
            torch.cuda.reset_peak_memory_stats(run.device)
        loops.fit(run)
        watch.seen.states = nbytes([o.state_dict() for o in run.plan.optimizers])
        if on_card(run):
            watch.seen.peak = torch.cuda.max_memory_allocated(run.device)
        if savers:
            _try_save(twin, run, watch, all(saver.save_weights_only for saver in savers))


def _try_save(twin: _Understudy, run: FitRun, watch: _Watch, weights_only: bool) -> None:
    """Writes a checkpoint, reads it back and compares."""
    seen, ranks = watch.seen, run.strategy.ranks
    seen.size = nbytes(run.strategy.model_state(run.task)) + (0 if weights_only else seen.states)
    if seen.size > LARGEST:
        return
    path = twin.default_root_dir / "rehearsal.ckpt"
    twin.save_checkpoint(path, weights_only)

    def read() -> int:
        again = checkpoint.read_checkpoint(path)
        written = move_to_device(checkpoint.storable(watch.saved), torch.device("cpu"))
        there = {name: again[name] for name in written if name in again}
        lost = [name.removeprefix(".") for name, _ in compare(written, there, "", [])]
        if lost:
            raise CheckpointError(
                f"A checkpoint was written and read back, and holds something else: {some(lost)}. "
                f"Is the disk sound, and does on_save_checkpoint return the same each time?"
            )
        return path.stat().st_size

    seen.size, seen.written = ranks.decide(read, "the reading of a checkpoint"), True
    watch.saved = None  # memory of the card
