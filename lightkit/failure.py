"""What a failed fit leaves in its run folder, so that the one step can be looked at again.

``failure/`` holds::

    failure.json   where it was: step, epoch, batch, exception, versions, what was left out and why
    traceback.txt  the traceback with its notes
    batch.pt       the batch as the step got it, on the CPU
    state.ckpt     a checkpoint of the run as it stood: the weights before the step (``state`` of
                   failure.json says where it is otherwise), random states

After a loss that was not finite the weights are spoilt, so that there is neither: ``failure.json``
names the step of the first such value and the newest checkpoint before it. `lightkit.replay` reads
all this.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch

from lightkit import checkpoint
from lightkit.checkpoint.disk import nbytes
from lightkit.checkpoint.savers import leaves_a_state
from lightkit.data import move_to_device
from lightkit.data.move import members_of
from lightkit.errors import CheckpointError, NonFiniteError, PeerError, UsageError
from lightkit.explaining import passes, step_of
from lightkit.ledger import Record
from lightkit.places import newest_checkpoint
from lightkit.run import FitRun

if TYPE_CHECKING:
    from lightkit.session import Session
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")

FOLDER, FILE = "failure", "failure.json"
#: Bytes of tensors above which a batch, or a state, is left out.
MOST_BATCH, MOST_STATE = 500 << 20, 2 << 30
#: The Trainer's arguments that a step depends on.
_OPTIONS = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "memory_format", "fused")


def leave(trainer: Trainer, session: Session, error: BaseException) -> None:
    """Writes what is known of the error that ends a fit; on the rank that failed, no collective.

    Not for Ctrl-C and signals, nor for what is wrong before the first step. Never raises: what
    cannot be written is left out.

    Args:
        trainer: The trainer.
        session: The call that ends.
        error: The exception under way.
    """
    try:
        run, state = trainer._run, session.state
        if (
            trainer.rehearsing
            or session.run_dir is None
            or not isinstance(run, FitRun)
            or not _counts(error, run)
        ):
            return
        rank = run.strategy.ranks.rank
        folder = session.run_dir / (FOLDER if rank == 0 else f"{FOLDER}_rank_{rank}")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier failure of this run
        folder.mkdir(parents=True)
        known: dict[str, Any] = {
            "exception": type(error).__name__,
            "message": str(error),
            "stage": "training",
            "step": state.global_step,
            "epoch": state.epoch,
            "batch_idx": state.batch_idx,
            "rank": rank,
            "processes": run.strategy.world_size,
            "task": f"{_module_of(run.task)}.{type(run.task).__qualname__}",
            "trainer": {name: getattr(trainer.options, name) for name in _OPTIONS},
            "seed": trainer.options.seed,
            "checkpoint": None,
            "when": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "left_out": {},
        }
        _write_files(folder, run, session, error, known)
        text = "".join(traceback.format_exception(error))
        (folder / "traceback.txt").write_text(text, encoding="utf-8")
        (folder / FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        session.failure, session.replay = folder, _again(folder, session, known)
        if rank:
            _log.error("failure: %s", folder)  # rank zero does not know of it
    except Exception as problem:  # noqa: BLE001  must not hide the error itself
        _log.warning("what is known of the error could not be written: %s", problem)


def of_no_step(known: Mapping[str, Any]) -> bool:
    """Tells whether an error came out of a hook, a loader and the like."""
    return "state" in known and "dataloader_idx" not in known


def _again(folder: Path, session: Session, known: Mapping[str, Any]) -> str | None:
    """Returns what ``lightkit replay RUN`` needs besides, None where it would not get to the error."""
    state = (folder / "state.ckpt").exists()
    own = state and known.get("batch_as_it_was")
    if not own and known["processes"] > 1:
        return None
    if (folder.parent / "config.yaml").exists():
        return ""
    words = f" --task {known['task']}"
    if own:
        return words
    if of_no_step(known) or not (state or known["checkpoint"]):
        return None  # only the script has the callbacks, and the beginning
    module = session.datamodule
    kind = "module.Class" if module is None else f"{_module_of(module)}.{type(module).__qualname__}"
    return f"{words} --data {kind}"


def _module_of(task: Any) -> str:
    """Returns the module from which an object's class can be imported again, also of a script."""
    name, main = type(task).__module__, sys.modules["__main__"]
    if name != "__main__":
        return name
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else name


def _counts(error: BaseException, run: FitRun) -> bool:
    """Tells whether an exception is one of the fit itself."""
    if not isinstance(error, Exception) or isinstance(error, PeerError):
        return False
    if isinstance(error, UsageError) and not (run.state.global_step or run.state.batch_idx):
        return False
    return any(
        passes(frame, {("lightkit.loops", "fit")}) for frame, _ in walk_tb(error.__traceback__)
    )


def _write_files(
    folder: Path, run: FitRun, session: Session, error: BaseException, known: dict[str, Any]
) -> None:
    """Writes the batch and the state, and adds to ``known`` what is to be said of them."""
    record = Record() if session.ledger is None else session.ledger.record
    if run.run_id:
        record.id = run.run_id
    newest = newest_checkpoint(session.run_dir or folder, record)
    known["checkpoint"] = None if newest is None else str(newest.absolute())
    if isinstance(error, NonFiniteError):
        known["step"] = run.state.global_step - 1 if error.step is None else error.step
        known["left_out"] = dict.fromkeys(
            ("batch.pt", "state.ckpt"), "the loss was read some steps later"
        )
        return
    step = step_of(error)
    if step is not None:
        known |= {"stage": step.stage, "batch_idx": step.index, "dataloader_idx": step.loader}
    known["state"] = "before the step" if leaves_a_state(error) else "within an update"
    if step is not None and step.stage == "training" and run.state.batch_idx > step.index:
        known["state"] = "after the step"  # a hook at the end of the batch failed

    def the_batch() -> Any:
        if step is None:
            raise CheckpointError("the error came from no step")
        parts: list[str] = []
        kept = _storable(step.batch, "batch", parts)
        if parts:
            known["left_out"]["batch.pt"] = f"{', '.join(parts)} cannot be stored"
        known["batch_as_it_was"] = not parts and _plain(step.batch)
        return move_to_device({"batch": _small(kept, MOST_BATCH)}, "cpu")

    def the_state() -> Any:
        if run.strategy.sharded:
            raise CheckpointError("it is shared by all processes")
        saved = checkpoint.collect(run, alone=True)
        saved["lightkit"]["exact"] = False  # random states are those of the middle of a step
        return _small(saved, MOST_STATE)

    _keep(folder / "batch.pt", the_batch, known["left_out"])
    _keep(folder / "state.ckpt", the_state, known["left_out"])


def _small(item: Any, most: int) -> Any:
    """Returns the item itself; refuses what is too large before it is copied."""
    if (size := nbytes(item)) > most:
        raise CheckpointError(f"{size >> 20} MiB are more than {most >> 20} MiB")
    return item


def _keep(file: Path, make: Callable[[], Any], left_out: dict[str, str]) -> None:
    """Writes what ``make`` returns, or notes why not."""
    try:
        checkpoint.save_file(make(), file)
    except Exception as problem:  # noqa: BLE001  each file by itself; the error must not be hidden
        own = isinstance(problem, CheckpointError)
        left_out[file.name] = str(problem) if own else f"{type(problem).__name__}: {problem}"


def _storable(item: Any, path: str, left_out: list[str]) -> Any:
    """Returns what can be stored of a batch; notes the paths of the rest, which becomes None."""
    with contextlib.suppress(CheckpointError):
        return checkpoint.storable(item)
    members = members_of(item)
    if members is None:
        left_out.append(f"{path} ({type(item).__name__})")
        return None
    kept = {key: _storable(part, f"{path}[{key!r}]", left_out) for key, part in members}
    return list(kept.values()) if isinstance(item, (list, tuple)) else kept


def _plain(item: Any) -> bool:
    """Tells whether a batch comes back from a file as it was: of classes of its own it would not."""
    if isinstance(item, (list, tuple, dict)):
        own = type(item) in (list, tuple, dict)
        return own and all(_plain(part) for _, part in members_of(item) or ())
    return type(item) in (torch.Tensor, int, float, bool, str, bytes, type(None))
