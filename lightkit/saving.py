"""Saves a run: what must be true before, and what belongs together on the disk."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightkit import checkpoint
from lightkit.checkpoint import writer
from lightkit.checkpoint.savers import at_an_end, in_validation
from lightkit.distributed.ranks import local_part
from lightkit.errors import CheckpointError, NonFiniteError, some
from lightkit.evaluation import may_break_off
from lightkit.places import keyed

if TYPE_CHECKING:
    from lightkit.run import FitRun
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


def save(
    trainer: Trainer,
    run: FitRun,
    path: str | Path,
    *,
    weights_only: bool = False,
    background: bool | Literal["disk"] = False,
    then: Callable[[], None] | None = None,
    failed: Callable[[Exception], None] | None = None,
    exact: bool = True,
) -> Path:
    """Writes a checkpoint of a run as it stands. Over ranks a collective; rank zero writes.

    Of a sharded model each rank writes its part.

    Args:
        trainer: The trainer of the run.
        run: The run of a fit, at a save point.
        path: Where to.
        weights_only: Leave out what is only needed to go on with the run.
        background: Copy the state and return; see `checkpoint.Writer`.
        then: Called when the file is complete, in the background by the thread that wrote it; on
            rank zero only.
        failed: Gets the error of a background save.
        exact: False for the last completed step where something of a later one has happened. Only
            for one process: where one of several ranks failed, the others do not come here.

    Raises:
        CheckpointError: It cannot be written; on rank zero.
        NonFiniteError: A loss or a parameter of one rank is not finite, so this state is not worth
            keeping. All ranks raise it.
    """
    path = Path(path)
    broken = not exact and _in_validation(run)
    problem = _not_finite(trainer, run)
    contents = checkpoint.collect(run, weights_only=weights_only, problem=problem)
    strategy = run.strategy
    if not (strategy.is_global_zero or strategy.sharded):
        return path
    header = contents["lightkit"]
    header["folder"] = "" if trainer.run_dir is None else str(trainer.run_dir.absolute())
    header["exact"] = exact
    files: list[Path] = []
    if not weights_only:
        if broken:  # the validation that failed comes again
            stepped = run.state.global_step > run.flow.group_step
            within = "step" if stepped else "batch"
            pending = "epoch" if run.cadence.unit == "epoch" else within
            contents["loop"]["pending_validation"] = pending
        if run.flow.accumulate != trainer.options.accumulate_grad_batches:  # a hook's own number
            contents["flow"]["accumulate"] = run.flow.accumulate
        contents["loggers"] = _marks(trainer) if strategy.is_global_zero else {}
        for mark in contents["loggers"].values():
            files += [Path(header["folder"], name) for name in mark.get("files", ())]
    if not strategy.is_global_zero:  # it writes its part of a sharded model, and decides nothing
        then, failed = None, lambda _: None
    how: dict[str, Any] = {"background": background, "then": then, "failed": failed}
    run.writer.write(contents, path, files=files, strategy=strategy, **how)
    return path


def finish(run: FitRun) -> None:
    """Waits at the end of a fit until all files are complete. Over ranks a collective.

    Raises:
        CheckpointError: One could not be written; on all ranks.
    """
    ranks = run.strategy.ranks
    if not ranks.is_zero:
        run.writer.close(failed=False)
    ranks.decide(lambda: run.writer.close(failed=False), "the end of writing")


def _in_validation(run: FitRun) -> bool:
    """Tells whether the exception under way came out of a validation, which is to come again.

    Raises:
        CheckpointError: It came from where no state is left that could be saved.
    """
    error = sys.exc_info()[1]
    if at_an_end(error):
        raise CheckpointError(
            "the error came out of a hook at the end of a validation or an epoch, which would count "
            "twice if it came again."
        )
    broken = in_validation(error)
    if broken and run.validation is not None and not may_break_off(run.validation):
        raise CheckpointError(
            "the error came out of a validation, for which a hook may have put other weights in"
        )
    return broken


def _not_finite(trainer: Trainer, run: FitRun) -> NonFiniteError | None:
    """Returns why the state of this rank is not worth keeping; None where it is.

    Not raised here: over ranks it may be so on one of them, and all of them are to raise it.
    """
    try:
        run.metrics.check_window()
        if trainer.options.terminate_on_nan:
            check_finite(run)
    except NonFiniteError as found:
        return found
    return None


def check_finite(run: FitRun) -> None:
    """Raises `NonFiniteError` where a trainable parameter holds nan or inf.

    A step whose loss was finite can make such weights, and no loss tells before the next one.
    """
    trained = [(n, p) for n, p in run.task.named_parameters() if p.requires_grad]
    named = [(name, p.detach()) for name, p in trained if not torch.nn.parameter.is_lazy(p)]
    # Of a sharded model each rank looks at its part; what it finds is told to all afterwards.
    named = [(name, local_part(p)) for name, p in named]
    # Nan and infinities never leave a sum of squares. A finite sum may overflow, so that a norm
    # which is not finite asks for a closer look.
    norm = torch.nn.utils.get_total_norm([value for _, value in named])
    if bool(norm.isfinite()):  # host sync: one per save
        return
    bad = [name for name, value in named if not bool(value.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"Parameters are nan or inf after step {run.state.global_step} (epoch "
            f"{run.state.epoch + 1}) though the loss was finite: {some(bad, most=3)}. This "
            f"state is not saved. Lower the learning rate, clip gradients (gradient_clip_val=1.0), "
            f"or look for the operation: lightkit replay takes the step again, without a run folder "
            f"detect_anomaly=True tells. Trainer(terminate_on_nan=False) trains on."
        )


def _marks(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Returns where the loggers' files stand, all rows handed to the operating system.

    A logger that cannot write, also not after a while, costs its mark and not the checkpoint.
    """
    marks = {}
    for key, logger in keyed(trainer.session.loggers).items():
        try:
            try:
                marks[key] = logger.mark()
            except OSError:
                time.sleep(writer.RETRY_SECONDS)
                marks[key] = logger.mark()
        except OSError as error:
            _log.warning(
                "%s could not write its rows (%s). The checkpoint of step %d is saved without its "
                "mark: in a run that goes on from it, rows may be missing or there twice.",
                key,
                error.strerror or error,
                trainer.global_step,
            )
    return marks
