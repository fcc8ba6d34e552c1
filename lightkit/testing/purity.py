"""Proof that a validation leaves nothing behind that training goes on with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkit import rng
from lightkit.differences import compare
from lightkit.errors import UsageError
from lightkit.hook_names import LOOP_HOOKS
from lightkit.hooks import Callback
from lightkit.task import TaskModule
from lightkit.testing.given import AGAIN, Given, patterns, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from lightkit.trainer import Trainer

_HOOKS = [name for name in LOOP_HOOKS if name.startswith("on_validation_")]
_SHOWN = 3  # of each kind
_END = "the end of validation "
_WHY = {
    "weights": "A validation must not train: no step of an optimizer, nothing that writes to weights.",
    "buffers": "Buffers such as running means are moved by modules in train mode, or by code of the "
    "step: the loop calls eval() before, do not call train() in it.",
    "modes": "The step changes modules between train and eval mode: leave that to the loop.",
    "requires_grad": "The step freezes or unfreezes parameters.",
    "random states": "The step draws random numbers, as dropout in train mode and noise do. Draw them "
    "from a generator of their own: torch.rand(..., generator=self.generator).",
    "gradients": "The step leaves gradients: a backward in it.",
    "training": "The validations before left all of that alone. Look for a plain attribute of the task "
    "(a counter, a list, a generator), or a setting of its optimizer, that the validation changes and "
    "training reads.",
}


def assert_validation_is_pure(
    task: TaskModule | Callable[[], TaskModule],
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    max_epochs: int = 2,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """Asserts that training goes on after a validation as if its steps had not been.

    Trains two copies of the task. The second one reads the same batches for its validations, but its
    ``validation_step`` and its hooks of validation do nothing (what the first one logged in them is
    logged again, for schedules and callbacks that read it; the outputs of its steps are None). After
    each validation both must have the same weights, buffers, gradients, modes and random states, bit
    for bit, and so must they before the next one and at the end of training.

    What is given stays as it is. Instead of an object a function that makes it may be given. Files go
    to a temporary folder only, and the random states are put back.

    Args:
        task: The task, or a function that returns a new one.
        train_dataloaders: What ``fit`` takes, or a function that returns it.
        val_dataloaders: Likewise.
        datamodule: Likewise, instead of loaders.
        max_epochs: Epochs of the runs; the training after a validation is compared too.
        seed: Seeds both runs.
        ignore: Names that may differ, as patterns of `fnmatch` ("buffers.net.calls").
        options: Arguments of the Trainer.

    Raises:
        AssertionError: Something differs; it says after which validation, what, and the usual cause.
        UsageError: What was given cannot be tried like this.
    """
    ignore = patterns(ignore)
    given = Given(task, train_dataloaders, val_dataloaders, datamodule, max_epochs, options)
    with rng.preserved(), quiet(), tempfile.TemporaryDirectory() as folder:
        one, two = _Watch(), _Watch()
        begin = (seed, Path(folder))
        given.fit(one, one.rows, *begin, num_sanity_val_steps=0)
        if len(one.seen) == 1:  # the end alone
            raise UsageError("There was no validation: give a loader, and a validation_step.")
        again = two.silencing(one.logged)
        given.fit(two, two.rows, *begin, num_sanity_val_steps=0, change=again)
        for said in _differences(one, two, ignore):
            same = _Watch()
            given.fit(same, same.rows, *begin, num_sanity_val_steps=0)
            repeats = not any(_differences(one, same, ignore))
            raise AssertionError(said if repeats else f"{said}\n{AGAIN}")


def _differences(one: _Watch, two: _Watch, ignore: Sequence[str]) -> Iterator[str]:
    """Yields what is to be said of each place at which two runs differ."""
    for (place, now), (_, other) in zip(one.seen, two.seen, strict=False):
        found = [
            (kind, name, how)
            for kind in now
            for part in now[kind]
            if part in other[kind]  # a metric may be made on the way
            for name, how in compare(now[kind][part], other[kind][part], f"{kind}.{part}", ignore)
        ]
        if found:
            yield _told(place, found)


def _told(place: str, found: list[tuple[str, str, str]]) -> str:
    """Returns what the error says."""
    words = {"whole run": "run that validates", "resumed one": "other", "resumed run": "other"}
    lines = [f"At {place} these differ from a run whose validation does nothing:"]
    kinds = list(dict.fromkeys(kind for kind, _, _ in found))
    for kind in kinds:
        for _, name, how in [one for one in found if one[0] == kind][:_SHOWN]:
            for ours, said in words.items():
                how = how.replace(ours, said)
            lines.append(f"  {name}: {how}")
    lines += [f"  and {more} more"] if (more := len(found) - len(lines) + 1) else []
    lines += [_WHY[kind] for kind in (kinds if place.startswith(_END) else ["training"])]
    return "\n".join(lines)


class _Watch(Callback):
    """Takes down the state after each validation and at the end, and what validations logged."""

    order = 1000

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.last: tuple[str, dict[str, Any]] = ("", {})
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.last = (f"step {trainer.global_step}", _state(task))

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        run: Any = trainer._run
        both = run.metrics.eval_results(len(run.validation.loaders))
        self.logged.append({name: value for row in both for name, value in row.items()})
        self.seen.append(self.last)
        self.seen.append((f"{_END}{len(self.logged)} (step {trainer.global_step})", _state(task)))

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        self.seen.append(("the end of training", _state(task)))

    def silencing(self, logged: list[dict[str, float]]) -> Callable[[TaskModule], None]:
        """Returns what makes the validation of a task do nothing but log again what was logged."""

        def change(task: TaskModule) -> None:
            def log_again() -> None:
                for row in logged[len(self.logged) :][:1]:
                    task.log_dict(row)

            own = dict.fromkeys(("validation_step", *_HOOKS), _nothing)
            vars(task).update(own, on_validation_epoch_end=log_again)

        return change


def _nothing(*_: Any) -> None:
    pass


def _state(task: TaskModule) -> dict[str, Any]:
    """Returns a copy of what training goes on with."""

    def taken(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone()

    parameters = dict(task.named_parameters())
    modes = {name or "task": module.training for name, module in task.named_modules()}
    return {
        "weights": {name: taken(p) for name, p in parameters.items()},
        "gradients": {name: taken(p.grad) for name, p in parameters.items()},
        "buffers": {name: taken(b) for name, b in task.named_buffers()},
        "modes": {name: "train" if training else "eval" for name, training in modes.items()},
        "requires_grad": {name: str(p.requires_grad) for name, p in parameters.items()},
        "random states": rng.rng_state(),
    }
