"""What is in a checkpoint: collected from a run, and put back into one.

The layout of format 1; everything is plain types and tensors::

    lightkit            {"format", "version", "epoch", "global_step", "run", "folder", "exact"}
    model               the task's state_dict, under the task's own names
    task_class          "module.Class" of the task, for people
    hparams             the task's constructor arguments
    datamodule_hparams  the data module's, if it has any
    optimizers, schedulers, stepped, precision, loop, flow, rng (one per rank), data, datamodule,
    callbacks, metrics, history, loggers (their marks), world_size
                        everything else that a run needs to go on; left out of weights-only files

"run" is the id of the run, "folder" its folder, and "exact" false for a state that was saved after
an exception; "stepped" tells of each optimizer whether it has taken a step. These four, "flow",
"loggers" and "world_size" are not in the oldest files, and "history" is a list of dicts there.

With several ranks a file holds what rank zero knows, and under "ranks" in "metrics" and "data" what
each of them knows by itself. Counters of batches count those of one rank.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from lightkit.checkpoint import spread
from lightkit.checkpoint.files import FORMAT
from lightkit.checkpoint.storable import storable_hparams
from lightkit.checkpoint.weights import apply_weights, weights_of
from lightkit.elsewhere import CHECKPOINT, refusal
from lightkit.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from lightkit.run import FitRun

_log = logging.getLogger("lightkit")


class Contents(dict[str, Any]):
    """A checkpoint as hooks get it: a dict that says for names of other trainers what to write."""

    def __missing__(self, key: str) -> NoReturn:
        raise KeyError(refusal("a checkpoint has no key", str(key), CHECKPOINT, self))


def collect(
    run: FitRun,
    *,
    weights_only: bool = False,
    problem: Exception | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Returns the checkpoint of a run as it stands now. The tensors are the live ones.

    Over ranks a collective: each of them gets the whole, with the parts of all.

    Args:
        run: The run of a fit, at a save point.
        weights_only: Leave out what is only needed to go on with the run.
        problem: Why the state of this rank is not to be saved; all ranks raise it then.
        alone: As if there were no other ranks, no collective; nor hooks, where there are some.

    Raises:
        ConfigError: Two callbacks want to store their state under one key.
    """
    task, state = run.task, run.state
    own = {} if weights_only else spread.part(run)
    parts = [own] if alone else _of_all(run, own, problem)
    checkpoint = Contents(
        lightkit={
            "format": FORMAT,
            "version": _version(),
            "epoch": state.epoch,
            "global_step": state.global_step,
            "run": run.run_id,
        },
        model=run.strategy.model_state(task),
        task_class=f"{type(task).__module__}.{type(task).__qualname__}",
        hparams=storable_hparams(task.hparams),
    )
    datamodule_hparams = getattr(run.datamodule, "hparams", None)
    if datamodule_hparams:
        checkpoint["datamodule_hparams"] = storable_hparams(datamodule_hparams)
    if not weights_only:
        run.precision.settle()  # host sync: schedules that wait for the last step's scale move
        checkpoint |= run.plan.state_dict()
        checkpoint["precision"] = run.precision.state_dict()
        checkpoint["loop"] = run.completed()
        # A listener of this very save point may have asked too late for it to be followed here.
        followed = run.flow.ending or run.flow.epoch_ended
        checkpoint["flow"] = {
            "stop_reason": run.flow.stop_reason if followed else None,
            "batches_per_step": len(parts) * run.flow.accumulate,
        }
        if switched := run.switched_now():
            checkpoint["flow"]["switched"] = switched
        checkpoint |= spread.joined(parts)
        if hasattr(run.datamodule, "state_dict"):  # any object with loaders may be a data module
            checkpoint["datamodule"] = run.datamodule.state_dict()
        checkpoint["callbacks"] = _callback_states(run)
        checkpoint["metrics"] = {**run.metrics.state_dict(), **checkpoint["metrics"]}
        checkpoint["history"] = _packed(run.history)
    for hook in () if alone and run.several else run.hooks.on_save_checkpoint:
        hook(checkpoint)
    return dict(checkpoint)  # what divides and copies it knows plain containers


def _of_all(run: FitRun, own: dict[str, Any], problem: Exception | None) -> list[dict[str, Any]]:
    """Returns what the ranks know by themselves; a collective."""
    parts = spread.gathered(run.strategy.ranks, own, problem)
    # Ranks that get the same batches, as in tensor parallelism, know the same.
    return parts[:: len(parts) // run.strategy.data_ranks[1]]


def restore(run: FitRun, checkpoint: dict[str, Any]) -> None:
    """Puts everything of a checkpoint back into a run, except the random states.

    Those come last of all, when nothing is drawn any more before the next batch:
    ``rng.set_rng_state(random_states(checkpoint, rank))``. Every rank calls this with the whole
    checkpoint and takes its part of it.

    Raises:
        CheckpointError: The checkpoint holds weights only, comes from Lightning, or was made with
            another network, other optimizers or other schedulers.
    """
    if "loop" not in checkpoint:
        kind = "weights only" if "lightkit" in checkpoint else "a run of Lightning"
        raise CheckpointError(
            f"The checkpoint holds {kind}, so a run cannot go on from it. To start from its "
            f"weights: task.load_weights(path), then fit without ckpt_path."
        )
    if run.strategy.sharded or "pieces" in checkpoint["lightkit"]:
        from lightkit.checkpoint import placing

        checkpoint = placing.settled(checkpoint, run.task, run.plan.optimizers)
    checkpoint = Contents(checkpoint)
    for hook in run.hooks.on_load_checkpoint:
        hook(checkpoint)
    saved_class = checkpoint.get("task_class", "a task")
    source = f"the checkpoint (step {checkpoint['loop'].get('global_step', '?')}, {saved_class})"
    apply_weights(run.task, weights_of(checkpoint, source), source)
    # Schedulers after optimizers: torch's schedulers keep rates that the optimizer must have.
    own = ("optimizers", "schedulers", "stepped")
    run.plan.load_state_dict({name: checkpoint[name] for name in own if name in checkpoint})
    run.precision.load_state_dict(checkpoint["precision"])
    run.state.load_state_dict(spread.counters(checkpoint, run.strategy.data_ranks[1]))
    # Saved only where a hook changed it; else the Trainer's own number holds, also a new one.
    run.flow.accumulate = checkpoint.get("flow", {}).get("accumulate", run.flow.accumulate)
    run.switched = checkpoint.get("flow", {}).get("switched", {})
    run.load_data_state(checkpoint["data"])
    if "datamodule" in checkpoint and hasattr(run.datamodule, "load_state_dict"):
        run.datamodule.load_state_dict(checkpoint["datamodule"])
    _restore_callbacks(run, checkpoint["callbacks"])
    run.metrics.load_state_dict(checkpoint["metrics"])
    run.history.load(_unpacked(checkpoint["history"]))


def _packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the rows of a history as one tensor for each name, as every save writes them all.

    "rows" is their number, "values" holds the columns, and "at" the numbers of the rows that have
    the name, where not all do.
    """
    names: dict[str, Any] = {}
    for row in rows:
        names.update(row)
    columns: dict[str, Any] = {}
    at: dict[str, Tensor] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if len(values) < len(rows):
            at[name] = torch.tensor([i for i, row in enumerate(rows) if name in row])
        columns[name] = values
        for kind, dtype in ((float, torch.float64), (int, torch.int64)):
            with contextlib.suppress(OverflowError, ValueError):  # an int of more than 64 bits
                if set(map(type, values)) == {kind}:
                    columns[name] = torch.tensor(values, dtype=dtype)
    return {"rows": len(rows), "values": columns, "at": at}


def _unpacked(saved: Any) -> list[dict[str, Any]]:
    """Returns what `_packed` was given; the oldest files hold the rows themselves."""
    if isinstance(saved, list):
        return saved
    rows: list[dict[str, Any]] = [{} for _ in range(saved["rows"])]
    for name, column in saved["values"].items():
        values = column.tolist() if isinstance(column, Tensor) else column
        for row, value in zip(saved["at"].get(name, range(len(rows))), values, strict=True):
            rows[int(row)][name] = value
    return rows


def _callback_states(run: FitRun) -> dict[str, Any]:
    """Returns the states of all callbacks that have one, by their keys."""
    states: dict[str, Any] = {}
    for callback in run.callbacks:
        state = callback.state_dict()
        if not state:
            continue
        if callback.state_key in states:
            raise ConfigError(
                f"Two callbacks store their state under the key {callback.state_key!r}. Give them "
                f"different arguments, override state_key in their class "
                f"({type(callback).__qualname__}), or remove one."
            )
        states[callback.state_key] = state
    return states


def _restore_callbacks(run: FitRun, states: Mapping[str, Any]) -> None:
    """Gives every callback its state, and says which states nobody took."""
    keys = {callback.state_key for callback in run.callbacks}
    for callback in run.callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
    for key in sorted(set(states) - keys):
        _log.warning(
            "The checkpoint holds the state of a callback %r that this run does not have.%s "
            "It is ignored; add the callback with the same arguments to continue it.",
            key,
            did_you_mean(key, keys),
        )


@functools.cache
def _version() -> str:
    """Returns the version of lightkit that is installed."""
    try:
        return importlib.metadata.version("lightkit")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0+checkout"
