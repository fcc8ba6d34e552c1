"""What a trainer holds during and after one call of an entry point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lightkit.distributed import SingleDevice, Strategy
from lightkit.flow import Flow
from lightkit.history import History
from lightkit.limits import DEFAULT_EPOCHS, Limits
from lightkit.precision import Precision
from lightkit.readings import CallbackMetrics
from lightkit.state import Stage, TrainState

if TYPE_CHECKING:
    from pathlib import Path

    from lightkit.compiling import Compilation
    from lightkit.hooks import Callback, HookTable
    from lightkit.ledger import Ledger
    from lightkit.loggers.base import Logger
    from lightkit.metrics import MetricLog
    from lightkit.optim import OptimizerPlan
    from lightkit.run import FitRun
    from lightkit.task import TaskModule


def _cpu() -> torch.device:
    return torch.device("cpu")


@dataclass(slots=True)
class Session:
    """The side of a call that callbacks and users may look at, during it and afterwards.

    Attributes:
        stage: The entry point that runs; None between calls.
        task: The task of the last call.
        limits: How far fit trains: as the trainer was told, or the last call of fit.
        bare: Whether a step that takes a batch may go without data.
        lengths: Batches of each evaluation loader by stage, None where unknown.
        given_train: The training data as the user gave it.
        given: The data of evaluations by stage, likewise.
        named_by_user: Whether evaluation loaders came as a dict, whose names prefix metrics.
        assembled: The callbacks as the call began with them; the list is the user's to change.
        loggers: Those that this call writes to; none in evaluations and in fast_dev_run.
        loaded_at: Epochs completed when the loaders were made; -1 for those of a run that is
            continued, which were made before the epoch was known.
        ended: The last fit, where it came to its end: it may be saved afterwards.
        ledger: The record of the fit's run folder; None where nothing is written.
        compilation: What is compiled in the fit that runs; None where nothing is.
        failure: What the fit left behind when it failed; see ``failure.py``.
        replay: What is to be said to ``lightkit replay`` beside its folder; None where it is no help.
    """

    task: TaskModule = None  # type: ignore[assignment]  # before the first call there is none
    datamodule: Any = None
    stage: Stage | None = None
    state: TrainState = field(default_factory=TrainState)
    flow: Flow = field(default_factory=Flow)
    history: History = field(default_factory=History)
    results: CallbackMetrics = field(default_factory=CallbackMetrics)
    metrics: MetricLog | None = None
    hooks: HookTable | None = None
    callbacks: list[Callback] = field(default_factory=list)
    assembled: tuple[Callback, ...] = ()
    loggers: list[Logger] = field(default_factory=list)
    run_dir: Path | None = None
    device: torch.device = field(default_factory=_cpu)
    strategy: Strategy = field(default_factory=SingleDevice)
    precision: Precision = field(default_factory=lambda: Precision("32-true"))
    plan: OptimizerPlan | None = None
    bare: bool = False
    limits: Limits = field(default_factory=lambda: Limits(DEFAULT_EPOCHS, -1, 0, 0, None))
    train_length: int | None = None
    lengths: dict[str, list[int | None]] = field(default_factory=dict)
    given_train: Any = None
    given: dict[str, Any] = field(default_factory=dict)
    named_by_user: bool = False
    loaded_at: int = -1
    ended: FitRun | None = None
    ledger: Ledger | None = None
    compilation: Compilation | None = None
    failure: Path | None = None
    replay: str | None = None
