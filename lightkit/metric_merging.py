"""torchmetrics objects over several ranks: their states are gathered at once, merged and computed.

torchmetrics would gather each state of each metric by itself, two or three collectives each; here
one collective brings the states of all of them. They are merged by their own reductions, and the
metric computes from what one process would have; then it gets its own states back.

Some attributes of torchmetrics used here are not public. A metric that lacks one, or that brings a
way of its own to synchronise, computes over the ranks by itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightkit import metric_objects
from lightkit.columns import Column
from lightkit.distributed import Ranks
from lightkit.errors import LoggingError, ranks_named
from lightkit.readings import read

_ATTRIBUTES = ("_reductions", "_to_sync", "_is_synced")
#: torchmetrics' reductions by the names of their functions.
_KINDS = {f"dim_zero_{kind}": kind for kind in ("sum", "mean", "max", "min", "cat")}
_NONE = object()


def compute(columns: Sequence[Column], ranks: Ranks, what: str, *, silent: bool = False) -> None:
    """Gives columns of metric objects their totals over all ranks. One collective for all.

    Args:
        columns: Columns with the same names on all ranks, in any order.
        ranks: The processes of the run.
        what: What they belong to, for messages.
        silent: Whether another rank has seen the same batches, so that this one does not count.

    Raises:
        LoggingError: On all ranks, for a metric that cannot be merged where a rank lacks it; and
            for one that gives no single number.
    """
    metrics = sorted((c for c in columns if c.by_metric), key=lambda column: column.name)
    for column, value in zip(metrics, values(metrics, ranks, what, silent=silent), strict=True):
        if value is not None:
            column.total = value
        column.stash = None


def values(
    columns: Sequence[Column], ranks: Ranks, what: str, *, silent: bool = False
) -> list[float | None]:
    """Returns what `compute` makes totals of; None for metrics that have seen nothing."""
    found = {c.name: _alone(c) for c in columns if c.alone}
    shared = [column for column in columns if not column.alone]
    if shared:
        copies: dict[int, Any] = {}
        own = [(column.name, _part(column, copies, silent)) for column in shared]
        sent = ranks.gather(own, f"metric objects of {what}")
        names = [[name for name, _ in one] for one in sent]
        if any(one != names[0] for one in names):
            raise LoggingError(f"The ranks logged different metric objects ({what}): {names}.")
        parts = [[part for _, part in one] for one in sent]
        tensors = [_value(c, list(of_all)) for c, *of_all in zip(shared, *parts, strict=True)]
        numbers = iter(read([value for value in tensors if value is not None]))  # host sync
        here = [None if value is None else next(numbers) for value in tensors]
        if any(part is None or part["own"] for one in parts for part in one):
            # Collective: a rank that lacks an object, or a metric that synchronises by itself, of
            # which nobody knows whether all ranks got the same.
            everywhere = ranks.gather(here, f"values of metric objects of {what}")
            here = [_first(of_all) for of_all in zip(*everywhere, strict=True)]
        found |= dict(zip([column.name for column in shared], here, strict=True))
    return [found[column.name] for column in columns]


def stashed(metric: Any) -> dict[str, Any]:
    """Returns the states of a metric and of those within it, as they stay when it is reset."""
    return {
        name: {
            "updates": one.update_count,
            "values": {
                key: list(value) if isinstance(value, list) else value
                for key, value in _states(one).items()
            },
        }
        for name, one in _tree(metric).items()
    }


def merged_states(
    states: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], *, going_on: bool
) -> tuple[dict[str, Any], list[str]]:
    """Returns the states of metrics by name, merged over what several ranks had.

    Args:
        states: For each rank what `metric_objects.states` returned.
        metrics: The metrics by their names.
        going_on: Whether the metrics are to be updated further, which only some states allow.

    Returns:
        The merged states, in the same form, and the names of metrics that could not be merged; of
        these the first rank's states are there.
    """
    merged, failed = {}, []
    for name, metric in metrics.items():
        parts = [one[name] for one in states if one.get(name, {}).get("updates")]
        if not parts:
            continue
        merged[name] = parts[0]
        if len(parts) == 1:
            continue
        reductions = metric._reductions
        values = parts[0]["values"]
        if going_on and not all(_continues(reductions[key], values[key]) for key in values):
            failed.append(name)
            continue
        updates = [part["updates"] for part in parts]
        joined = {
            key: _merge(reductions[key], [part["values"][key] for part in parts], updates)
            for key in values
        }
        merged[name] = {"updates": sum(updates), "values": joined}
    return merged, failed


def _tree(metric: Any) -> dict[str, Any]:
    """Returns a metric and the metrics within it, by their names in it."""
    return {
        name: module
        for name, module in metric.named_modules()
        if metric_objects.is_metric(module) and not metric_objects.is_collection(module)
    }


def _states(metric: Any) -> dict[str, Any]:
    return {key: getattr(metric, key) for key in metric._defaults}


def _mergeable(metric: Any) -> bool:
    """Tells whether the states of a metric can be merged here; else it does so by itself."""
    base = sys.modules["torchmetrics"].Metric
    return all(
        all(hasattr(one, name) for name in _ATTRIBUTES)
        and one._reductions.keys() == one._defaults.keys()
        and one.dist_sync_fn is None
        and one.process_group is None
        and all(getattr(type(one), f) is getattr(base, f) for f in ("sync", "unsync", "_sync_dist"))
        for one in _tree(metric).values()
    )


def _part(column: Column, copies: dict[int, Any], silent: bool) -> dict[str, Any] | None:
    """Returns what a rank sends of a metric object; None where it has none."""
    if column.metric is None:
        return None
    if column.stash is None:
        tree = _tree(column.metric)
        states = {n: {"updates": m.update_count, "values": _states(m)} for n, m in tree.items()}
    else:
        states = column.stash
    states = {name: state for name, state in states.items() if state["updates"]}
    seen = bool(states)
    if not _mergeable(column.metric):
        return {"own": True, "seen": seen, "states": {}}
    if silent:
        return {"own": False, "seen": False, "states": {}}
    packed = {
        name: {
            "updates": state["updates"],
            "values": {key: _packed(value, copies) for key, value in state["values"].items()},
        }
        for name, state in states.items()
    }
    return {"own": False, "seen": seen, "states": packed}


def _value(column: Column, parts: Sequence[dict[str, Any] | None]) -> Tensor | None:
    """Returns the metric over what all ranks sent; None for no update, or without the object."""
    metric = column.metric
    there = [part for part in parts if part is not None]
    if any(part["own"] for part in there):
        if lack := [rank for rank, part in enumerate(parts) if part is None]:
            raise LoggingError(
                f"self.log({column.name!r}): {ranks_named(lack)} had no batch and does not know the "
                f"metric object, which synchronises by itself. Keep it as an attribute of the "
                f"task, so that every rank has it."
            )
        return _by_itself(column) if any(part["seen"] for part in there) else None
    if metric is None or not any(part["seen"] for part in there):
        return None
    states = [
        {
            name: {**state, "values": {k: _unpacked(v) for k, v in state["values"].items()}}
            for name, state in part["states"].items()
        }
        for part in there
    ]
    merged, _ = merged_states(states, _tree(metric), going_on=False)
    with _holding(metric, merged):
        return metric_objects.compute_now(column.name, metric)


def _by_itself(column: Column) -> Tensor | None:
    """Lets a metric compute over the ranks by itself. Its own collectives, the same on all ranks."""
    with _holding(column.metric, column.stash, sync=True):
        for one in _tree(column.metric).values():
            one._update_count = max(one.update_count, 1)  # a rank without a batch takes part too
        return metric_objects.compute_now(column.name, column.metric)


def _alone(column: Column) -> float | None:
    """Returns a metric of rank zero alone, without the others."""
    with _holding(column.metric, column.stash):
        value = metric_objects.compute_now(column.name, column.metric)
    return None if value is None else read([value])[0]  # host sync


@contextlib.contextmanager
def _holding(
    metric: Any, states: Mapping[str, Any] | None, *, sync: bool = False
) -> Iterator[None]:
    """Lets a metric compute from other states, and puts its own back.

    Args:
        metric: The metric, with those within it.
        states: For each of them "updates" and "values"; those that are missing have seen nothing.
            None for its own.
        sync: Whether it shall synchronise over the ranks by itself.
    """
    tree = _tree(metric)
    kept = {
        name: (_states(one), one._update_count, getattr(one, "_to_sync", True))
        for name, one in tree.items()
    }
    try:
        for name, one in tree.items():
            one._to_sync, one._computed = one._to_sync and sync, None
            if states is None:
                continue
            state = states.get(name) or {"updates": 0, "values": copy.deepcopy(one._defaults)}
            one._update_count = state["updates"]
            for key, value in state["values"].items():
                listed = isinstance(one._defaults[key], list)
                device = torch.device("cpu") if listed and one.compute_on_cpu else one.device
                setattr(one, key, metric_objects.on_device(device, value))
        yield
    finally:
        for name, one in tree.items():
            states_before, one._update_count, one._to_sync = kept[name]
            for key, value in states_before.items():
                setattr(one, key, value)
            one._computed = None


def _first(values: Sequence[float | None]) -> float | None:
    """Returns the value of the first rank that has one."""
    return next((value for value in values if value is not None), None)


def _continues(reduction: Any, value: Any) -> bool:
    """Tells whether a merged state can be updated further."""
    return _name_of(reduction) in _KINDS or (reduction is None and isinstance(value, list))


def _name_of(reduction: Any) -> str:
    return str(getattr(reduction, "__name__", ""))


def _merge(reduction: Any, values: Sequence[Any], updates: Sequence[int]) -> Any:
    """Returns one state of a metric over ranks that have all seen something.

    Sums of whole numbers are exact; others are made in 64 bit, in the order of ranks, so that all
    ranks have the same bits.
    """
    kind, first = _KINDS.get(_name_of(reduction)), values[0]
    if isinstance(first, list):
        items = _in_turn(values, updates)
        return items if kind == "cat" or reduction is None else reduction(items)
    if kind == "sum":
        return _added(values, first)
    if kind == "mean":  # each rank counts by its updates, as batches do in one process
        shares = [value.double() * count for value, count in zip(values, updates, strict=True)]
        mean = _added(shares, shares[0]) / sum(updates)
        return mean.to(first.dtype) if first.is_floating_point() else mean.to(torch.float32)
    if kind in ("max", "min"):
        pick: Callable[[Tensor, Tensor], Tensor] = torch.maximum if kind == "max" else torch.minimum
        return functools.reduce(pick, values)
    if kind == "cat":
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    stacked = torch.stack(list(values))  # as torchmetrics gives it to a function of the metric's
    return stacked if reduction is None else reduction(stacked)


def _added(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Returns the sum of tensors, one after the other, in the type of ``like``."""
    if like.dtype == torch.bool:
        return functools.reduce(torch.add, [value.long() for value in values])
    if like.is_complex():
        return functools.reduce(torch.add, values)
    wide = torch.float64 if like.is_floating_point() else torch.int64
    return functools.reduce(torch.add, [value.to(wide) for value in values]).to(like.dtype)


def _in_turn(lists: Sequence[list[Any]], updates: Sequence[int]) -> list[Any]:
    """Returns the items of the ranks' lists; in the order of batches where each has one for each."""
    if any(len(one) != count for one, count in zip(lists, updates, strict=True)):
        return list(itertools.chain.from_iterable(lists))
    turns = itertools.zip_longest(*lists, fillvalue=_NONE)
    return [item for turn in turns for item in turn if item is not _NONE]


def _packed(value: Any, copies: dict[int, Any]) -> Any:
    """Returns a state as it is sent: on the CPU, lists of tensors as one tensor with their sizes.

    What several metrics share, as those of a group in a collection do, is sent once.
    """
    key = id(value)
    if key not in copies:
        copies[key] = (_sent(value), value)  # with the original, so that no other gets its id
    return copies[key][0]


def _sent(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _small(value)
    if not isinstance(value, list):
        return value
    if len(value) > 1 and all(isinstance(item, Tensor) and item.ndim for item in value):
        if len({(item.dtype, item.shape[1:], item.device) for item in value}) == 1:
            return {"joined": _small(torch.cat(value)), "sizes": [len(item) for item in value]}
    return [_small(item) if isinstance(item, Tensor) else item for item in value]


def _small(tensor: Tensor) -> Tensor:
    """Returns a copy on the CPU; of a part of a larger tensor only the part. Host sync."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value["joined"].split(value["sizes"]))
    return value
