"""The loop as a page of pseudocode, with what a trainer and a task really put into it.

`_fit` has the shape of the loop (``loops.py``, ``opening.py``); a test holds it to recorded runs. Who
listens at a place comes from where the table of hooks has it, `hooks.listeners`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightkit import calls, feeds, opening
from lightkit.callbacks import GradientAccumulationScheduler
from lightkit.errors import ConfigError, did_you_mean
from lightkit.events import Handler
from lightkit.hooks import listeners, of_user, positional_arguments
from lightkit.limits import make_limits
from lightkit.session import Session
from lightkit.state import Stage
from lightkit.task import overrides
from lightkit.trials import gives_once

if TYPE_CHECKING:
    from lightkit.hooks import Callback
    from lightkit.options import Options
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

#: Entry points, how their steps and hooks are called, and their loaders and limits.
_STAGES = {"validate": ("validation", "val"), "test": ("test",) * 2, "predict": ("predict",) * 2}


class Explanation(str):
    """A text that a notebook and the prompt of Python show as it is."""

    def __repr__(self) -> str:
        return str(self)


def explain(
    trainer: Trainer, task: TaskModule, data: tuple[Any, Any, Any], stage: str
) -> Explanation:
    """Returns the page; see `Trainer.explain`. ``data``: to train, to evaluate, and a data module."""
    if stage not in (known := ("fit", *_STAGES)):
        raise ConfigError(
            f"explain(stage={stage!r}): allowed are {', '.join(map(repr, known))}."
            f"{did_you_mean(stage, known)}"
        )
    calls.adopt(trainer)
    train, val, datamodule = data
    train, datamodule = opening.as_datamodule(train, datamodule)
    opening.check_task(task, {})
    session = Session(task=task, stage=Stage(stage), callbacks=trainer.session.callbacks)
    link = task._link
    held = link.held()
    link.trainer = trainer  # as configure_callbacks finds it in a fit
    try:
        found = opening.all_callbacks(trainer, session)
    finally:
        link.hold(*held)
    page = _Page(task, datamodule, [*found, *trainer._handlers])
    page.part("configure_callbacks")
    page.data("prepare_data")
    page.data("setup", stage, hooks=True)
    page.part("configure_model")
    if trainer.session.strategy.sharded:
        for name in ("configure_parallelism", "configure_sharding", "init_weights"):
            page.part(name)
    if stage == "fit":
        _fit(page, trainer, train, val)
    else:
        if train is None:
            page.data(f"{_STAGES[stage][1]}_dataloader", first=True)
        _evaluation(page, trainer, stage)
    page.data("teardown", stage, hooks=True)
    if page.validates:
        page.rows.append((0, "", ""))
        with page.block("validation:"):
            _evaluation(page, trainer, "validate")
    page.rows.append((0, "", ""))
    with page.block("where a checkpoint is written:"):
        page.hook("on_save_checkpoint")
    with page.block("where a fit goes on from a checkpoint, before on_fit_start:"):
        page.hook("on_load_checkpoint")
    with page.block("where anything raises, before teardown:"):
        page.hook("on_exception")
    return Explanation(page)


class _Page:
    """Collects lines: on the left what is called, on the right by whom it is defined, or a remark."""

    def __init__(self, task: TaskModule, datamodule: Any, callbacks: list[Callback]) -> None:
        self.task, self.datamodule, self.callbacks = task, datamodule, callbacks
        self.validates = False
        self.rows: list[tuple[int, str, str]] = []
        self.depth = 0

    def say(self, text: str, remark: str = "") -> None:
        """Adds a line of the loop's own."""
        self.rows.append((self.depth, text, remark and f"# {remark}"))

    @contextlib.contextmanager
    def block(self, head: str, remark: str = "") -> Iterator[None]:
        """Adds what is said within it one level deeper, and nothing where that is nothing."""
        self.say(head, remark)
        start = len(self.rows)
        self.depth += 1
        yield
        self.depth -= 1
        if len(self.rows) == start:
            self.rows.pop()

    def call(self, text: str, owners: list[Any]) -> bool:
        """Adds a line with those who define what is called; nothing where nobody does."""
        if owners:
            self.rows.append((self.depth, text, ", ".join(map(_name, owners))))
        return bool(owners)

    def hook(self, *names: str) -> None:
        """Adds hooks that somebody listens to."""
        for name in names:
            self.call(name, listeners(name, self.task, self.callbacks))

    def part(self, name: str, otherwise: str = "", remark: str = "") -> None:
        """Adds a piece of the loop: the task's own, or what is done otherwise."""
        if not self.call(name, [self.task] if overrides(self.task, name) else []) and otherwise:
            self.say(otherwise, remark)

    def data(self, name: str, stage: str = "", *, hooks: bool = False, first: bool = False) -> None:
        """Adds what data module and task may both define; ``first``: of the first of them alone."""
        owners = [self.datamodule] if self.defined(name) else []
        if hooks:
            owners += listeners(name, self.task, self.callbacks)
        elif overrides(self.task, name) and not (first and owners):
            owners.append(self.task)
        self.call(f'{name}("{stage}")' if stage else name, owners)

    def defined(self, name: str) -> bool:
        """Tells whether the data module defines something itself."""
        return self.datamodule is not None and feeds.redefined(self.datamodule, name)

    def transfer(self, *, needed: bool = True) -> None:
        """Adds how a batch comes to its device: by the task, else by the data module."""
        for name in feeds.TRANSFER:
            mine = [one for one in (self.task,) if overrides(one, name)]
            owners = mine or [one for one in (self.datamodule,) if self.defined(name)]
            if not self.call(name, owners) and needed and name == "transfer_batch_to_device":
                self.say("bring the batch to the device")

    def __str__(self) -> str:
        rows = [("    " * depth + text, right) for depth, text, right in self.rows]
        width = max(len(left) for left, right in rows if right) + 2
        return "\n".join(f"{left:{width}}{right}".rstrip() for left, right in rows).rstrip()


def _name(owner: Any) -> str:
    if not isinstance(owner, Handler):
        return type(owner).__name__
    given = {f.name: getattr(owner.when, f.name) for f in fields(owner.when)}
    when = ", ".join(
        name if callable(value) else f"{name}={value}"
        for name, value in given.items()
        if value is not None and value is not False
    )
    return f"{owner.label} (trainer.on{when and f', {when}'})"


def _many(limit: int | float | None) -> list[str]:
    """Returns in words how much of a loader is used, unless that is all of it."""
    if type(limit) is float:
        return [] if limit == 1 else [f"{limit} of them"]
    return [] if limit is None else [f"at most {limit}"]


# --- the loop ------------------------------------------------------------------------------------


def _fit(page: _Page, trainer: Trainer, train: Any, val: Any) -> None:
    """Adds a fit from its loaders to ``on_fit_end``."""
    options, validated = trainer.options, trainer.limit("val") != 0
    for name, given, used in (("train", train, True), ("val", val, validated)):
        if given is None and used:
            page.data(f"{name}_dataloader", first=True)
    why_not = _not_validated(page, trainer, train, val)
    page.validates = not why_not
    page.part("configure_optimizers")
    sanity = _trials(page, trainer, train, val)
    page.hook("on_fit_start")
    if page.validates and sanity:
        with page.block("sanity check:", sanity):
            page.hook("on_sanity_check_start")
            page.say("validation")
            page.hook("on_sanity_check_end")
    page.hook("on_train_start")
    limits = make_limits(options)
    ends = {"epochs": limits.max_epochs, "steps": limits.max_steps, "seconds": limits.seconds}
    most = [
        f"{n:.12g} {name[: -1 if n == 1 else None]}"
        for name, n in ends.items()
        if n is not None and n >= 0
    ]
    within, after = _times(options) if page.validates else ("", "")
    with page.block("for each epoch:", f"at most {' or '.join(most)}" if most else "without end"):
        if every := options.reload_dataloaders_every_n_epochs:
            page.say("make the loaders anew", f"every {every} epochs")
        page.hook("on_train_epoch_start")
        _steps(page, trainer, within)
        if why_not or after:
            page.say("no validation" if why_not else "validation", why_not or after)
        page.hook("on_train_epoch_end")
        if page.task.automatic_optimization:
            page.part("lr_scheduler_step", "move schedules", "those that count epochs")
        page.hook("on_save_point")
    page.hook("on_train_end", "on_fit_end")


def _not_validated(page: _Page, trainer: Trainer, train: Any, val: Any) -> str:
    """Returns why a fit does not validate; "" where it does, as far as is known without its data."""
    if trainer.limit("val") == 0:
        return "limit_val_batches=0"
    if not overrides(page.task, "validation_step"):
        return f"{type(page.task).__name__} has no validation_step"
    if isinstance(val, (list, tuple, dict)) and not val:
        return "there is no loader for it"
    known = not (train is None and page.datamodule is None)
    own = page.defined("val_dataloader") or overrides(page.task, "val_dataloader")
    return "there is no loader for it" if known and val is None and not own else ""


def _trials(page: _Page, trainer: Trainer, train: Any, val: Any) -> str:
    """Adds the rehearsal, and returns what is to be said of the sanity check; "" for none."""
    options, asked = trainer.options, trainer.options.rehearse
    sanity = 0 if gives_once(val) else trainer.sanity_batches
    batches = "all batches" if options.num_sanity_val_steps == -1 else f"batches: {sanity}"
    off = options.fast_dev_run or asked is False or (asked is None and options.overfit_batches)
    if not (off or trainer.session.strategy.sharded or gives_once(train) or gives_once(val)):
        how = "a few batches, a validation and a save, on a copy"
        page.say("rehearsal" if asked else "rehearsal, unless the fit is short", how)
        own = [
            getattr(owner, name)
            for name in ("on_sanity_check_start", "on_sanity_check_end")
            for owner in listeners(name, page.task, page.callbacks)
        ]
        if options.num_sanity_val_steps is None and not any(map(of_user, own)):
            batches += ", unless it was rehearsed"
    return batches if sanity else ""


def _times(options: Options) -> tuple[str, str]:
    """Returns in words when a fit validates: within an epoch and at its end; "" for never."""
    interval, epochs = options.val_check_interval, options.check_val_every_n_epoch
    if type(interval) is float and interval != 1 and not options.fast_dev_run:
        unit, every = "total" if epochs is None else "batches", f"{interval} of an epoch"
    else:
        cadence = feeds.cadence(options, None)
        unit, every, epochs = cadence.unit, f"{cadence.every:.12g} batches", epochs or 1
        if unit == "epoch":
            return "", f"every {cadence.every} epochs" if cadence.every > 1 else "every epoch"
    turn = f", every {epochs} epochs" if unit == "batches" and epochs != 1 else ""
    words = {
        "batches": f"every {every}{turn}",
        "total": f"every {every}, counted over epochs",
        "steps": f"every {interval}",
        "seconds": f"every {interval}",
    }
    return words[unit], ""


def _steps(page: _Page, trainer: Trainer, validated: str) -> None:
    """Adds the steps of an epoch; ``validated``: in words when it is validated among them."""
    task, options, automatic = page.task, trainer.options, page.task.automatic_optimization
    size: Any = options.accumulate_grad_batches
    for callback in page.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            size = callback.scheduling
    grouped = automatic and size != 1
    alone = not positional_arguments(task.training_step, 1)
    head = "for each step, without data:" if alone else "for each batch:"
    limit = trainer.limit("train") or options.overfit_batches or None
    remarks = _many(limit)
    if grouped:
        head = "for each group of batches:"
        remarks.insert(0, f"of {size}; the last one may be smaller")

    def block(head: str) -> contextlib.AbstractContextManager[None]:
        return page.block(head) if grouped else contextlib.nullcontext()

    with page.block(head, "; ".join(remarks)):
        if automatic:
            page.hook("on_before_zero_grad")
            page.part("optimizer_zero_grad", "clear the gradients")
        with block("for each batch of the group:"):
            page.transfer(needed=not alone)
            page.hook("on_train_batch_start")
            page.part("training_step", "loss = 0", "and what on_loss adds to it")
            if automatic:
                page.hook("on_loss", "on_before_backward")
                page.part("backward", "backward")
                page.hook("on_after_backward")
                with block("if it is the last of the group:"):
                    page.hook("on_before_optimizer_step")
                    _clip(page, options)
                    page.part("optimizer_step", "step the optimizer")
                    page.part("lr_scheduler_step", "move schedules", "those that count steps")
            else:
                _own_steps(page, options)
            page.hook("on_train_batch_end")
        if validated:
            page.say("validation", validated)
        with page.block("unless the epoch ends here:"):
            page.hook("on_save_point")


def _own_steps(page: _Page, options: Options) -> None:
    """Adds what manual optimization calls within ``training_step``."""
    with page.block("in it, by each manual_backward:"):
        page.hook("on_loss")
        page.part("backward")
    with page.block("in it, by each optimizer.step():"):
        page.hook("on_before_optimizer_step")
        _clip(page, options)


def _clip(page: _Page, options: Options) -> None:
    most = options.gradient_clip_val
    what = "each element" if options.gradient_clip_algorithm == "value" else "their norm"
    clip = "clip the gradients" if most is not None else ""
    page.part("configure_gradient_clipping", clip, f"{what} to {most}")


def _evaluation(page: _Page, trainer: Trainer, entry: str) -> None:
    """Adds a validation, a test or a prediction."""
    stage, short = _STAGES[entry]
    own = stage != "test" or overrides(page.task, "test_step")
    step = f"{stage if own else 'validation'}_step"
    page.hook(f"on_{stage}_start", f"on_{stage}_epoch_start")
    remarks = ["in eval mode, without gradients", *_many(trainer.limit(short))]
    with page.block("for each loader, for each batch:", "; ".join(remarks)):
        page.transfer()
        page.hook(f"on_{stage}_batch_start")
        missing = (step, f"{type(page.task).__name__} defines none")
        page.part(step, *(("forward",) if stage == "predict" else missing))
        page.hook(f"on_{stage}_batch_end")
    page.hook(f"on_{stage}_epoch_end", f"on_{stage}_end")
