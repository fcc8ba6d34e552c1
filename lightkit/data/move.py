"""Batches of any nesting: to a device, and how many samples they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Device, non_blocking, dtype, memory_format.
_How: TypeAlias = "tuple[torch.device | str, bool, torch.dtype | None, torch.memory_format | None]"
_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None)))


def move_to_device(
    batch: Any,
    device: torch.device | str,
    *,
    non_blocking: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> Any:
    """Returns ``batch`` with all its tensors on ``device``.

    Goes through tuples, named tuples, lists, mappings and dataclasses (frozen ones too), in any
    nesting. Objects with a ``to`` method are moved by it. Everything else is returned as it is.
    The input is never changed; a container in which nothing changed is returned itself.

    Args:
        batch: What a loader gave.
        device: Where to.
        non_blocking: Copies from pinned memory need not be waited for.
        dtype: Floating-point tensors are cast to it, those of a ``PackedSequence`` included;
            objects with their own ``to`` are only moved.
        memory_format: Floating-point tensors with four dimensions are laid out so.
    """
    return _move(batch, (device, non_blocking, dtype, memory_format))


def _move(batch: Any, how: _How) -> Any:
    kind = type(batch)
    if kind is Tensor:
        return _move_tensor(batch, how)
    if kind in _PLAIN:
        return batch
    if kind is tuple or kind is list:
        moved = [_move(item, how) for item in batch]
        for new, old in zip(moved, batch, strict=True):
            if new is not old:
                return moved if kind is list else tuple(moved)
        return batch
    if kind is dict:
        found = {key: _move(item, how) for key, item in batch.items()}
        for key, old in batch.items():
            if found[key] is not old:
                return found
        return batch
    return _move_other(batch, how)


def _move_tensor(tensor: Tensor, how: _How) -> Tensor:
    """Moves one tensor, and casts it and lays it out where it is of a floating type."""
    device, non_blocking, dtype, memory_format = how
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(device, dtype, non_blocking=non_blocking)
    else:
        tensor = tensor.to(device, non_blocking=non_blocking)
    if memory_format is not None and tensor.dim() == 4 and tensor.is_floating_point():
        tensor = tensor.contiguous(memory_format=memory_format)
    return tensor


def _move_other(batch: Any, how: _How) -> Any:
    """Moves what is not of the four most frequent types."""
    device, non_blocking, dtype, _ = how
    if isinstance(batch, Tensor):
        return _move_tensor(batch, how)
    if isinstance(batch, PackedSequence):
        packed: Any = batch  # torch types its ``to`` more narrowly than it works
        cast = dtype if dtype is not None and packed.data.is_floating_point() else packed.data.dtype
        return packed.to(device, cast, non_blocking)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return batch.to(device)
    return with_members(batch, lambda item: _move(item, how))


def with_members(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a container with its members changed; itself where none is, or it has none."""
    items = members_of(batch)
    if items is None:
        return batch
    changed = {key: change(item) for key, item in items}
    if all(changed[key] is item for key, item in items):
        return batch
    return rebuilt(batch, changed)


def members_of(batch: Any) -> list[tuple[Any, Any]] | None:
    """The keys and members of a container, None for what is none."""
    if isinstance(batch, Mapping):
        return list(batch.items())
    if isinstance(batch, (tuple, list)):
        return list(enumerate(batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        # A field with init=False may have no value yet.
        return [(f.name, getattr(batch, f.name)) for f in fields(batch) if hasattr(batch, f.name)]
    return None


def rebuilt(batch: Any, members: dict[Any, Any]) -> Any:
    """A container like ``batch`` with other members; the constructor of a user's class is spared."""
    if isinstance(batch, tuple):
        values = list(members.values())
        make = getattr(type(batch), "_make", None)  # only named tuples have it
        return type(batch)(values) if make is None else make(values)
    if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
        return type(batch)(members)  # type: ignore[call-arg]
    clone = copy.copy(batch)
    if isinstance(batch, MutableMapping):
        clone.update(members)
    elif isinstance(batch, list):
        clone[:] = members.values()
    else:
        for name, value in members.items():
            object.__setattr__(clone, name, value)  # frozen dataclasses allow no other way
    return clone


def batch_size_of(batch: Any) -> int | None:
    """Returns the number of samples in ``batch``, or None where it cannot be told for sure.

    It is the size of dimension 0, if all tensors of the batch agree on it (those without a
    dimension apart). None if they do not, if there is no tensor, or if there is an object with a
    ``to`` method that may hold others. Give ``batch_size`` to ``self.log`` there.

    A loader's own sample counts (`lightkit.data.sample_counts`) are better where they exist: no
    rule can tell a list of equally large images from a list of inputs and targets.
    """
    if type(batch) in (tuple, list) and len(batch) == 2:  # inputs and targets: the usual batch
        one, two = batch
        if type(one) is Tensor and type(two) is Tensor and one.ndim and two.ndim:
            size = one.shape[0]
            return size if size == two.shape[0] else None
    found: set[int | None] = set()
    _collect_sizes(batch, found)
    return found.pop() if len(found) == 1 else None


def _collect_sizes(batch: Any, found: set[int | None]) -> None:
    """Adds the first dimension of each tensor; None for what cannot be looked into."""
    if isinstance(batch, Tensor):
        if batch.dim():
            found.add(batch.size(0))
    elif type(batch) in _PLAIN:
        return
    elif isinstance(batch, PackedSequence):
        found.add(int(batch.batch_sizes[0]))  # always on the CPU: no sync
    else:
        items = members_of(batch)
        if items is not None:
            for _, item in items:
                _collect_sizes(item, found)
        elif callable(getattr(batch, "to", None)):
            found.add(None)
