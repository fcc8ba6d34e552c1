"""Gives out what a checkpoint holds as this rank takes it: parts where it has parts, else whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit.checkpoint.sharded import Piece, is_part, whole
from lightkit.distributed.meta import fill_part

if TYPE_CHECKING:
    from torch.optim import Optimizer


def settled(contents: Any, task: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Returns a checkpoint as a run takes it: parts where the run has parts, all else whole.

    Args:
        contents: What was read, be it a folder or a file.
        task: The task of the run.
        optimizers: Its optimizers.
    """
    contents["lightkit"].pop("pieces", None)
    done = {
        "model": placed(contents["model"], task.state_dict()),
        "optimizers": placed_states(contents["optimizers"], optimizers),
    }
    return {name: done[name] if name in done else whole(inner) for name, inner in contents.items()}


def placed(weights: Mapping[str, Any], own: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Returns weights as a module takes them: its part where it has parts, else whole.

    Args:
        weights: Tensors or pieces by name.
        own: The module's state. What has another shape there stays a tensor without memory, of
            which only the shape is looked at.
    """

    def change(name: str, value: Any) -> Any:
        target = own.get(name)
        if not isinstance(value, (Tensor, Piece)) or is_part(value):
            return value
        if not isinstance(target, Tensor) or target.shape != value.shape:
            return _only_shape(value) if isinstance(value, Piece) else value
        return _like(value, target)

    made = OrderedDict((name, change(name, value)) for name, value in weights.items())
    if isinstance(weights, OrderedDict):
        vars(made).update(vars(weights))
    return made


def placed_states(saved: Any, optimizers: Sequence[Optimizer]) -> Any:
    """Returns states of optimizers with tensors split as the parameters that they belong to."""
    made = []
    for one, optimizer in zip(saved, optimizers, strict=False):
        numbers = [number for group in one["param_groups"] for number in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        owners = dict(zip(numbers, parameters, strict=False))
        state = {
            number: _state(values, owners.get(number)) for number, values in one["state"].items()
        }
        made.append({**one, "state": state})
    return [*made, *map(whole, saved[len(made) :])]


def _state(values: Any, owner: Tensor | None) -> Any:
    if not isinstance(values, dict) or owner is None:
        return whole(values)
    return {
        name: _like(value, owner)
        if isinstance(value, (Tensor, Piece)) and value.shape == owner.shape
        else whole(value)
        for name, value in values.items()
    }


def _like(value: Tensor | Piece, target: Tensor) -> Tensor:
    """Returns a tensor as it is held here: this rank's part, or all of it."""
    if not is_part(target):
        return value if isinstance(value, Tensor) else value.whole()
    part = torch.empty_like(target, dtype=value.dtype, requires_grad=False)
    if isinstance(value, Piece):
        value.fill(part)
    else:
        fill_part(part, value)
    return part


def _only_shape(piece: Piece) -> Tensor:
    return torch.empty(piece.shape, dtype=piece.dtype, device="meta")
