"""What each rank of a run knows by itself: gathered for one file, and given out again from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightkit import rng
from lightkit.checkpoint.storable import storable
from lightkit.data import move_to_device
from lightkit.errors import CheckpointError

if TYPE_CHECKING:
    from lightkit.distributed import Ranks
    from lightkit.run import FitRun

T = TypeVar("T")


def part(run: FitRun) -> dict[str, Any]:
    """Returns what this rank alone knows of a run: random states, its data, its open windows."""
    # Those of the checkpoint that is continued, as long as they are not put back.
    state = rng.rng_state() if run.rng is None else run.rng
    return {
        "rng": state if run.strategy.world_size == 1 else with_own_card(state, run.device),
        "data": run.data_state(),
        "metrics": run.metrics.local_state(),
    }


def with_own_card(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns random states in which every card has that of this rank's one.

    A rank uses one card. On other machines that may be one of another number.
    """
    if device.type != "cuda" or "cuda" not in state:
        return state
    cards = state["cuda"]
    return {**state, "cuda": [cards[device.index or 0]] * len(cards)}


def gathered(ranks: Ranks, own: dict[str, Any], problem: Exception | None) -> list[dict[str, Any]]:
    """Returns the parts of all ranks, or raises on all of them what is wrong on one.

    Args:
        ranks: The processes of the run.
        own: The part of this one.
        problem: Why its state is not to be saved; None where nothing speaks against it.
    """
    if ranks.world_size == 1:
        if problem is not None:
            raise problem
        return [own]
    try:
        # Host sync: a card's tensors cannot be sent.
        own = move_to_device(storable(own, "checkpoint"), "cpu")
    except CheckpointError as error:
        problem = problem or error
    said = None if problem is None else (type(problem), str(problem))
    # A collective, once per save.
    found = ranks.gather((own if said is None else {}, said), "parts of a checkpoint")
    if problem is not None:
        raise problem
    for rank, (_, other) in enumerate(found):
        if other is not None:
            kind, text = other
            raise kind(f"rank {rank}: {text}")
    return [given for given, _ in found]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what a checkpoint holds of the parts of all ranks."""
    first, data = parts[0], [given["data"] for given in parts]
    return {
        "rng": [given["rng"] for given in parts],
        "data": first["data"] if len(parts) == 1 else {**first["data"], "ranks": data},
        "metrics": {"ranks": [given["metrics"] for given in parts]},
        "world_size": len(parts),
    }


def saved_ranks(checkpoint: dict[str, Any]) -> int:
    """Returns how many ranks a checkpoint was written by."""
    number: int = checkpoint.get("world_size", 1)  # not in the oldest files
    return number


def random_states(checkpoint: dict[str, Any], rank: int) -> dict[str, Any]:
    """Returns the random states with which a rank goes on from a checkpoint.

    A rank that was not there gets some that are made of rank zero's and its number.
    """
    states: list[dict[str, Any]] = checkpoint["rng"]
    return states[rank] if rank < len(states) else rng.derived(states[0], rank)


def counters(checkpoint: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Returns the counters of a checkpoint as they are with another number of ranks.

    Batches are counted by each rank for itself, so that twice as many ranks have done half as many.
    """
    loop, before = dict(checkpoint["loop"]), saved_ranks(checkpoint)
    if before != world_size:
        for name in ("batch_idx", "batches_before"):
            loop[name] = loop.get(name, 0) * before // world_size
    return loop


def on_every_rank(ranks: Ranks, call: Callable[[], T], what: str) -> T:
    """Makes a call on every rank that reads a file, and returns what it gave on this one.

    A collective. Where the call fails on one rank, all raise.

    Args:
        ranks: The processes.
        call: What each of them calls.
        what: What it is for, for people.

    Raises:
        CheckpointError: Another rank failed, while this one did not.
    """
    result: T | None = None
    problem: Exception | None = None
    try:
        result = call()
    except Exception as error:  # noqa: BLE001  # raised below, once all know of it
        problem = error
    said = ranks.gather(None if problem is None else f"{type(problem).__name__}: {problem}", what)
    bad = [rank for rank, text in enumerate(said) if text is not None]
    if len(bad) == ranks.world_size and problem is not None:
        raise problem
    if bad:
        raise CheckpointError(
            f"The {what} failed on {len(bad)} of {ranks.world_size} ranks. Every rank reads the "
            f"file, so its folder must be on a file system that all nodes share. Rank {bad[0]} "
            f"says: {said[bad[0]]}"
        ) from problem
    return result  # type: ignore[return-value]  # None only where the call gives that
