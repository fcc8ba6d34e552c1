"""What may be stored: plain types and tensors, so that every file loads with ``weights_only=True``.

What torch would refuse at load time is converted, or refused with its key path, at save time.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.errors import CheckpointError

#: The one key of the mapping that stands for a constructor argument that cannot be stored.
PLACEHOLDER = "__lightkit_placeholder__"

#: Types that torch stores and loads as they are.
_PLAIN: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, bytearray),
        *(torch.Size, torch.dtype, torch.device, torch.layout),
    }
)
#: A subclass of these is stored as the plain type.
_BASES: tuple[Any, ...] = (int, float, complex, str, bytes)
_MAX_DEPTH = 100


class _RefusedError(Exception):
    """Something that cannot be stored; collects its keys while it passes through containers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.keys: list[str] = []


def storable(obj: Any, where: str = "") -> Any:
    """Returns ``obj`` as plain types and tensors, the same object where nothing is to be done.

    Converted: numpy arrays (tensors) and scalars, paths (str), dataclasses, namespaces and other
    mappings (dict), enums (their value), named tuples (tuple), frozensets (set), deques, ranges and
    other sequences (list), tensor subclasses (tensor). Tuples stay tuples, and an ``OrderedDict``
    stays one, with the version notes that torch keeps on a ``state_dict``.

    Args:
        obj: What is to be stored.
        where: What it is called in an error message.

    Raises:
        CheckpointError: Something cannot be stored; the message says where it is and what it is.
    """
    try:
        return _convert(obj, 0)
    except _RefusedError as refused:
        path = ".".join(key for key in (where, *reversed(refused.keys)) if key)
        raise CheckpointError(
            f"{path or 'This object'} cannot be stored: {refused.reason}. A checkpoint holds "
            f"tensors, numbers, strings, lists, tuples and dicts only; store what the object is "
            f"made of, or leave it out."
        ) from None


def storable_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns constructor arguments as they are stored.

    An argument that cannot be stored (a network, a factory) becomes a placeholder that names its
    type; ``load_from_checkpoint`` asks for it.
    """
    stored: dict[str, Any] = {}
    for name, value in hparams.items():
        try:
            stored[str(name)] = _convert(value, 0)
        except _RefusedError:
            stored[str(name)] = {PLACEHOLDER: _type_name(value)}
    return stored


def placeholder_type(value: Any) -> str | None:
    """Returns the type name that a placeholder stands for, or None for any other value."""
    if isinstance(value, dict) and value.keys() == {PLACEHOLDER}:
        return str(value[PLACEHOLDER])
    return None


def reference(value: Any) -> str | None:
    """Returns ``module.Name`` of a class or function that has a name; None for any other value."""
    local = "<" in getattr(value, "__qualname__", "<")  # lambdas, and what a function has made
    return None if local else _type_name(value)


def _type_name(value: Any) -> str:
    """Returns ``module.Name`` of a class or function, or of the type of any other value."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"


def _convert(obj: Any, depth: int) -> Any:
    """Returns ``obj`` converted, or raises `_RefusedError`."""
    kind = type(obj)
    if kind in _PLAIN:
        return obj
    if depth > _MAX_DEPTH:
        raise _RefusedError(f"it is nested deeper than {_MAX_DEPTH} levels, or contains itself")
    if isinstance(obj, Tensor):
        return _tensor(obj)
    if kind in (list, tuple):
        return kind(_items(obj, depth))
    if isinstance(obj, enum.Enum):
        return _convert(obj.value, depth + 1)
    converted = _numpy(obj, depth)
    if converted is not None:
        return converted
    for base in _BASES:
        if isinstance(obj, base):
            return base(obj)
    if isinstance(obj, PurePath):
        return str(obj)
    if isinstance(obj, (nn.Module, type)):
        raise _RefusedError(f"it is {_described(obj)}")
    return _container(obj, depth)


def _container(obj: Any, depth: int) -> Any:
    """Converts mappings, sets, sequences and objects that are mere bags of fields."""
    if isinstance(obj, Counter):
        return Counter(_pairs(obj, depth))
    if isinstance(obj, OrderedDict):
        ordered = OrderedDict(_pairs(obj, depth))
        metadata = getattr(obj, "_metadata", None)
        if metadata is not None:
            # torch hangs the versions of a state_dict on it as an attribute; loading needs them.
            ordered._metadata = _convert(metadata, depth + 1)  # type: ignore[attr-defined]
        return ordered
    if isinstance(obj, Mapping):
        return _pairs(obj, depth)
    if isinstance(obj, Set):
        return {_key(item) for item in obj}
    if isinstance(obj, tuple):
        return tuple(_items(obj, depth))
    if isinstance(obj, (deque, range, Sequence)):
        return _items(obj, depth)
    if dataclasses.is_dataclass(obj):
        fields = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
        return _pairs(fields, depth)
    # By name: argparse and jsonargparse each have a Namespace, and neither is imported here.
    if isinstance(obj, types.SimpleNamespace) or type(obj).__name__ == "Namespace":
        return _pairs(vars(obj), depth)
    raise _RefusedError(f"it is {_described(obj)}")


def _items(obj: Any, depth: int) -> list[Any]:
    """Converts the items of a sequence."""
    converted: list[Any] = []
    for item in obj:
        try:
            converted.append(_convert(item, depth + 1))
        except _RefusedError as refused:
            refused.keys.append(f"[{len(converted)}]")
            raise
    return converted


def _pairs(obj: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
    """Converts keys and values of a mapping."""
    converted: dict[Any, Any] = {}
    for key, value in obj.items():
        try:
            stored = _key(key)
            if stored in converted:
                raise _RefusedError(f"two of its keys are both stored as {stored!r}")
            converted[stored] = _convert(value, depth + 1)
        except _RefusedError as refused:
            refused.keys.append(str(key))
            raise
    return converted


def _key(key: Any) -> Any:
    """Converts a key of a mapping or a member of a set, which must stay hashable."""
    converted = _convert(key, 0)
    try:
        hash(converted)
    except TypeError:
        raise _RefusedError(f"as a key or a member of a set it is {_described(key)}") from None
    if isinstance(converted, Tensor):
        raise _RefusedError(
            "a tensor is a key or a member of a set, which is lost when it is stored"
        )
    return converted


def _tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor that torch stores without its class, graph and foreign memory."""
    if nn.parameter.is_lazy(tensor):
        raise _RefusedError("it is a lazy parameter without a shape yet; run one batch first")
    if tensor.device.type == "meta":
        raise _RefusedError("it is a tensor on the meta device, which has no values")
    if hasattr(tensor, "__tensor_flatten__"):
        raise _RefusedError(f"it is {_described(tensor)}, which is made of other tensors")
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.__dict__:
        tensor = tensor.detach().as_subclass(Tensor)
    if tensor.layout == torch.strided:
        # torch.save writes the whole storage: one row of a large table would store the table.
        used = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() > 2 * used + 1024:
            tensor = tensor.to("cpu", copy=True)
    return tensor


def _numpy(obj: Any, depth: int) -> Any:
    """Converts a NumPy array or scalar; None for anything else."""
    numpy = sys.modules.get("numpy")  # not imported: then obj is nothing of NumPy's
    if numpy is None or not isinstance(obj, (numpy.ndarray, numpy.generic)):
        return None
    if obj.dtype.kind in "OSU":  # objects and strings: no tensor holds them
        return _convert(obj.tolist(), depth + 1)
    if obj.dtype.kind not in "biufc":
        raise _RefusedError(f"it is a NumPy value of type {obj.dtype}, which no tensor can hold")
    if isinstance(obj, numpy.generic):
        item = obj.item()
        if type(item) in _PLAIN:
            return item
    try:
        return torch.from_numpy(obj.astype(obj.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise _RefusedError(f"it is a NumPy array of type {obj.dtype} ({error})") from None


def _described(obj: Any) -> str:
    """Returns what an object is, for an error message."""
    if isinstance(obj, type):
        return f"the class {_type_name(obj)}"
    if hasattr(obj, "__qualname__"):
        return f"the function {_type_name(obj)}"
    return f"an object of type {_type_name(obj)}"
