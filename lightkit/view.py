"""What callbacks, loggers and users read of a trainer. Nothing here syncs or communicates."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightkit import signals
from lightkit.history import History
from lightkit.readings import CallbackMetrics
from lightkit.schedules import SchedulerEntry
from lightkit.session import Session
from lightkit.state import Stage, TrainState

if TYPE_CHECKING:
    from lightkit.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
    from lightkit.distributed import Strategy
    from lightkit.events import Handler
    from lightkit.hooks import Callback
    from lightkit.limits import Limits
    from lightkit.loggers.base import Logger
    from lightkit.options import Options
    from lightkit.run import EvalRun, FitRun
    from lightkit.task import TaskModule


class TrainerView:
    """The attributes of a trainer that may be read at any time, during a call and after it."""

    options: Options
    session: Session
    _run: FitRun | EvalRun | None = None
    _callbacks: list[Callback]
    _loggers: list[Logger]
    _handlers: list[Handler]
    #: Whether this is the trainer of a rehearsal, which trains a copy of the task.
    rehearsing: bool = False

    def __getattr__(self, name: str) -> Any:
        """Says for names of other trainers what to write; called where there is no such name."""
        if hasattr(type(self), name):  # a property raised an AttributeError: let it be seen
            return object.__getattribute__(self, name)
        from lightkit.elsewhere import OTHERS, TRAINER, refusal

        options = vars(self).get("options", ())
        names = {n: f"trainer.options.{n}" for n in getattr(options, "__dataclass_fields__", ())}
        names |= TRAINER | OTHERS
        text = refusal("Trainer has no attribute", name, names, dir(type(self)))
        raise AttributeError(text)

    # --- position --------------------------------------------------------------------------------

    @property
    def state(self) -> TrainState:
        """Counters of completed epochs, steps and batches."""
        return self.session.state

    @property
    def current_epoch(self) -> int:
        """Epochs completed: 0 during the whole first epoch, its end hooks included."""
        return self.session.state.epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps completed, whatever the number of optimizers."""
        return self.session.state.global_step

    @property
    def stage(self) -> Stage | None:
        """The entry point that runs; None between calls."""
        return self.session.stage

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation before training runs."""
        return self.session.flow.sanity_checking

    @property
    def epoch_ended(self) -> bool:
        """At a save point: whether an epoch ended with this step."""
        return self.session.flow.epoch_ended

    @property
    def run_ending(self) -> bool:
        """At a save point: whether it is the last of the run."""
        return self.session.flow.ending

    @property
    def training(self) -> bool:
        """Whether fit runs and is not validating at the moment."""
        return self.stage is Stage.FIT and not self.validating

    @property
    def validating(self) -> bool:
        """Whether a validation runs, by itself or within fit."""
        return self.stage is Stage.VALIDATE or self.session.flow.validating

    @property
    def testing(self) -> bool:
        """Whether test runs."""
        return self.stage is Stage.TEST

    @property
    def predicting(self) -> bool:
        """Whether predict runs."""
        return self.stage is Stage.PREDICT

    @property
    def should_stop(self) -> bool:
        """Whether a stop was asked for. Setting it to True asks for one."""
        return (self.session.flow.stop_reason or self.session.flow.asked) is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self.session.flow.ask("trainer.should_stop was set")
        else:
            self.session.flow.stop_reason = self.session.flow.asked = None

    @property
    def interrupted(self) -> str | None:
        """The signal that ended the last fit, such as "SIGINT" for Ctrl-C; None where none did."""
        number = self.session.flow.signal
        return None if number is None else signals.name(number)

    @property
    def data_wait(self) -> float:
        """Seconds of this epoch spent waiting for the training loader."""
        return self.session.flow.data_wait

    @property
    def epoch_started(self) -> float:
        """``time.perf_counter()`` at the start of the epoch."""
        return self.session.flow.epoch_started

    @property
    def epoch_times(self) -> dict[str, float]:
        """Seconds of the epoch so far by what they were spent on; of the last one after a fit.

        "data" (waiting for the training loader while the device had nothing to do), "validation",
        "checkpoint" (what the loop waited for), "callbacks" (your own hooks and callbacks) and
        "step", which is all the rest. They add up to the time of the epoch.
        """
        flow = self.session.flow
        return flow.times.epoch(time.perf_counter(), flow.data_wait)

    @property
    def samples_per_second(self) -> float | None:
        """Training samples of all ranks per second of this epoch, validations not counted.

        None outside a fit, before the first batch, and where the loader does not say how many
        samples a batch has.
        """
        from lightkit.run import FitRun

        run, first, done = self._run, self.session.flow.first_batch, self.state.batch_idx
        if not isinstance(run, FitRun) or run.counts is None or done <= first:
            return None
        last = run.counts.of(done - 1)  # only the last one may be smaller
        seconds = self.epoch_times
        took = sum(seconds.values()) - seconds["validation"]
        if last is None or took <= 0:
            return None
        own = run.counts.batch_size * (done - first - 1) + last
        return own * self.session.strategy.data_ranks[1] / took

    @property
    def memory(self) -> int | None:
        """Bytes: on CUDA the most that was allocated there, else the most that this process held.

        None on systems that do not tell.
        """
        if self.session.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.session.device)
        try:
            import resource
        except ImportError:  # Windows
            return None
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    # --- limits ----------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """How far fits train: as the Trainer was told, or the last call of fit."""
        return self.session.limits

    @property
    def max_epochs(self) -> int:
        """Epochs after which a fit ends; -1 for no limit."""
        return self.limits.max_epochs

    @property
    def min_epochs(self) -> int:
        """Epochs that a request to stop waits for."""
        return self.limits.min_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps after which a fit ends; -1 for no limit."""
        return self.limits.max_steps

    @property
    def min_steps(self) -> int:
        """Optimizer steps that a request to stop waits for."""
        return self.limits.min_steps

    @property
    def num_training_batches(self) -> int | None:
        """Training batches of an epoch for this process; None where unknown."""
        from lightkit.run import FitRun

        run = self._run  # which knows of an epoch that another number of processes began
        return run.train_length if isinstance(run, FitRun) else self.session.train_length

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch under way is the last of its epoch, as far as is known."""
        return self.num_training_batches == self.session.state.batch_idx + 1

    @property
    def num_val_batches(self) -> list[int | None]:
        """Batches of each validation loader, None where unknown."""
        return self.session.lengths.get("validation", [])

    @property
    def num_test_batches(self) -> list[int | None]:
        """Batches of each test loader, None where unknown."""
        return self.session.lengths.get("test", [])

    @property
    def num_predict_batches(self) -> list[int | None]:
        """Batches of each loader to predict, None where unknown."""
        return self.session.lengths.get("predict", [])

    @property
    def estimated_stepping_batches(self) -> int | float | None:
        """Optimizer steps from 0 to the end of the fit: infinite without limit, None if unknown."""
        steps, epochs = self.limits.max_steps, self.limits.max_epochs
        length = self.session.train_length
        if epochs < 0:
            return steps if steps >= 0 else math.inf
        if length is None:
            return steps if steps >= 0 else None
        total = -(-length // self.accumulate_grad_batches) * epochs
        return min(total, steps) if steps >= 0 else total

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches per optimizer step."""
        return (
            self.session.flow.accumulate
            if self.session.stage
            else (self.options.accumulate_grad_batches)
        )

    @property
    def log_every_n_steps(self) -> int:
        """Steps per row of the loggers."""
        return self.options.log_every_n_steps

    @property
    def fast_dev_run(self) -> bool | int:
        """Whether this is a trial of a few batches that writes nothing."""
        return self.options.fast_dev_run

    @property
    def gradient_clip_val(self) -> float | None:
        """What gradients are clipped to; None for nothing."""
        return self.options.gradient_clip_val

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """Epochs between validations."""
        return self.options.check_val_every_n_epoch

    def limit(self, what: str) -> int | float | None:
        """Returns the limit of batches that holds for "train", "val", "test" or "predict"."""
        options = self.options
        if options.fast_dev_run:
            return int(options.fast_dev_run)
        if options.overfit_batches and what == "train":
            return None
        if options.overfit_batches and what == "val" and options.limit_val_batches is None:
            return options.overfit_batches
        given: int | float | None = getattr(options, f"limit_{what}_batches")
        return given

    @property
    def sanity_batches(self) -> int:
        """Validation batches tried before a fresh fit."""
        steps = self.options.num_sanity_val_steps
        if self.options.fast_dev_run or self.options.overfit_batches:
            return 0
        return 2 if steps is None else 2**31 if steps < 0 else steps

    # --- numbers ---------------------------------------------------------------------------------

    @property
    def callback_metrics(self) -> CallbackMetrics:
        """The last logged value of each name, and the means of epochs and evaluations that ended."""
        return self.session.results

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The last row that the loggers got."""
        metrics = self.session.metrics
        return {} if metrics is None else {k: torch.tensor(v) for k, v in metrics.row.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """Plain numbers of the last row, for the names logged with ``prog_bar``, and the loss."""
        return {} if self.session.metrics is None else self.session.metrics.bar

    @property
    def history(self) -> History:
        """One dict per epoch of the last fit."""
        return self.session.history

    # --- objects ---------------------------------------------------------------------------------

    @property
    def task(self) -> TaskModule:
        """The task of the last call."""
        return self.session.task

    model = lightning_module = task

    @property
    def datamodule(self) -> Any:
        """The data module of the last call, or None."""
        return self.session.datamodule

    @property
    def callbacks(self) -> list[Callback]:
        """All callbacks in their order; before the first call those that were given.

        What is added or removed holds from the next call on.
        """
        return self.session.callbacks or self._callbacks

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """The callbacks that write checkpoints."""
        from lightkit.callbacks import ModelCheckpoint

        return [c for c in self.callbacks if isinstance(c, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first callback that writes checkpoints, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first EarlyStopping, or None."""
        from lightkit.callbacks import EarlyStopping

        return next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress display, or None."""
        from lightkit.callbacks import ProgressBar

        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)

    @property
    def loggers(self) -> list[Logger]:
        """All loggers; evaluations and fast_dev_run write nothing to them."""
        return self._loggers

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None."""
        return next(iter(self.loggers), None)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the last fit."""
        return [] if self.session.plan is None else self.session.plan.optimizers

    @property
    def lr_schedulers(self) -> list[SchedulerEntry]:
        """The schedules of the last fit."""
        return [] if self.session.plan is None else self.session.plan.schedulers

    lr_scheduler_configs = lr_schedulers

    @property
    def train_dataloader(self) -> Any:
        """The training data of the last fit, as it was given."""
        return self.session.given_train

    @property
    def val_dataloaders(self) -> Any:
        """The validation data of the last call that had some, as they were given."""
        return self.session.given.get("validation")

    @property
    def test_dataloaders(self) -> Any:
        """The test data likewise."""
        return self.session.given.get("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The data to predict likewise."""
        return self.session.given.get("predict")

    @property
    def precision(self) -> str:
        """The precision by name."""
        return self.session.precision.name

    # --- places ----------------------------------------------------------------------------------

    @property
    def default_root_dir(self) -> Path:
        """Where run folders go."""
        given = self.options.default_root_dir
        return Path("runs" if given is None else given)

    @property
    def run_dir(self) -> Path | None:
        """The folder of the last fit; None where nothing is written."""
        return self.session.run_dir

    @property
    def log_dir(self) -> str | None:
        """The folder of the last fit as text."""
        return None if self.session.run_dir is None else str(self.session.run_dir)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the first of all."""
        return self.session.strategy.is_global_zero

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return self.session.strategy.ranks.rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return self.session.strategy.ranks.env.local_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.session.strategy.world_size

    @property
    def node_rank(self) -> int:
        """The number of this machine."""
        return self.session.strategy.ranks.env.node

    @property
    def num_devices(self) -> int:
        """The number of devices of this machine in use."""
        return self.session.strategy.ranks.env.local_world_size

    @property
    def num_nodes(self) -> int:
        """The number of machines."""
        return self.world_size // self.num_devices

    @property
    def strategy(self) -> Strategy:
        """How the task runs on its devices."""
        return self.session.strategy
