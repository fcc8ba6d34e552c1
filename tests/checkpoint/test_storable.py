from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import io
import logging
import pathlib
import types

import numpy as np
import pytest
import torch
from torch import nn

from lightkit.checkpoint.storable import (
    PLACEHOLDER,
    placeholder_type,
    storable,
    storable_hparams,
)
from lightkit.errors import CheckpointError


class Colour(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Options:
    lr: float
    folder: pathlib.Path


Point = collections.namedtuple("Point", "x y")


class Marked(torch.Tensor):
    pass


class Thing:
    pass


def roundtrip(obj):
    file = io.BytesIO()
    torch.save(storable(obj), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (pathlib.Path("a/b"), "a/b"),
        (Colour.RED, "red"),
        (Number.ONE, 1),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([1, None], dtype=object), [1, None]),
        (range(3), [0, 1, 2]),
        (collections.deque([1, 2]), [1, 2]),
        (frozenset({1, 2}), {1, 2}),
        ({1, 2}, {1, 2}),
        ((1, [2, (3,)]), (1, [2, (3,)])),
        (Point(1, 2), (1, 2)),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.Counter("aab"), collections.Counter("aab")),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (Options(0.1, pathlib.Path("x")), {"lr": 0.1, "folder": "x"}),
        (argparse.Namespace(a=1, b=argparse.Namespace(c=2)), {"a": 1, "b": {"c": 2}}),
        (types.SimpleNamespace(a=1), {"a": 1}),
        ({Colour.RED: 1, (1, pathlib.Path("p")): 2}, {"red": 1, (1, "p"): 2}),
        (2**100, 2**100),
        (b"ab", b"ab"),
        (1j, 1j),
        (None, None),
        (torch.float16, torch.float16),
        (torch.Size([1, 2]), torch.Size([1, 2])),
        (torch.device("cpu"), torch.device("cpu")),
        (float("inf"), float("inf")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_converted_and_loaded_safely(given, expected):
    loaded = roundtrip(given)
    assert loaded == expected
    assert type(loaded) is type(expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.arange(6.0)[::-2],
        np.arange(3, dtype=">f4"),
        np.array(1.5),
        np.array([True, False]),
        np.arange(3, dtype=np.uint32),
    ],
)
def test_arrays_become_tensors_of_their_own(array):
    tensor = roundtrip({"a": array})["a"]
    assert np.array_equal(tensor.numpy(), array)
    stored = storable(array)
    array.flags.writeable = False
    stored.zero_()
    assert array.any()


def test_plain_tensors_are_not_copied_and_shared_memory_stays_shared():
    weight = torch.randn(3)
    stored = storable({"a": weight, "b": weight})
    assert stored["a"] is weight
    loaded = roundtrip({"a": weight, "b": weight})
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def test_parameters_graphs_subclasses_and_attributes_are_left_behind():
    parameter = nn.Parameter(torch.ones(2))
    marked = torch.ones(2)
    marked.note = lambda: None  # would be pickled
    for tensor in (parameter, parameter * 2, torch.ones(2).as_subclass(Marked), marked):
        loaded = roundtrip(tensor)
        assert type(loaded) is torch.Tensor
        assert not loaded.requires_grad
        assert torch.equal(loaded, tensor.detach().as_subclass(torch.Tensor))


def test_a_row_of_a_large_table_does_not_store_the_table():
    file = io.BytesIO()
    torch.save(storable({"row": torch.zeros(1000, 1000)[3]}), file)
    assert file.tell() < 20_000


def test_a_state_dict_keeps_its_order_and_versions():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    stored = storable(net.state_dict())
    assert list(stored) == list(net.state_dict())
    assert stored._metadata["1"] == {"version": 2}
    nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).load_state_dict(roundtrip(net.state_dict()))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=5),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.StepLR(o, 2)],
            [2],
        ),
    ],
)
def test_optimizers_and_schedulers_go_on_as_if_nothing_happened(scheduler):
    def make():
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
        return net, optimizer, scheduler(optimizer)

    def step(net, optimizer, schedule):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule.step(*([1.0] if plateau else []))

    one, other = make(), make()
    step(*one)
    for mine, theirs in zip(one, other, strict=True):
        theirs.load_state_dict(roundtrip(mine.state_dict()))
    step(*one)
    step(*other)
    assert torch.equal(one[0].weight, other[0].weight)
    assert one[2].state_dict() == other[2].state_dict()


@pytest.mark.parametrize(
    ("given", "path", "what"),
    [
        ({"a": {"b": [0, lambda: 1]}}, r"state\.a\.b\.\[1\]", "the function .*<lambda>"),
        ({"a": Thing()}, r"state\.a", r"an object of type .*\.Thing"),
        ({"a": nn.ReLU}, r"state\.a", r"the class torch\.nn.*ReLU"),
        ({"a": nn.ReLU()}, r"state\.a", r"type torch\.nn.*ReLU"),
        ({"a": slice(1)}, r"state\.a", "slice"),
        ({"a": np.array(["2020-01-01"], dtype="M8[D]")}, r"state\.a", "datetime64"),
        ({"a": nn.LazyLinear(3).weight}, r"state\.a", "run one batch"),
        ({"a": torch.ones(1, device="meta")}, r"state\.a", "meta device"),
        ({"a": {torch.ones(1): 1}}, r"state\.a", "tensor is a key"),
        ({"a": {"x": 1, pathlib.Path("x"): 2}}, r"state\.a\.x", "both stored as 'x'"),
        ({"a": {frozenset({1}): 1}}, r"state\.a", "as a key"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_path(given, path, what):
    with pytest.raises(CheckpointError, match=rf"^{path}.* cannot be stored: .*{what}"):
        storable(given, "state")


def test_a_structure_that_contains_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="contains itself"):
        storable({"loop": loop})


def test_constructor_arguments_that_cannot_be_stored_become_placeholders(caplog):
    hparams = {"lr": 0.1, "folder": pathlib.Path("x"), "net": nn.Linear(1, 1), "act": nn.GELU}
    with caplog.at_level(logging.INFO, logger="lightkit"):
        stored = storable_hparams(hparams)
        assert storable_hparams(hparams) == stored
    assert stored["lr"] == 0.1
    assert stored["folder"] == "x"
    assert stored["net"] == {PLACEHOLDER: "torch.nn.modules.linear.Linear"}
    assert placeholder_type(stored["net"]) == "torch.nn.modules.linear.Linear"
    assert placeholder_type(stored["act"]) == "torch.nn.modules.activation.GELU"
    assert placeholder_type(0.1) is None
    assert placeholder_type({}) is None
    assert roundtrip(stored) == stored
    assert caplog.records == []  # load_from_checkpoint asks for them
