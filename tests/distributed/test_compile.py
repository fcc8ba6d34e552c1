"""``Trainer(compile=)`` over two ranks: the numbers of the same fit uncompiled."""

from __future__ import annotations

import pytest
import torch

from lightkit.distributed.ddp import DDPStrategy
from lightkit.errors import ConfigError
from tests.distributed import scenes_compile as scenes
from tests.distributed.harness import torchrun


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return torchrun("tests.distributed.scenes_compile:fits", 2, tmp_path_factory.mktemp("compile"))


@pytest.mark.parametrize("way", scenes.WAYS)
def test_it_equals_an_eager_fit_bit_for_bit(ranks, way):
    for rank in ranks:
        eager, compiled = rank[way]["eager"], rank[way]["compiled"]
        assert compiled["history"] == eager["history"]
        assert list(compiled["weights"]) == list(eager["weights"])
        for name, value in eager["weights"].items():
            assert torch.equal(compiled["weights"][name], value), name


@pytest.mark.parametrize("way", scenes.WAYS)
def test_graphs_are_made_once(ranks, way):
    # The first block gets a batch, which needs no gradient: with blocks there are two kinds. A
    # step is cut where a bucket of gradients is full, so that it is sent while the rest computes.
    kinds = {"ddp regional": 2, "fsdp regional": 2, "ddp in buckets": 3}
    assert [rank[way]["graphs"] for rank in ranks] == [kinds.get(way, 1)] * 2


def test_a_step_of_a_sharded_model_is_refused(ranks):
    for rank in ranks:
        assert "compile='regional'" in rank["refused"]


def test_buckets_that_torch_cannot_cut_by(quiet):
    strategy = DDPStrategy(bucket_cap_mb=0.5)
    with pytest.raises(ConfigError, match="bucket_cap_mb=0.5.*Give at least 1"):
        strategy.bind_training(scenes.Net(), automatic=True, compiled=lambda step: step)
