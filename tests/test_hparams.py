from __future__ import annotations

import argparse
import copy
import inspect
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.checkpoint import write_checkpoint
from lightkit.errors import ConfigError
from lightkit.hparams import HParams, capture, save_hyperparameters


@capture
class Base(nn.Module):
    hparams: HParams


class Net(Base):
    """A net."""

    def __init__(self, width: int, lr: float = 0.1, *sizes: int, act: str = "relu", **more: Any):
        super().__init__()
        self.layer = nn.Linear(width, 1)


class Wide(Net):
    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(64, lr=lr * 2)


class Plain(Net):
    pass


def test_defaults_and_keywords_are_bound() -> None:
    assert Net(4).hparams == {"width": 4, "lr": 0.1, "act": "relu"}
    net = Net(4, 0.2, 7, 8, depth=3)
    assert net.hparams == {"width": 4, "lr": 0.2, "sizes": (7, 8), "act": "relu", "depth": 3}
    assert Base().hparams == {}


def test_the_class_that_is_constructed_counts() -> None:
    assert Wide().hparams == {"lr": 0.3}
    assert Plain(2).hparams["width"] == 2


def test_they_are_there_before_init_runs_and_may_be_replaced() -> None:
    class Early(Base):
        def __init__(self, lr: float = 0.1) -> None:
            self.seen = self.hparams.lr  # before nn.Module.__init__
            super().__init__()

    assert Early(0.5).seen == 0.5

    class Old(Base):
        def __init__(self, hparams: dict[str, Any]) -> None:
            super().__init__()
            self.hparams = hparams  # type: ignore[assignment]

    assert Old({"a": 1}).hparams == {"a": 1}


def test_what_the_constructor_does_to_its_arguments_is_not_seen() -> None:
    class Popping(Base):
        def __init__(self, config: dict[str, Any], sizes: list[int]) -> None:
            super().__init__()
            config.pop("lr")
            sizes.append(1)
            config["inner"].append(2)

    net = Popping({"lr": 1, "inner": [0]}, [8])
    assert net.hparams == {"config": {"lr": 1, "inner": [0]}, "sizes": [8]}


def test_objects_are_kept_by_reference_and_modules_do_not_register() -> None:
    class Backbone(Base):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()

    inner = nn.Linear(1, 1)
    outer = Backbone(inner)
    assert outer.hparams.net is inner
    assert not list(outer.parameters())


def test_a_wrong_call_says_what_python_says() -> None:
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required .*'width'"):
        Net()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        Wide(x=1)  # type: ignore[call-arg]


def test_signature_and_docstring_are_the_users() -> None:
    assert list(inspect.signature(Wide).parameters) == ["lr"]
    # Older Pythons look at an inherited __new__ before an inherited __init__.
    plain = Plain if sys.version_info >= (3, 11, 4) else Plain.__init__
    assert {"width", "lr"} <= set(inspect.signature(plain).parameters)
    assert Net.__doc__ == "A net."


def test_objects_copy_and_pickle() -> None:
    net = Net(4, depth=3)
    for again in (copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))):
        assert again.hparams == net.hparams
        assert type(again.hparams) is HParams
    assert torch.equal(copy.deepcopy(net).layer.weight, net.layer.weight)


def test_another_constructor_in_the_bases_still_runs() -> None:
    class Mixin:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            self = super().__new__(cls)
            self.mixed = (args, kwargs)
            return self

    class Mixed(Base, Mixin):
        def __init__(self, a: int, b: int = 2) -> None:
            super().__init__()

    net = Mixed(1, b=3)
    assert net.mixed == ((1,), {"b": 3})
    assert net.hparams == {"a": 1, "b": 3}


def test_attribute_access() -> None:
    params = HParams(lr=0.1, width=4)
    assert params.lr == params["lr"] == 0.1
    params.lr = 0.2
    assert params["lr"] == 0.2
    del params.width
    assert params == {"lr": 0.2}
    assert params.get("x") is None
    assert getattr(params, "x", 5) == 5
    with pytest.raises(AttributeError, match=r"no hyperparameter 'lrr'. Did you mean 'lr'\?"):
        _ = params.lrr
    with pytest.raises(KeyError, match="Known: lr"):
        _ = params["zzz"]
    with pytest.raises(AttributeError, match="zzz"):
        del params.zzz
    again = pickle.loads(pickle.dumps(params))
    assert (type(again), again) == (HParams, params)
    assert type(copy.deepcopy(params)) is HParams


def test_choosing_names() -> None:
    net = Net(4, depth=3)
    save_hyperparameters(net)
    assert net.hparams == {"width": 4, "lr": 0.1, "act": "relu", "depth": 3}
    save_hyperparameters(net, ignore="act")
    assert "act" not in net.hparams
    other = Net(4, depth=3)
    save_hyperparameters(other, "width", "lr", ignore=["lr"])
    assert other.hparams == {"width": 4}


def test_a_mapping_or_namespace_is_taken_over() -> None:
    class Config(Base):
        def __init__(self, args: Any) -> None:
            super().__init__()
            save_hyperparameters(self, args)

    for given in (argparse.Namespace(lr=0.1, n=2), {"lr": 0.1, "n": 2}):
        net = Config(given)
        assert net.hparams == {"lr": 0.1, "n": 2}
        assert type(net.hparams) is HParams
        assert net._hparams_name == "args"


def test_wrong_names_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'width'\? It has: width, lr, act"):
        save_hyperparameters(Net(4), "widht")
    with pytest.raises(ConfigError, match=r"takes names.*got int"):
        save_hyperparameters(Net(4), 3)


class Saves(lk.TaskModule):
    def __init__(self, lr=0.1, depth=None):
        super().__init__()
        depth = depth or 3
        self.save_hyperparameters()
        self.seen = self.hparams.lr, self.hparams.depth


class Wider(Saves):
    def __init__(self, width=2):
        super().__init__(lr=0.5)


def test_a_base_class_that_saves_sees_its_own_arguments_and_the_subclass_keeps_its_own():
    task = Wider(width=7)
    assert task.hparams == {"width": 7, "lr": 0.5, "depth": 3}
    assert task.seen == (0.5, 3)


def test_several_calls_add_up():
    class Both(lk.TaskModule):
        def __init__(self, config, lr=1, other=2):
            super().__init__()
            self.save_hyperparameters(config)
            self.save_hyperparameters("lr")

    assert Both({"q": 5}).hparams == {"q": 5, "lr": 1}


def test_arguments_of_base_classes_are_no_news_when_loading(tmp_path, caplog):
    path = tmp_path / "wide.ckpt"
    task = Wider(width=7)
    write_checkpoint(
        {
            "lightkit": {"format": 1, "version": "0"},
            "model": task.state_dict(),
            "hparams": dict(task.hparams),
        },
        path,
    )
    again = Wider.load_from_checkpoint(path)
    assert again.hparams == task.hparams
    assert caplog.text == ""
