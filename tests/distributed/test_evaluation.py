"""Evaluations and predictions on several ranks through torchrun, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import scenes_evaluation as scenes
from tests.distributed.harness import torchrun


@pytest.fixture(scope="module", params=[2, 4])
def world(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    name = "tests.distributed.scenes_evaluation:everything"
    return torchrun(name, world, root, folder=str(root))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("alone"))
    found = {count: scenes.measured(count, root) for count in scenes.COUNTS}
    return {**found, "few": scenes.few(), "loaders": scenes.several_loaders()}


def same(found, wanted):
    """Equal to 1e-6 in the names that do not depend on the rank on purpose."""
    drop = {"late", "step", "mine"}
    assert {n for n in found if "mine" not in n} == {n for n in wanted if "mine" not in n}
    kept = {name: v for name, v in found.items() if name not in drop and "/mine" not in name}
    assert kept == pytest.approx({name: wanted[name] for name in kept}, rel=1e-6)


def same_predictions(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one["index"], other["index"])
        torch.testing.assert_close(one["scores"], other["scores"])


@pytest.mark.parametrize("count", scenes.COUNTS)
def test_numbers_equal_one_process(ranks, alone, world, count):
    wanted = alone[count]
    for found in (rank[count] for rank in ranks):
        same(found["history"], wanted["history"])
        same(found["test"][0], wanted["test"][0])
        assert found["test"][0]["accuracy"] == wanted["test"][0]["accuracy"]  # counts: exactly
        assert found["test"][0]["count"] == count
        assert found["test"][0]["late"] == (world - 1) / 2
        assert found["matrix"] == wanted["matrix"]  # computed by the user in a hook
        assert found["metrics"] == ranks[0][count]["metrics"]  # the same bits on all ranks
        assert found["history"] == ranks[0][count]["history"]


@pytest.mark.parametrize("count", scenes.COUNTS)
def test_torchmetrics_synchronises_only_where_the_user_computes(ranks, count):
    for found in (rank[count] for rank in ranks):
        assert found["in_steps"] == 0
        assert found["by_itself"] == 2  # one state of the matrix, in fit and in test


@pytest.mark.parametrize("count", scenes.COUNTS)
def test_predictions_are_complete_and_in_order_on_every_rank(ranks, alone, count):
    wanted = alone[count]
    for found in (rank[count] for rank in ranks):
        same_predictions(found["predictions"], wanted["predictions"])
        same_predictions(found["written"], wanted["written"])
        assert found["nothing"] == []
        indices = torch.cat([one["index"] for one in found["predictions"]])
        assert indices.tolist() == list(range(count))
        told, true = found["places"]
        assert told == true
    assert sorted(n for rank in ranks for n in rank[count]["places"][0]) == list(range(count))


def test_ranks_without_a_batch_have_the_results_of_the_others(ranks, alone):
    for number, found in enumerate(rank["few"] for rank in ranks):
        assert ("mine" in found["history"]) is (number == 0)  # rank_zero_only
        same(found["history"], alone["few"]["history"])
        same(found["test"][0], alone["few"]["test"][0])
        same_predictions(found["predictions"], alone["few"]["predictions"])


def test_several_loaders(ranks, alone):
    for found in (rank["loaders"] for rank in ranks):
        for one, other in zip(found["test"], alone["loaders"]["test"], strict=True):
            same(one, other)
        for one, other in zip(found["predictions"], alone["loaders"]["predictions"], strict=True):
            same_predictions(one, other)


def test_predictions_of_loaders_that_divide_by_themselves_come_by_rank(ranks, world):
    wanted = [index for rank in range(world) for index in range(10 * rank, 9 * rank + 10)]
    assert [rank["own"] for rank in ranks] == [[wanted, wanted]] * world


def test_a_plateau_by_steps_decides_alike(ranks, world):
    first, *others = (rank["plateau"] for rank in ranks)
    for other in others:
        assert other["lr"] == first["lr"]
        assert torch.equal(other["weights"], first["weights"])
    # Over ranks the value is (step % 7) * (1 + world) / 2, of which none but the first is a best.
    assert first["lr"] == pytest.approx(1e-3 * 0.9**29)


def test_different_names_are_an_error_on_all_ranks(ranks):
    texts = {rank["wrong"] for rank in ranks}
    assert len(texts) == 1
    (text,) = texts
    assert "did not log 'only_here', but rank 1 did" in text
