"""A trace of some steps: what the host and the device do, each operator on a line of time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightkit.errors import ConfigError, UsageError
from lightkit.hooks import Callback
from lightkit.instruments import instrument

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class TraceProfiler(Callback):
    """Records some optimizer steps of a fit with ``torch.profiler``, and writes the trace.

    The file is ``profile/rank0_steps_10-14.pt.trace.json.gz`` in the folder of the run, to be opened
    at https://ui.perfetto.dev or ``chrome://tracing``; beside it lies ``..._operators.txt`` with the
    operators that took longest. Loading, transfer, the user's steps, backward, the optimizer,
    validations, saves and all hooks are labelled. CUDA is recorded where the run is on it.

    Steps outside are as without it. Recorded ones are slower by what recording costs, so compare
    shares, and take times from ``profiler="simple"``.

    Args:
        steps: The first step to record and the one before which to stop, counted from 0 where the
            fit begins, also where it goes on from a checkpoint.
        warmup: Steps before these for which the profiler runs already and drops what it sees; at
            least 1 is needed for true times.
        all_ranks: Whether each rank writes a trace; else rank zero alone.
        record_shapes: Whether the operators' input shapes are recorded.
        profile_memory: Whether allocations are recorded.
        with_stack: Whether the lines of Python behind the operators are recorded; slow.

    Raises:
        ConfigError: For steps that are no such pair.
        UsageError: At the start of a fit while another profiler of torch records.
    """

    order: ClassVar[int] = 120  # a step ends when all others have listened
    measured: ClassVar[bool] = False
    needs_folder: ClassVar[bool] = True

    def __init__(
        self,
        steps: tuple[int, int] = (10, 15),
        *,
        warmup: int = 2,
        all_ranks: bool = False,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        if not _is_range(steps):
            raise ConfigError(
                f"TraceProfiler(steps={steps!r}): allowed is a pair (first, stop) of step numbers "
                f"from 0 on, such as (10, 15), which records the steps 10 to 14."
            )
        if not isinstance(warmup, int) or warmup < 0:
            raise ConfigError(f"TraceProfiler(warmup={warmup!r}): allowed is a number from 0 on.")
        self.steps, self.warmup, self.all_ranks = tuple(steps), warmup, all_ranks
        self._how: dict[str, Any] = {
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
        }
        self._file: Path | None = None  # where the trace goes; None: nothing to do any more
        self._begun = 0  # global_step where the fit began
        self._seen = 0  # steps of the fit
        self._profiler: Any = None  # while it waits or runs
        self._undo: Callable[[], None] | None = None  # while there are labels

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Says that there will be no trace, where nothing but evaluations is asked for."""
        if stage != "fit" and not self._seen and trainer.is_global_zero:
            _log.warning(
                "No trace is written: TraceProfiler records fits, and this is a %s.", stage
            )

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds out where the trace goes; begins where the first steps are wanted."""
        self._file, self._begun, self._seen = None, trainer.global_step, 0
        if not (trainer.is_global_zero or self.all_ranks):
            return
        if trainer.run_dir is None:
            _log.warning("No trace is written: this fit has no folder.")
            return
        # torch would drop what that one has seen, without a word
        if getattr(torch.autograd, "_profiler_enabled", bool)():
            raise UsageError(
                "A profiler of torch records around this fit, and there can be one only. Leave out "
                "profiler='trace' or TraceProfiler, or that other one."
            )
        first, stop = self.steps
        name = f"rank{trainer.global_rank}_steps_{first}-{stop - 1}.pt.trace.json.gz"
        self._file = trainer.run_dir / "profile" / name
        self._profiler = self._make(trainer)
        self._profiler.start()
        self._label(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the steps."""
        done = trainer.global_step - self._begun
        while self._profiler is not None and self._seen < done:
            self._seen += 1
            self._profiler.step()  # which begins to record, and ends
            self._label(trainer)
            if self._seen == self.steps[1]:
                self._write(trainer)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Writes what there is where the fit ends before the last step of the trace."""
        if self._profiler is None:
            return
        if self._seen > self.steps[0]:
            self._write(trainer)
        else:
            self._stop(trainer)
            _log.warning(
                "No trace was written: the fit had %d steps, and TraceProfiler(steps=(%d, %d)) "
                "begins after them.",
                self._seen,
                *self.steps,
            )

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Ends what an exception has left open."""
        if self._profiler is not None:
            self._stop(trainer)

    def _make(self, trainer: Trainer) -> Any:
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if trainer.session.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        first, stop = self.steps
        warmup = min(self.warmup, first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no warmup was asked for
            plan = schedule(wait=first - warmup, warmup=warmup, active=stop - first, repeat=1)
        return profile(activities=activities, schedule=plan, **self._how)

    def _label(self, trainer: Trainer) -> None:
        """Puts labels onto the pieces of the run when the first step is near."""
        if self._undo is None and self._seen >= self.steps[0] - self.warmup:
            from torch.profiler import record_function

            run: Any = trainer._run
            times = trainer.session.flow.times
            self._undo, times.label = instrument(run, times), record_function

    def _stop(self, trainer: Trainer) -> Any:
        profiler, self._profiler = self._profiler, None
        undo, self._undo = self._undo, None
        trainer.session.flow.times.label = None
        if undo is not None:
            undo()
        profiler.stop()
        return profiler

    def _write(self, trainer: Trainer) -> None:
        """Ends the recording and writes its files."""
        profiler, file = self._stop(trainer), self._file
        assert file is not None
        try:
            self._write_files(trainer, profiler, file)
        except OSError as error:  # no reason to end a fit
            _log.warning("The trace could not be written: %s", error)

    def _write_files(self, trainer: Trainer, profiler: Any, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        column = "cpu" if trainer.session.device.type != "cuda" else "cuda"
        table = profiler.key_averages().table(sort_by=f"self_{column}_time_total", row_limit=30)
        operators = file.with_name(file.name.partition(".")[0] + "_operators.txt")
        operators.write_text(table, encoding="utf-8")
        here = file.absolute()
        shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
        _log.info("%-9s %s (open it at https://ui.perfetto.dev)", "trace:", shown)


def _is_range(steps: Any) -> bool:
    """Tells whether it is a pair of step numbers, the second one greater."""
    pair = isinstance(steps, (tuple, list)) and len(steps) == 2
    return pair and all(isinstance(step, int) for step in steps) and 0 <= steps[0] < steps[1]
