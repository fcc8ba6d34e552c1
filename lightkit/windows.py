"""Values that were logged and not read yet, as a checkpoint of several ranks holds them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightkit import metric_merging

_log = logging.getLogger("lightkit")
#: A window without a value.
EMPTY: dict[str, Any] = {"values": [], "weights": []}
_NONE = object()


def of_one_process(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the own part of the only process, as the oldest files have it among the rest."""
    return {
        "windows": {saved["name"]: saved for saved in state["columns"]},
        "loss": state["loss"],
        "loss_steps": state["loss_steps"],
        "objects": state["objects"],
    }


def merged(states: Sequence[dict[str, Any]], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the own parts of several ranks of before as that of one rank."""
    if len(states) == 1:
        return states[0]
    windows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for state in states for name in state["windows"]):
        windows[name] = _joined([state["windows"].get(name, EMPTY) for state in states])
    objects, failed = metric_merging.merged_states(
        [state["objects"] for state in states], metrics, going_on=True
    )
    if failed:
        _log.warning(
            "The checkpoint was written by more processes than there are now, and the states of "
            "%s cannot be merged and updated further: for this epoch they count only a part of "
            "the batches before the checkpoint.",
            ", ".join(failed),
        )
    return {
        "windows": windows,
        "loss": _joined([state["loss"] for state in states]),
        "loss_steps": _in_turn([state["loss_steps"] for state in states]),
        "objects": objects,
    }


def _joined(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: _in_turn([window[key] for window in windows]) for key in EMPTY}


def _in_turn(lists: Sequence[list[Any]]) -> list[Any]:
    """Returns the items of all ranks in the order of batches, which came to the ranks in turn."""
    turns = itertools.zip_longest(*lists, fillvalue=_NONE)
    return [item for turn in turns for item in turn if item is not _NONE]
