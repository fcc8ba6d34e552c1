"""A checkpoint as a sharded run writes it."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightkit.checkpoint.disk import REST
from lightkit.checkpoint.files import FORMAT, write_checkpoint

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Folder(FileSystemWriter):
    def storage_meta(self):  # as lightkit writes it: without the path
        return None


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose weight and momentum are in other files than the rest."""
    path = tmp_path / "step_000003.ckpt"
    model = OrderedDict(weight={"__lightkit_sharded__": "model.weight"}, bias=torch.ones(2))
    moved = {"exp_avg": {"__lightkit_sharded__": "optimizers.0.state.0.exp_avg"}}
    contents = {
        "lightkit": {"format": FORMAT, "version": "0", "run": "r", "global_step": 3, "epoch": 0},
        "model": model,
        "optimizers": [{"state": {0: moved}, "param_groups": [{"params": [0, 1]}]}],
        "loop": {"global_step": 3},
    }
    parts = {"model.weight": WEIGHT, "optimizers.0.state.0.exp_avg": WEIGHT.bfloat16() + 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(parts, storage_writer=Folder(path), no_dist=True)
    write_checkpoint(contents, path / REST)
    return path
