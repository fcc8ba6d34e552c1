"""What a run uses and how fast it is, as curves: memory, processor, samples per second."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightkit.data import batch_size_of
from lightkit.errors import ConfigError
from lightkit.hooks import Callback
from lightkit.run import FitRun

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer


class _Monitor(Callback):
    """Writes rows of numbers of its own, every ``log_every_n_steps`` steps, on rank zero."""

    # After the metrics, which wait for the device where they read it: until then it is busy.
    order = 45

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins the first window."""
        self._written = trainer.global_step
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a row, where the metrics write theirs."""
        step = trainer.global_step
        # With accumulation several batches end at one step.
        if step == self._written or step % trainer.log_every_n_steps:
            return
        row = self._row(trainer)
        self._written = step
        self._begin(trainer)
        if row and trainer.is_global_zero and not trainer.fast_dev_run:
            for logger in trainer.loggers:
                logger.log_metrics(row, step=step)

    def _begin(self, trainer: Trainer) -> None:
        """Begins a window."""

    def _row(self, trainer: Trainer) -> dict[str, float]:
        """Returns the numbers of the window that ends."""
        raise NotImplementedError


class DeviceStatsMonitor(_Monitor):
    """Writes what the run takes from its device and from the machine, beside each row.

    On CUDA: ``device/memory_allocated``, ``device/memory_peak`` (of the fit so far) and
    ``device/memory_reserved`` in bytes, ``device/memory_retries`` (how often memory had to be
    given back first), and ``device/utilization`` in percent where ``pynvml`` is installed. On every
    device, with ``cpu_stats``: ``cpu/memory``, the bytes that this process holds (where the system
    tells), and ``cpu/percent``, its processor time per second (100 is one core, workers not
    counted). All are numbers of the host, so nothing waits for the device. Those of rank zero.

    Args:
        cpu_stats: Whether to write the numbers of the process; None: where there is no CUDA.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self.cpu_stats = cpu_stats
        self._began = (0.0, 0.0)
        self._can_ask = True

    def _begin(self, trainer: Trainer) -> None:
        self._began = _clocks()

    def _row(self, trainer: Trainer) -> dict[str, float]:
        device, row = trainer.session.device, {}
        if device.type == "cuda":
            stats = torch.cuda.memory_stats(device)
            row["device/memory_allocated"] = float(stats.get("allocated_bytes.all.current", 0))
            row["device/memory_peak"] = float(stats.get("allocated_bytes.all.peak", 0))
            row["device/memory_reserved"] = float(stats.get("reserved_bytes.all.current", 0))
            row["device/memory_retries"] = float(stats.get("num_alloc_retries", 0))
            if self._can_ask:
                try:
                    row["device/utilization"] = float(torch.cuda.utilization(device))
                except Exception:  # noqa: BLE001  # whatever the driver's library raises
                    self._can_ask = False
        if self.cpu_stats or (self.cpu_stats is None and device.type != "cuda"):
            wall, used = (now - then for now, then in zip(_clocks(), self._began, strict=True))
            row["cpu/percent"] = 100 * used / wall if wall else 0.0
            with contextlib.suppress(OSError):  # only Linux has the file
                pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
                row["cpu/memory"] = float(pages) * mmap.PAGESIZE
        return row


class ThroughputMonitor(_Monitor):
    """Writes how fast the training is, beside each row, over the steps since the last one.

    ``throughput/samples_per_second``, ``.../batches_per_second``, ``.../steps_per_second``, and
    ``throughput/data_wait``, the share of the time spent waiting for the training loader. The time
    of validations and checkpoints is left out. Samples are those of all ranks, taken as equal. With
    a device that works behind the host the window ends when its values are read.

    Args:
        batch_size_fn: Returns the samples in a batch; None: as the loader says, else the size of
            the first dimension.
        length_fn: Returns how many items (tokens, pixels) are in a batch, for
            ``throughput/items_per_second``. A plain number: what it reads from a device waits.
        flops_per_batch: Floating-point operations of a training batch on this rank.
        available_flops: Those that the device can do in a second at most. With both,
            ``throughput/mfu`` is written, the share of them that is used.

    Raises:
        ConfigError: For one of the last two without the other.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        *,
        flops_per_batch: float | None = None,
        available_flops: float | None = None,
    ) -> None:
        if (flops_per_batch is None) != (available_flops is None):
            raise ConfigError(
                "ThroughputMonitor: flops_per_batch and available_flops are needed together."
            )
        self.batch_size_fn, self.length_fn = batch_size_fn, length_fn
        self.flops_per_batch, self.available_flops = flops_per_batch, available_flops
        self._clear()

    def _clear(self) -> None:
        self._samples = self._items = self._batches = self._step = 0
        self._began = self._elsewhere = self._waited = self._wait_before = 0.0

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Goes on where the time of waiting begins at zero."""
        self._wait_before = 0.0

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Keeps what was waited in the epoch."""
        self._waited += trainer.data_wait - self._wait_before
        self._wait_before = trainer.data_wait

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, then writes a row where one is due."""
        run = trainer._run
        assert isinstance(run, FitRun)
        self._batches += 1
        if self.batch_size_fn is not None:
            self._samples += self.batch_size_fn(batch)
        else:
            size = None if run.counts is None else run.counts.of(batch_idx)
            self._samples += batch_size_of(batch) or 0 if size is None else size
        if self.length_fn is not None:
            self._items += self.length_fn(batch)
        super().on_train_batch_end(trainer, task, outputs, batch, batch_idx)

    def _begin(self, trainer: Trainer) -> None:
        self._clear()
        self._step, self._wait_before = trainer.global_step, trainer.data_wait
        self._began, self._elsewhere = time.perf_counter(), _elsewhere(trainer)

    def _row(self, trainer: Trainer) -> dict[str, float]:
        seconds = time.perf_counter() - self._began - (_elsewhere(trainer) - self._elsewhere)
        if seconds <= 0:
            return {}
        world = trainer.session.strategy.data_ranks[1]
        waited = self._waited + trainer.data_wait - self._wait_before
        row = {
            "samples_per_second": self._samples * world / seconds,
            "batches_per_second": self._batches / seconds,
            "steps_per_second": (trainer.global_step - self._step) / seconds,
            "data_wait": min(1.0, waited / seconds),  # told after the step that was waited for
        }
        if self.length_fn is not None:
            row["items_per_second"] = self._items * world / seconds
        if self.flops_per_batch is not None and self.available_flops is not None:
            row["mfu"] = self._batches * self.flops_per_batch / seconds / self.available_flops
        return {f"throughput/{name}": value for name, value in row.items()}


def _clocks() -> tuple[float, float]:
    """Returns the seconds of the world and those of this process."""
    return time.perf_counter(), time.process_time()


def _elsewhere(trainer: Trainer) -> float:
    """Returns the seconds of the fit that went into validations and checkpoints."""
    times = trainer.session.flow.times
    return times.validation.seconds + times.checkpoint.seconds
