"""``Trainer(compile=)`` over two ranks: the numbers of the same fit uncompiled."""

from __future__ import annotations

import pytest
import torch

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
    # The first block gets a batch, which needs no gradient: with blocks there are two kinds.
    assert [rank[way]["graphs"] for rank in ranks] == [2 if "regional" in way else 1] * 2


def test_a_step_of_a_sharded_model_is_refused(ranks):
    for rank in ranks:
        assert "compile='regional'" in rank["refused"]
