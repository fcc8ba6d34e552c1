"""What one process takes of a sharded checkpoint; test_fsdp.py has ranks that take their parts."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from lightkit.checkpoint.files import read_checkpoint
from lightkit.checkpoint.placing import placed, placed_states, settled
from lightkit.checkpoint.sharded import Piece
from tests.checkpoint.conftest import WEIGHT


def test_weights_are_whole_where_the_module_is(folder):
    contents = read_checkpoint(folder, lazy=True)
    weights = contents["model"]
    weights._metadata = {"": {"version": 1}}
    own = OrderedDict(weight=torch.zeros(2, 3), bias=torch.zeros(2))
    found = placed(weights, own)
    assert torch.equal(found["weight"], WEIGHT)
    assert found["bias"] is weights["bias"]
    assert found._metadata == {"": {"version": 1}}


def test_of_what_does_not_fit_only_the_shape_is_read(folder):
    weights = read_checkpoint(folder, lazy=True)["model"]
    for own in ({"weight": torch.zeros(3, 3)}, {}):
        found = placed(weights, own)["weight"]
        assert found.is_meta
        assert found.shape == (2, 3)


def test_states_of_optimizers(folder):
    saved = read_checkpoint(folder, lazy=True)["optimizers"]
    optimizer = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    (found,) = placed_states(saved, [optimizer])
    assert torch.equal(found["state"][0]["exp_avg"], WEIGHT.bfloat16() + 1)
    (found,) = placed_states(saved, [])  # fewer optimizers than saved: whoever compares says so
    assert torch.equal(found["state"][0]["exp_avg"], WEIGHT.bfloat16() + 1)


def test_a_whole_checkpoint(folder):
    contents = read_checkpoint(folder, lazy=True)
    contents["callbacks"] = {"averages": [contents["model"]["weight"]]}
    layer = nn.Linear(3, 2)
    found = settled(contents, layer, [torch.optim.AdamW(layer.parameters())])

    def pieces(item):
        if isinstance(item, dict):
            return sum(map(pieces, item.values()))
        return sum(map(pieces, item)) if isinstance(item, list) else isinstance(item, Piece)

    assert pieces(contents) == 3
    assert pieces(found) == 0
    assert torch.equal(found["callbacks"]["averages"][0], WEIGHT)
    assert "pieces" not in found["lightkit"]
