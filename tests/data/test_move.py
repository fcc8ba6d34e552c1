from __future__ import annotations

import collections
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightkit.data import batch_size_of, move_to_device

# The "meta" device stands for a second device: tensors really change when they go there.
META = torch.device("meta")


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Sample:
    x: torch.Tensor
    name: str = "a"
    derived: Any = field(init=False)

    def __post_init__(self) -> None:
        self.derived = self.x * 2


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    n: int = 3


class Encoding(collections.UserDict):
    """Like a tokenizer's output: a mapping with its own ``to``."""

    def to(self, device: Any) -> Encoding:
        return Encoding({k: v.to(device) for k, v in self.items()})


class Graph:
    """An object of which only ``to`` is known."""

    def __init__(self, nodes: torch.Tensor) -> None:
        self.nodes = nodes

    def to(self, device: Any) -> Graph:
        return Graph(self.nodes.to(device))


def x(*shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 3)))


def tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, collections.abc.Mapping):
        batch = list(batch.values())
    elif isinstance(batch, Graph):
        batch = [batch.nodes]
    elif isinstance(batch, (Sample, Frozen)):
        batch = [getattr(batch, name) for name in type(batch).__dataclass_fields__]
    return [t for item in batch for t in tensors(item)] if isinstance(batch, (list, tuple)) else []


@pytest.mark.parametrize(
    "batch",
    [
        x(),
        (x(), x(2)),
        [x(), [x(2), "text"]],
        {"x": x(), "more": {"y": x(2), "n": 3}},
        collections.OrderedDict(b=x(), a=x(2)),
        collections.defaultdict(list, x=x()),
        MappingProxyType({"x": x()}),
        Pair(x(), x(2)),
        Sample(x()),
        Frozen(x()),
        Encoding(ids=x(), mask=x()),
        Graph(x()),
        ([{"x": Pair(x(), Frozen(x()))}], None),
        torch.max(x(), dim=0),
    ],
    ids=lambda b: type(b).__name__,
)
def test_every_tensor_moves_and_the_type_stays(batch: Any) -> None:
    before = tensors(batch)
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert len(tensors(moved)) == len(before) > 0
    assert all(t.device == META for t in tensors(moved))
    assert all(t.device.type == "cpu" for t in tensors(batch)), "the input was changed"


def test_a_tensor_of_a_users_class_moves() -> None:
    class Image(torch.Tensor):
        pass

    image = torch.zeros(2).as_subclass(Image)
    assert type(move_to_device([image], META)[0]) is Image
    assert move_to_device([torch.nn.Parameter(x())], META)[0].device == META


def test_members_that_are_no_tensors_survive() -> None:
    moved = move_to_device({"x": x(), "name": ["a", 1, None], "set": {1}}, META)
    assert moved["name"] == ["a", 1, None]
    assert moved["set"] == {1}
    sample = Sample(x(), name="b")
    moved = move_to_device(sample, META)
    assert moved.name == "b"
    assert moved.derived.device == META
    assert move_to_device(collections.defaultdict(list, x=x()), META).default_factory is list


def test_a_dataclass_field_without_a_value_stays_without() -> None:
    sample = Sample(x())
    del sample.derived
    assert not hasattr(move_to_device(sample, META), "derived")


def test_packed_sequence_moves_and_casts() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    assert move_to_device(packed, META).data.device == META
    cast = move_to_device(packed, "cpu", dtype=torch.float64)
    assert cast.data.dtype == torch.float64
    assert cast.batch_sizes.dtype == torch.int64
    whole = pack_sequence([torch.tensor([1, 2])])
    assert move_to_device(whole, "cpu", dtype=torch.float64).data.dtype == torch.int64


def test_dtype_casts_floating_tensors_only() -> None:
    batch = {"x": x(), "y": torch.tensor([1, 2]), "m": torch.tensor([True])}
    cast = move_to_device(batch, "cpu", dtype=torch.bfloat16)
    assert cast["x"].dtype == torch.bfloat16
    assert cast["y"] is batch["y"]
    assert cast["m"] is batch["m"]
    assert batch["x"].dtype == torch.float32


@pytest.mark.parametrize(
    "batch",
    [x(), (x(), 1), [x()], {"x": x()}, Pair(x(), x()), Sample(x()), "text", 3, None, object()],
    ids=lambda b: type(b).__name__,
)
def test_what_is_in_place_is_returned_itself(batch: Any) -> None:
    assert move_to_device(batch, "cpu") is batch


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (x(5, 2), 5),
        ((x(5, 2), x(5)), 5),
        ({"x": x(5), "scale": torch.tensor(2.0), "names": ["a"] * 3}, 5),
        (Frozen(x(4)), 4),
        (pack_sequence([x(3, 2), x(1, 2)]), 2),
        (Encoding(ids=x(4, 2)), 4),
        ((x(5), x(4)), None),
        ([x(5), [x(5), x(1)]], None),
        (torch.tensor(1.0), None),
        ("text", None),
        ([], None),
        ((x(5), Graph(x(9))), None),
    ],
)
def test_batch_size_is_told_only_where_all_agree(batch: Any, size: int | None) -> None:
    assert batch_size_of(batch) == size
