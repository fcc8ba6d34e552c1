"""What the proofs share: what the user gave, made anew for each run, and how it is trained."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightkit import opening, rng
from lightkit.callbacks import ModelCheckpoint
from lightkit.errors import UsageError
from lightkit.hooks import Callback
from lightkit.loggers.base import Logger
from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")
#: What is said of a run that differs from itself.
AGAIN = (
    "Nor does the run repeat itself: a second one from the start, with the same seed, differs too. "
    "Look for kernels that are not deterministic (deterministic=True names them), and for what "
    "depends on time, on the process, on class attributes or on globals."
)


class Given:
    """What the user gave; `make` returns it anew for each run."""

    def __init__(
        self, task: Any, train: Any, val: Any, datamodule: Any, max_epochs: int, options: Any
    ) -> None:
        if options.get("fast_dev_run"):
            raise UsageError(
                "fast_dev_run writes no checkpoints; limit_train_batches=... is short too."
            )
        self.things = {
            "task": task,
            "callbacks": options.get("callbacks"),
            "train_dataloaders": train,
            "val_dataloaders": val,
            "datamodule": datamodule,
        }
        rest = {k: v for k, v in options.items() if k not in ("callbacks", "logger")}
        names = ("enable_progress_bar", "enable_model_summary", "hints", "rehearse")
        off = dict.fromkeys(names, False)
        self.options = {"log_every_n_steps": 1, "max_epochs": max_epochs, **rest, **off}
        self.shared: dict[str, str] = {}  # what could not be copied, and why
        for name, thing in self.things.items():
            if isinstance(thing, Iterator):
                raise UsageError(
                    f"{name} gives its batches only once, but several runs need them. Pass a "
                    f"function that makes it: {name}=lambda: ..."
                )

    def make(self) -> dict[str, Any]:
        """Returns all of it, made or copied; objects that share something go on sharing it."""
        made: dict[str, Any] = {}
        memos: list[dict[int, Any]] = [{}]  # all stay alive, for their addresses are keys in them
        for name, thing in self.things.items():
            if makes(thing):
                made[name] = thing()
                continue
            tried = dict(memos[-1])  # a copy that fails leaves halves behind
            try:
                made[name] = copy.deepcopy(thing, tried)
                memos.append(tried)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                if name in ("task", "callbacks"):
                    raise UsageError(
                        f"{name} cannot be copied ({why}). Pass a function that makes it: "
                        f"{name}=lambda: ..."
                    ) from error
                made[name] = thing
                self.shared[name] = why
        return made

    def fit(
        self,
        watch: Callback,
        rows: list[tuple[int, dict[str, float]]],
        seed: int,
        folder: Path,
        *,
        saves: bool = False,
        change: Callable[[TaskModule], None] | None = None,
        ckpt_path: Path | None = None,
        **options: Any,
    ) -> None:
        """Trains what `make` returns.

        Args:
            watch: Looks on, beside the callbacks that were given.
            rows: Gets the rows of the logger, with their steps.
            seed: Seeds the run.
            folder: Where its files go.
            saves: Whether checkpoints are written by themselves.
            change: Called with the task before.
            ckpt_path: Where the run goes on.
            options: Arguments of the Trainer, instead of those that were given.
        """
        from lightkit.trainer import Trainer

        rng.seed_everything(seed, verbose=False)
        made = self.make()
        task, callbacks = made.pop("task"), made.pop("callbacks")
        opening.check_task(task, {})
        if change is not None:
            change(task)
        callbacks = [callbacks] if isinstance(callbacks, Callback) else [*(callbacks or ())]
        options = {**self.options, "default_root_dir": folder, **options}
        if not saves:
            callbacks, own = _not_saving(callbacks), task.configure_callbacks
            vars(task)["configure_callbacks"] = lambda: _not_saving(own())
            options["enable_checkpointing"] = False
        trainer = Trainer(**options, callbacks=[*callbacks, watch], logger=Rows(rows))
        trainer.fit(task, **made, ckpt_path=ckpt_path)

    @staticmethod
    def stops(at: int | Iterable[int] | None) -> set[int] | None:
        """Returns the steps that the user chose, checked."""
        if at is None:
            return None
        steps = [at] if isinstance(at, int) else [*at]
        if not steps or any(not isinstance(n, int) or n < 1 for n in steps):
            raise UsageError(f"at={at!r}; it must be numbers of optimizer steps, from 1 on.")
        return set(steps)


def _not_saving(callbacks: Any) -> list[Callback]:
    """Returns the callbacks that write no checkpoints."""
    found = [callbacks] if isinstance(callbacks, Callback) else callbacks
    return [callback for callback in found if not isinstance(callback, ModelCheckpoint)]


def patterns(ignore: str | Iterable[str]) -> list[str]:
    """Returns the names to leave out as a list; a text is one of them."""
    return [ignore] if isinstance(ignore, str) else [*ignore]


def makes(thing: Any) -> bool:
    """Tells whether something is a function or class that makes what is meant."""
    is_loader = hasattr(type(thing), "__iter__") or hasattr(type(thing), "__getitem__")
    return callable(thing) and not isinstance(thing, nn.Module) and not is_loader


class Rows(Logger):
    """Keeps the rows in memory."""

    def __init__(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        super().__init__()
        self.rows = rows

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps a row."""
        self.rows.append((step, dict(metrics)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets the runs say warnings only, and each of them once."""
    level, said = _log.level, set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    _log.setLevel(max(level, logging.WARNING))
    _log.addFilter(is_new)
    try:
        yield
    finally:
        _log.removeFilter(is_new)
        _log.setLevel(level)
