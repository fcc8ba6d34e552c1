"""Data parallelism through torchrun, compared with one process on the joined batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed import scenes_ddp as scenes
from tests.distributed.harness import torchrun


@pytest.fixture(scope="module", params=[2, 4])
def world(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    return torchrun("tests.distributed.scenes_ddp:parity", world, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def alone(world):
    return scenes.parity(world)


def close(found, wanted, within=1e-6):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=within, atol=within, msg=name)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_it_equals_one_process_on_the_joined_batch(ranks, alone, kind):
    """Requirement of S0: 20 steps on 2 ranks, 10 on 4; the last bits are the order of sums."""
    wanted = alone[kind]
    for found in (rank[kind] for rank in ranks):
        assert found["step"] == wanted["step"]
        close(found["weights"], wanted["weights"])
        for entry, other in zip(found["history"], wanted["history"], strict=True):
            assert entry.keys() == other.keys()
            assert entry == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_all_ranks_have_the_same_bits(ranks, kind):
    first, *others = (rank[kind] for rank in ranks)
    for other in others:
        close(other["weights"], first["weights"], within=0.0)
        assert other["history"] == first["history"]
        assert other["metrics"] == first["metrics"]


def test_it_equals_a_loop_by_hand(ranks, world):
    torch.manual_seed(3)
    net = scenes.Net()
    optimizer = net.configure_optimizers()
    loader = scenes.loader(world)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
        iter(scenes.loader(world, shuffle=False))  # a validation draws a seed for workers
    close(ranks[0]["plain"]["weights"], net.state_dict())


# --- what one process does not have ---------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return torchrun("tests.distributed.scenes_ddp:other", 2, tmp_path_factory.mktemp("other"))


def test_where_a_process_is(other):
    assert [found["facts"] for found in other] == [(0, 0, 2, True, 2), (1, 1, 2, False, 2)]


@pytest.mark.parametrize("kind", ["normed", "allowed", "stopped", "unseeded"])
def test_ranks_stay_alike(other, kind):
    """With running means, parameters nobody uses, a stop of one rank, weights of no seed."""
    first, second = (found[kind] for found in other)
    close(first["weights"], second["weights"], within=0.0)
    assert first["step"] == second["step"]
    assert first["history"] == second["history"]


def test_one_rank_alone_asks_for_the_end(other):
    for found in other:
        assert found["stopped"]["stopped"] == "rank 1 has had enough"
        assert 5 < found["stopped"]["step"] < 500


def test_parameters_that_are_not_used_are_named(other):
    for rank, found in enumerate(other):
        assert f"rank {rank} did not use spare.weight, spare.bias" in found["unused"]
        assert 'Trainer(strategy="ddp_find_unused_parameters_true")' in found["unused"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("forgets", "did not use net.2.weight, net.2.bias"),
        ("forgets in a group", "did not use net.2.weight, net.2.bias"),
        ("weights late", "returned a 'weight' on rank"),
        ("freezes in step", "changed requires_grad of parameters"),
        ("thaws in step", "changed requires_grad of parameters"),
        ("freezes after use", "changed requires_grad of parameters"),
        ("nests", "in the middle of another trainer's fit"),
    ],
)
def test_what_ranks_could_not_go_on_with_is_said_at_once(other, kind, text):
    assert all(text in found[kind] for found in other)


def test_a_batch_cannot_be_skipped(other):
    for found in other:
        assert "return {'loss': loss * 0, 'weight': 0} instead" in found["skips"]


def test_sync_batchnorm_is_for_gpus(other):
    assert "works on GPUs only" in other[0]["sync_batchnorm"]


def test_random_numbers_differ_over_ranks(other):
    """Rank zero draws what one process draws, the others something else."""
    alone = scenes.draws()
    assert other[0]["draws"] == alone
    assert not set(other[1]["draws"]) & set(alone)
    assert all(a != b for a, b in itertools.pairwise(other[1]["draws"]))


def test_gradients_are_averaged_with_the_last_batch_of_a_group_only(other):
    for found in other:
        assert found["syncs"] == [False, False, True] * 3 + [True]
