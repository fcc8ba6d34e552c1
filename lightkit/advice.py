"""Hints: what is slow in a run, in one sentence with number, cause and fix, each once in a run."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lightkit import screen
from lightkit.callbacks import ModelCheckpoint
from lightkit.hints import say
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightkit.run import FitRun
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_clock = time.perf_counter
#: The orders that a `TensorLoader` knows.
_ORDERS = (SequentialSampler, RandomSampler)
#: What a cause must have cost by the end of an epoch: seconds, and its share of all epochs so far.
_LEAST = 1.0
_SHARES = {"data": 0.1, "validation": 0.5, "checkpoint": 0.1, "callbacks": 0.1}


def at_start(run: FitRun) -> Iterator[tuple[str, str]]:
    """Yields names and texts of what can be told before the first batch."""
    loader = run.train_loader
    if isinstance(loader, DataLoader) and loader.num_workers and _only_tensors(loader):
        text = (
            f"the training data are in memory, and num_workers={loader.num_workers} sends each "
            f"batch from one process to another; try num_workers=0 or lightkit.TensorLoader"
        )
        yield "workers-for-memory", text


class Advice(Callback):
    """Looks at the times of a fit at the end of each epoch and of each validation, and at saves.

    After the checkpoints in the order of listeners, so that the last epoch's is counted.
    """

    order: ClassVar[int] = 110

    def __init__(self) -> None:
        self._run: FitRun | None = None  # None: another rank speaks
        self._said: set[str] = set()
        self._batches = self._validations = 0  # where the fit began
        self._first = 0.0  # seconds spent waiting for the first batch of each epoch

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Notes where the fit begins."""
        self._run = trainer._run if trainer.is_global_zero else None  # type: ignore[assignment]
        self._batches, self._validations = _batches(trainer), trainer.state.validations

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Looks at the epochs that are complete, with what followed them."""
        self._look(trainer)
        loader = None if self._run is None else self._run.train_loader
        workers = isinstance(loader, DataLoader) and loader.num_workers
        if workers and not loader.persistent_workers and "data" not in self._said:  # type: ignore[union-attr]
            self._await_first()

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Looks in the middle of an epoch, which may be long."""
        self._look(trainer, validating=1)

    def on_save_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks where an epoch without a validation is long: there is a save every few minutes."""
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Looks at all epochs."""
        self._look(trainer)
        self._end(trainer)

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Ends the epoch, whose times are read afterwards."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        flow = trainer.session.flow
        flow.times.end(_clock(), flow.data_wait)
        self._run = None

    def _await_first(self) -> None:
        """Notes what the first batch of the epoch was waited for, by a listener for it alone."""
        assert self._run is not None
        run = self._run
        hooks: Any = run.hooks

        def first(batch: Any, batch_idx: int) -> None:
            now = hooks.on_train_batch_start
            hooks.on_train_batch_start = tuple(hook for hook in now if hook is not first)
            assert run.feed.stream is not None
            self._first += run.feed.stream.wait

        hooks.on_train_batch_start = (*hooks.on_train_batch_start, first)

    def _look(self, trainer: Trainer, *, validating: int = 0) -> None:
        """Says what has cost too much by now, in which one validation may not be counted yet."""
        run, flow = self._run, trainer.session.flow
        if run is None or len(self._said) == len(_SHARES):
            return
        seconds = flow.times.all_epochs(_clock(), flow.data_wait)
        total = sum(seconds.values())
        for kind, least in _SHARES.items():
            spent = seconds[kind]
            if kind in self._said or spent < _LEAST or spent <= least * total:
                continue
            self._said.add(kind)
            share = f"{100 * spent / total:.0f} % of the time"
            if kind == "data":
                batches = _batches(trainer) - self._batches
                world = run.strategy.ranks.env.local_world_size
                text = about_data(
                    run.train_loader, spent, batches, seconds["step"], self._first, cores(world)
                )
                say(trainer, "slow-data", f"{share} was spent waiting for data: {text}")
            elif kind == "validation":
                count = trainer.state.validations + validating - self._validations
                text = _validation(run, spent, count)
                say(trainer, "slow-validation", f"{share} went into validation: {text}")
            elif kind == "checkpoint":
                say(trainer, "slow-checkpoints", f"{share} was spent saving: {_saving(run, spent)}")
            else:
                say(trainer, "slow-callbacks", f"{share} was spent in callbacks: {_callbacks(run)}")


def about_data(
    loader: Any, waited: float, batches: int, step: float, first: float, cores: int
) -> str:
    """Returns why a fit waits for data, and what to try.

    Args:
        loader: The training loader.
        waited: Seconds of waiting.
        batches: Batches in that time.
        step: Seconds of steps in that time, in which workers could load.
        first: Seconds of ``waited`` for the first batches of epochs.
        cores: Cores of the machine for this process and its workers.
    """
    each = f"{screen.brief(waited / max(batches, 1))} per batch"
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        if kind == "TensorLoader":
            return f"{each}; try a larger batch, or keep the tensors on the device (device=)"
        return f"{kind} takes {each}; a torch DataLoader with num_workers loads beside the step"
    workers = loader.num_workers
    if _only_tensors(loader):
        how = "sample by sample" if not workers else f"through {workers} worker processes"
        return f"the data are in memory and come {how}, {each}; try lightkit.TensorLoader"
    if workers and not loader.persistent_workers and first > waited / 2:
        return (
            f"{screen.brief(first)} of it for the first batch of an epoch, when "
            f"num_workers={workers} start; try persistent_workers=True"
        )
    spare = cores - 1
    enough = max(2, math.ceil(waited / max(step, 1e-3 * waited)) + 1 + workers)
    if workers < spare:
        more = min(enough, spare)
        return f"num_workers={workers} and {each}; try num_workers={more}{_parts(loader)}"
    with_cores = f"{cores} core{'s' if cores > 1 else ''}"
    return (
        f"num_workers={workers} and {each}, with {with_cores} for this process; make a sample "
        f"cheaper: decode and resize beforehand, augment on the device (on_after_batch_transfer)"
    )


def _only_tensors(loader: DataLoader[Any]) -> bool:
    """Tells whether a loader does nothing but cut tensors, so that a `TensorLoader` can do it."""
    plain = loader.collate_fn is default_collate and type(loader.batch_sampler) is BatchSampler
    return plain and type(loader.sampler) in _ORDERS and in_memory(loader.dataset)


def _parts(loader: Any) -> str:
    """Returns what more workers need of the data set, so that no sample comes several times."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return ", where each reads a part of its own (torch.utils.data.get_worker_info)"
    return ""


def in_memory(dataset: Any) -> bool:
    """Tells whether a dataset is tensors and nothing else."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        return all(in_memory(part) for part in dataset.datasets)
    return isinstance(dataset, (Tensor, TensorDataset))


def cores(processes: int) -> int:
    """Returns the cores for each of so many processes of this machine, 1 at least."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        allowed = os.cpu_count() or 1
    return max(1, allowed // processes)


def _batches(trainer: Trainer) -> int:
    """Returns the training batches of the run so far."""
    return trainer.state.batches_before + trainer.state.batch_idx


def _validation(run: FitRun, spent: float, count: int) -> str:
    assert run.validation is not None
    waited = sum(plan.waited for plan in run.validation.loaders)
    rarer = "val_check_interval"
    if run.cadence.unit == "epoch":
        rarer = f"check_val_every_n_epoch={2 * run.cadence.every}"
    text = f"{count} of {screen.brief(spent / max(count, 1))} each"
    if waited > spent / 2:
        loader = run.validation.loaders[0].loader
        workers = getattr(loader, "num_workers", None)
        loads = "its loader" if workers is None else f"its loader with num_workers={workers}"
        more = f"try more workers there{_parts(loader)}"
        return f"{text}, most of it waiting for {loads}; {more}, or {rarer}"
    return f"{text}; try {rarer} or limit_val_batches"


def _saving(run: FitRun, spent: float) -> str:
    savers = [c for c in run.callbacks if isinstance(c, ModelCheckpoint)]
    count = run.flow.times.checkpoint.calls
    rarer = "save less often (every_n_epochs=, every_n_train_steps=)"
    if savers and not all(saver.async_save for saver in savers):
        rarer = f"try ModelCheckpoint(async_save=True), or {rarer}"
    times = "time" if count == 1 else "times"
    return f"{count} {times}, {screen.brief(spent / max(count, 1))} each; {rarer}"


def _callbacks(run: FitRun) -> str:
    found = [part for part in run.flow.times.parts if part.kind == "callbacks"]
    slowest = max(found, key=lambda part: part.seconds)
    each = screen.brief(slowest.seconds / max(slowest.calls, 1))
    waits = (
        "" if run.device.type == "cpu" else ", and read no tensor there: it waits for the device"
    )
    return f"most in {slowest.name}, {slowest.calls} calls of {each}; do it less often{waits}"
