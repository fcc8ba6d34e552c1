"""What a fit will be, told before it begins: `Trainer.check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightkit import announce, calls, outlook, rehearsal, rng
from lightkit.checkpoint.disk import nbytes
from lightkit.errors import UsageError
from lightkit.outlook import megabytes
from lightkit.screen import brief

if TYPE_CHECKING:
    from lightkit.rehearsal import Rehearsed
    from lightkit.run import FitRun
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

#: Batches of each part that are tried, for times that mean something.
_BATCHES = 8


@dataclass(frozen=True)
class Plan:
    """What a fit will be, as its rehearsal showed; ``str(plan)`` is for people.

    Attributes:
        device: Where each process computes.
        processes: How many there are.
        precision: By name.
        parameters: Numbers in the parameters of the task.
        trainable: Those of them that learn.
        weights: Bytes of parameters and buffers.
        gradients: Bytes of the gradients.
        states: Bytes of the optimizers' states, as they were after the rehearsal.
        peak: Bytes that the rehearsal had on its card at the most, with activations and a second copy
            of the task; None on the CPU, where nobody counts.
        epochs: Epochs; None without a limit.
        steps: Optimizer steps; None where unknown.
        batches: Training batches of an epoch for each process; None where unknown.
        global_batch: Samples of an optimizer step over all processes; None where unknown.
        step_seconds: What a step took in the rehearsal, in seconds.
        seconds: What training and validation will take by that, in seconds; None where unknown.
        schedules: A line for each schedule: its first, highest and last rate.
        checkpoint: Bytes of a checkpoint; 0 where none is written.
        checkpoints: Bytes that the checkpoints will take at the most.
        free: Bytes that are free on their disk.
        rehearsed: What the rehearsal did.
    """

    device: str
    processes: int
    precision: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    states: int
    peak: int | None
    epochs: int | None
    steps: int | None
    batches: int | None
    global_batch: int | None
    step_seconds: float
    seconds: float | None
    schedules: list[str]
    checkpoint: int
    checkpoints: int
    free: int
    rehearsed: Rehearsed

    def __str__(self) -> str:
        several = f", {self.processes} processes" if self.processes > 1 else ""
        known = self.weights + self.gradients + self.states
        parts = f"weights {megabytes(self.weights)}, gradients {megabytes(self.gradients)}, "
        parts += f"optimizer {megabytes(self.states)}"
        most = "; activations come on top"
        if self.peak is not None:
            most = f"; at most {megabytes(self.peak)}, with activations and the rehearsal's copy"
        length = "without end" if self.epochs is None else _some(self.epochs, "epoch", "epochs")
        length += "" if self.steps is None else f", {_some(self.steps, 'step', 'steps')}"
        length += (
            "" if self.batches is None else f", {_some(self.batches, 'batch', 'batches')} per epoch"
        )
        samples = (
            ""
            if self.global_batch is None
            else f", {_some(self.global_batch, 'sample', 'samples')} per step"
        )
        whole = "" if self.seconds is None else f", about {brief(self.seconds)} in all"
        lines = [
            ("rehearsed", self.rehearsed),
            ("device", f"{self.device}{several}, precision {self.precision}"),
            ("model", f"{self.parameters:,} parameters, {self.trainable:,} of them trainable"),
            ("memory", f"{megabytes(known)}: {parts}{most}"),
            ("training", f"{length}{samples}"),
            ("time", f"{brief(self.step_seconds)} per step{whole}"),
            *(("schedule", line) for line in self.schedules),
        ]
        if self.checkpoint:
            text = f"{megabytes(self.checkpoint)} each, up to {megabytes(self.checkpoints)}"
            lines.append(("disk", f"checkpoints of {text}; {megabytes(self.free)} are free"))
        return "\n".join(f"{name + ':':10} {text}" for name, text in lines)


def _some(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def check(trainer: Trainer, task: TaskModule, train: Any, val: Any, datamodule: Any) -> Plan:
    """Rehearses a fit and returns its plan; see `Trainer.check`."""
    before, own = trainer.session, {"max_epochs": None, "max_steps": None}
    try:
        with (
            rng.preserved(),
            calls.prepare_fit(trainer, task, (train, val, datamodule), None, **own) as (run, _, _),
        ):
            run.plan.check_horizon(*announce.planned(trainer))
            found = rehearsal.rehearse(trainer, run, own, _BATCHES)
            if isinstance(found, str):
                raise UsageError(f"Trainer.check cannot rehearse this fit: {found}.")
            return _plan(trainer, run, found)
    finally:
        trainer.session = before


def _validations(run: FitRun, steps: int | None) -> float | None:
    """Returns how often a fit of so many steps validates; None where that depends on time."""
    unit, every, group = run.cadence.unit, run.cadence.every, run.flow.accumulate
    if run.validation is None:
        return 0
    if steps is None or unit == "seconds" or run.train_length is None:
        return None
    if unit == "epoch":
        return steps * group / run.train_length // every
    return steps // every if unit == "steps" else steps * group // every


def _plan(trainer: Trainer, run: FitRun, found: Rehearsed) -> Plan:
    parameters = list(run.task.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    steps, epochs = announce.planned(trainer)
    ranks, group = run.strategy.data_ranks[1], run.flow.accumulate
    samples = announce._batch_size(run)
    validations, seconds = _validations(run, steps), None
    if steps is not None and validations is not None:
        of_each = sum(p.length or 0 for p in run.validation.loaders) if run.validation else 0
        seconds = steps * group * found.step + validations * of_each * found.validation
    free, needed = outlook.disk(trainer, found.size)
    return Plan(
        device=str(run.device),
        processes=run.strategy.world_size,
        precision=run.precision.name,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        weights=nbytes([*parameters, *run.task.buffers()]),
        gradients=nbytes(trainable),
        states=found.states,
        peak=found.peak,
        epochs=epochs,
        steps=steps,
        batches=run.train_length,
        global_batch=None if samples is None else samples * ranks * group,
        step_seconds=found.step * group,
        seconds=seconds,
        schedules=run.plan.describe(steps, epochs),
        checkpoint=found.size,
        checkpoints=needed if found.size else 0,
        free=free,
        rehearsed=found,
    )
