from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightkit.checkpoint import load_weights, write_checkpoint
from lightkit.errors import CheckpointError


class Net(nn.Module):
    def __init__(self, width: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, classes)


def saved(tmp_path, obj):
    torch.save(obj, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"lightkit": {"format": 1}, "model": sd},
        lambda sd: {"state_dict": sd, "pytorch-lightning_version": "2.5", "epoch": 1},
        lambda sd: sd,
        dict,
    ],
    ids=["lightkit", "lightning", "bare", "plain dict"],
)
def test_from_every_kind_of_file(tmp_path, wrap):
    source, target = Net(), Net()
    load_weights(target, saved(tmp_path, wrap(source.state_dict())))
    assert same(source, target)


def test_a_checkpoint_loads_into_a_bare_module_with_torch_alone(tmp_path):
    source, target = Net(), Net()
    write_checkpoint({"lightkit": {"format": 1}, "model": source.state_dict()}, tmp_path / "a.ckpt")
    target.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["model"])
    assert same(source, target)


def test_a_part_by_its_prefix(tmp_path):
    source, target = Net(), Net().net
    path = saved(tmp_path, {"model": source.state_dict()})
    load_weights(target, path, prefix="net.")
    assert same(source.net, target)
    with pytest.raises(CheckpointError, match=r"No name in .* begins with 'nett\.'.* net\.0\.wei"):
        load_weights(target, path, prefix="nett.")


def test_old_versions_of_a_layer_load_through_a_prefix(tmp_path):
    state = Net().state_dict()
    del state["net.1.num_batches_tracked"]
    state._metadata["net.1"] = {"version": 1}  # from before that buffer existed
    load_weights(Net().net, saved(tmp_path, state), prefix="net.")


def test_another_architecture_names_what_differs(tmp_path):
    state = Net(width=5).state_dict()
    state["extra.weight"] = torch.ones(1)
    del state["head.bias"]
    path = saved(tmp_path, {"model": state})
    with pytest.raises(CheckpointError) as caught:
        load_weights(Net(), path)
    message = str(caught.value)
    assert f"The weights of {path} do not fit Net: 1 missing in the file: head.bias" in message
    assert "1 unknown here: extra.weight" in message
    assert "7 of another shape: net.0.weight (file (5, 4), here (3, 4))" in message
    assert "and 2 more" in message


def test_what_does_not_fit_changes_nothing(tmp_path):
    target = Net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for spoil in ("missing", "unexpected", "shape"):
        state = Net().state_dict()
        if spoil == "missing":
            del state["head.bias"]
        elif spoil == "unexpected":
            state["extra"] = torch.ones(1)
        else:
            state["head.bias"] = torch.ones(9)
        with pytest.raises(CheckpointError, match="do not fit"):
            load_weights(target, saved(tmp_path, state))
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items()), spoil


def test_a_module_that_renames_what_it_loads_may_differ(tmp_path):
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.new = nn.Linear(2, 1)
            self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module, state, prefix, *_):
            for key in [k for k in state if k.startswith("old.")]:
                state[key.replace("old.", "new.")] = state.pop(key)

    target = Renamed()
    state = {"old.weight": torch.full((1, 2), 3.0), "old.bias": torch.zeros(1)}
    load_weights(target, saved(tmp_path, state))
    assert (target.new.weight == 3).all()


def test_not_strict_loads_what_fits_and_says_what_does_not(tmp_path, caplog):
    source, target = Net(classes=10), Net()
    head = target.head.weight.clone()
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        load_weights(target, saved(tmp_path, source.state_dict()), strict=False)
    assert same(source.net, target.net)
    assert torch.equal(target.head.weight, head)
    assert "2 of another shape: head.weight (file (10, 3), here (2, 3)), head.bias" in caplog.text
    caplog.clear()
    load_weights(target, saved(tmp_path, target.state_dict()), strict=False)
    assert not caplog.records


def test_a_wrong_prefix_is_explained(tmp_path):
    wrapped = {f"module.{k}": v for k, v in Net().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"The names fit with prefix='module\.'\."):
        load_weights(Net(), saved(tmp_path, wrapped))
    with pytest.raises(CheckpointError, match=r"The file fits the part 'net': load it into that"):
        load_weights(Net(), saved(tmp_path, Net().net.state_dict()))


def test_no_weights_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights.*Its keys are epoch, lr"):
        load_weights(Net(), saved(tmp_path, {"epoch": 1, "lr": 0.1}))
    with pytest.raises(CheckpointError, match="holds a list, not weights"):
        load_weights(Net(), saved(tmp_path, [1]))


def test_loading_in_place_keeps_the_parameters_that_an_optimizer_holds(tmp_path):
    net = Net()
    held = list(net.parameters())
    load_weights(net, saved(tmp_path, Net().state_dict()))
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))


def test_a_network_without_parameters(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint({"lightkit": {"format": 1}, "model": nn.ReLU().state_dict()}, path)
    load_weights(nn.ReLU(), path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_to_the_cpu_and_back(tmp_path):
    source, target = Net().cuda(), Net()
    load_weights(target, saved(tmp_path, source.state_dict()))
    assert target.head.weight.device.type == "cpu"
    back = Net().cuda()
    load_weights(back, saved(tmp_path, target.state_dict()))
    assert same(source, back)
