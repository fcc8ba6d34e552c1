"""The first and the last lines of a fit: what will happen, and where the results are."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightkit import advice, screen
from lightkit.errors import some
from lightkit.feeds import NoData
from lightkit.hints import say
from lightkit.history import best_epoch
from lightkit.places import monitors, newest_checkpoint
from lightkit.precision import hints

if TYPE_CHECKING:
    from lightkit.ledger import Ledger
    from lightkit.run import FitRun
    from lightkit.session import Session
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


def say_start(trainer: Trainer, run: FitRun, resumed: str | None) -> None:
    """Logs what will happen, in a few lines; on rank zero."""
    if not trainer.is_global_zero:
        return
    options, folder, several = trainer.options, trainer.session.run_dir, run.strategy.world_size > 1
    parts = [f"{run.device}", f"precision {run.precision.name}"]
    if several:
        parts.insert(1, f"{run.strategy.world_size} processes, strategy {run.strategy.name}")
    if run.plan.fused:
        parts.append(f"fused {', '.join(type(o).__name__ for o in run.plan.fused)}")
    if options.seed is not None:
        parts.append(f"seed {options.seed}")
    _say("device", ", ".join(parts))
    for line in hints(run.precision, run.device, run.plan.optimizers):
        say(trainer, "precision", line)
    for name, line in advice.at_start(run):
        say(trainer, name, line)
    _say("training", _length(trainer, run))
    if several or trainer.accumulate_grad_batches > 1:
        _say("step", _step(trainer, run))
    if options.fast_dev_run:
        _say("trial", "fast_dev_run writes nothing")
    if options.overfit_batches:
        _say("trial", "overfit_batches trains on the same batches in every epoch")
    if trainer.session.compilation is not None:
        _say("compile", trainer.session.compilation.describe())
    for line in run.plan.describe(*planned(trainer)):
        _say("schedule", line)
    if resumed is not None:
        state = run.state
        done = _count(state.epoch, "epoch")
        if state.batch_idx:
            done += f" and {_count(state.batch_idx, 'batch', 'batches')}"
        where, steps = short(Path(resumed)), _count(state.global_step, "step")
        _say("resumed", f"{where} ({steps}, {done} done)")
    if folder is not None:
        _say("folder", short(folder))


@contextlib.contextmanager
def the_end(trainer: Trainer, session: Session) -> Iterator[None]:
    """Says how a fit ended, when everything of it is closed, and keeps the record of it.

    After an error or an interruption that is the line that goes on with the run, and the user's
    traceback follows. In a notebook a Ctrl-C ends here: the trainer can go on in the next cell.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
        asked = isinstance(caught, KeyboardInterrupt) and session.flow.signal is not None
        if not (asked and screen.in_notebook()):
            raise
    finally:
        if session.ledger is not None:
            session.ledger.close(error, session.state, session.history)
            if error is None:
                _say_results(trainer, session)
            else:
                if session.failure is not None:
                    _say("failure", short(session.failure))
                if session.replay is not None:
                    run = shlex.quote(str(short(session.ledger.folder)))
                    line = f"{program('lightkit')} replay {run}{session.replay}"
                    _say("replay", line, command=True)
                try:
                    _say_resume(trainer, session, session.ledger)
                except Exception as problem:  # noqa: BLE001  must not hide the error itself
                    _log.error("and in looking for the last checkpoint: %s", problem)


def _say_results(trainer: Trainer, session: Session) -> None:
    """Logs the best epoch, where the results are and how to look at them."""
    from lightkit.loggers import TensorBoardLogger

    folder = session.run_dir
    assert folder is not None
    if best := _best(trainer):
        _say("best", best)
    _say("results", short(folder))
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        logdir = shlex.quote(str(short(folder)))
        _say("curves", f"{program('tensorboard')} --logdir {logdir}", command=True)


def _best(trainer: Trainer) -> str:
    """Returns the best of several epochs by what decides which checkpoint is the best.

    Another callback's monitor or ``val_loss`` decides where no checkpoint's is logged; "" for none.
    """
    found = best_epoch(trainer.history, [*monitors(trainer), ("val_loss", "min")], at_least=2)
    if found is None:
        return ""
    name, best = found
    names = [name, *(other for other in trainer.history.names() if other in best and other != name)]
    return f"epoch {best['epoch']}, " + some(f"{n} {screen.number(best[n])}" for n in names)


def _say_resume(trainer: Trainer, session: Session, ledger: Ledger) -> None:
    """Logs one line that can be copied to go on with a run."""
    if not ledger.record.checkpoints:
        return
    path = newest_checkpoint(ledger.folder, ledger.record)
    if path is None:
        if session.state.global_step:
            _say("resume", "nothing to go on from: no checkpoint was written")
        return
    shown = short(path)
    if trainer.config_text is not None:
        config = shlex.quote(str(short(ledger.folder / "config.yaml")))
        ckpt_path = shlex.quote(str(shown))
        line = f"{program('lightkit')} fit --config {config} --ckpt_path {ckpt_path}"
        _say("resume", line, command=True)
    else:
        _say("resume", f'trainer.fit(..., ckpt_path="{shown}")')


def planned(trainer: Trainer) -> tuple[int | None, int | None]:
    """Returns the optimizer steps and epochs from 0 to the end of the run, None if unknown."""
    steps, epochs = trainer.estimated_stepping_batches, trainer.limits.max_epochs
    return steps if isinstance(steps, int) else None, epochs if epochs >= 0 else None


def _length(trainer: Trainer, run: FitRun) -> str:
    limits, length = trainer.limits, []
    if limits.max_epochs >= 0:
        default = " (default; set max_epochs=)" if limits.default_epochs else ""
        length.append(f"{_count(limits.max_epochs, 'epoch')}{default}")
    if limits.max_steps >= 0:
        length.append(f"at most {_count(limits.max_steps, 'step')}")
    if limits.seconds is not None:
        length.append(f"at most {limits.seconds:g} s")
    if isinstance(run.train_loader, NoData):
        return f"{', '.join(length) or 'without end'}, without data"
    batches = "an unknown number of batches"
    if run.train_length is not None:
        batches = _count(run.train_length, "batch", "batches")
    if (size := _batch_size(run)) is not None:
        batches += f" of {size}"
    each = " and process" if run.strategy.world_size > 1 else ""
    return f"{', '.join(length) or 'without end'}, {batches} per epoch{each}"


def _step(trainer: Trainer, run: FitRun) -> str:
    """Returns what an optimizer step over several processes or batches takes in."""
    processes, group = run.strategy.data_ranks[1], trainer.accumulate_grad_batches
    number = processes * group
    parts = [f"{processes} processes"] if run.strategy.world_size > 1 else []
    if group > 1:
        parts.append(f"{group} batches{' each' if parts else ''}")
    total, size = f"{number} batches", _batch_size(run)
    if size is not None:
        total = _count(size * number, "sample")
        parts.insert(0, f"{size} per batch")
    return total if parts == [total] else f"{total}: {' x '.join(parts)}"


def _batch_size(run: FitRun) -> int | None:
    """Returns the samples of a training batch of one process, where the loader tells."""
    sampler = getattr(run.train_loader, "batch_sampler", None)
    size = getattr(run.train_loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _say(what: str, text: object, **extra: bool) -> None:
    _log.info("%-9s %s", f"{what}:", text, extra=extra)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def program(name: str, *, here: bool = True) -> str:
    """Returns what to type for a program of this Python: its path where the name would not do.

    Args:
        name: The program.
        here: Whether it will be typed in the current folder.
    """
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None or shutil.which(name) is not None:
        return name
    return shlex.quote(str(short(Path(path)) if here else Path(path).absolute()))


def short(folder: Path) -> Path:
    """Returns a folder relative to the current one where it lies below it."""
    try:
        return folder.absolute().relative_to(Path.cwd())
    except ValueError:
        return folder
