"""The parts of several ranks in one file, and what other numbers of ranks make of them."""

from __future__ import annotations

import pytest
import torch

from lightkit import rng
from lightkit.checkpoint import on_every_rank, random_states, saved_ranks, spread
from lightkit.checkpoint.files import read_checkpoint, save_file
from lightkit.distributed import Ranks
from lightkit.errors import CheckpointError, NonFiniteError
from tests.threads import together


def part(rank: int) -> dict:
    return {
        "rng": {"torch": torch.full((3,), rank)},
        "data": {"world": 2, "own": rank},
        "metrics": {"window": [torch.tensor(float(rank), requires_grad=True)]},
    }


def test_in_one_process_the_part_is_the_live_one_and_a_problem_is_raised():
    own = part(0)
    assert spread.gathered(Ranks(), own, None)[0] is own
    with pytest.raises(NonFiniteError, match="bad"):
        spread.gathered(Ranks(), own, NonFiniteError("bad"))
    joined = spread.joined([own])
    assert joined["data"] is own["data"]
    assert joined["world_size"] == 1
    assert joined["metrics"]["ranks"][0] is own["metrics"]


def test_all_ranks_get_the_parts_of_all():
    found = together(3, lambda ranks: spread.gathered(ranks, part(ranks.rank), None))
    for parts in found:
        assert [p["data"]["own"] for p in parts] == [0, 1, 2]
        assert not any(p["metrics"]["window"][0].requires_grad for p in parts)
    joined = spread.joined(found[1])
    assert joined["data"]["own"] == 0
    assert [data["own"] for data in joined["data"]["ranks"]] == [0, 1, 2]
    assert [state["torch"][0] for state in joined["rng"]] == [0, 1, 2]
    assert saved_ranks(joined) == 3
    assert saved_ranks({}) == 1


@pytest.mark.parametrize("kind", [NonFiniteError, CheckpointError])
def test_what_is_wrong_on_one_rank_is_raised_by_all(kind):
    def save(ranks):
        problem = kind("nan everywhere") if ranks.rank == 1 else None
        with pytest.raises(kind) as caught:
            spread.gathered(ranks, part(ranks.rank), problem)
        return str(caught.value)

    others = "rank 1: nan everywhere"
    assert together(3, save) == [others, "nan everywhere", others]


def test_what_cannot_be_stored_on_one_rank_is_told_by_all():
    def save(ranks):
        own = part(ranks.rank)
        if ranks.rank == 2:
            own["data"]["mine"] = object()
        with pytest.raises(CheckpointError, match=r"data\.mine cannot be stored"):
            spread.gathered(ranks, own, None)
        return True

    assert together(3, save) == [True] * 3


@pytest.mark.parametrize(
    ("before", "now", "batches"), [(4, 2, 12), (4, 1, 24), (4, 8, 3), (4, 4, 6), (2, 3, 4)]
)
def test_batches_are_counted_by_each_rank_for_itself(before, now, batches):
    loop = {"epoch": 1, "global_step": 6, "batch_idx": 6, "batches_before": 6}
    found = spread.counters({"loop": loop, "world_size": before}, now)
    assert (found["batch_idx"], found["batches_before"]) == (batches, batches)
    assert (found["epoch"], found["global_step"]) == (1, 6)
    assert loop["batch_idx"] == 6


def test_ranks_that_were_not_there_get_random_states_of_their_own():
    rng.seed_everything(3, verbose=False)
    saved = {"rng": [rng.rng_state()]}
    rng.for_rank(1)
    saved["rng"].append(rng.rng_state())
    before = torch.get_rng_state()
    found = [random_states(saved, rank) for rank in range(8)]
    assert torch.equal(torch.get_rng_state(), before), "nothing of this process is touched"
    assert found[:2] == saved["rng"]
    assert len({state["torch"].numpy().tobytes() for state in found}) == 8
    again = random_states(saved, 5)
    assert torch.equal(again["torch"], found[5]["torch"])
    assert again["python"] == found[5]["python"]


def test_a_rank_goes_on_with_the_state_of_its_card_on_any_other():
    state = {"torch": torch.ones(1), "cuda": [torch.tensor([n]) for n in range(4)]}
    found = spread.with_own_card(state, torch.device("cuda", 2))
    assert [int(card) for card in found["cuda"]] == [2, 2, 2, 2]
    assert [int(card) for card in state["cuda"]] == [0, 1, 2, 3]
    assert spread.with_own_card(state, torch.device("cpu")) is state


def test_a_file_that_one_rank_does_not_see_is_told_by_all(tmp_path):
    path = tmp_path / "a.ckpt"
    save_file({"lightkit": {"format": 1}}, path)

    def read(ranks):
        own = path if ranks.rank != 1 else tmp_path / "local" / "a.ckpt"
        with pytest.raises(CheckpointError) as caught:
            on_every_rank(ranks, lambda: read_checkpoint(own), "reading of the checkpoint")
        return str(caught.value)

    for text in together(3, read):
        assert "failed on 1 of 3 ranks" in text
        assert "must be on a file system that all nodes share" in text
        assert "Rank 1 says: CheckpointError" in text


def test_a_file_that_all_can_read_or_nobody(tmp_path):
    path = tmp_path / "a.ckpt"
    save_file({"lightkit": {"format": 1}}, path)
    found = together(2, lambda r: on_every_rank(r, lambda: read_checkpoint(path), "reading"))
    assert [f["lightkit"]["format"] for f in found] == [1, 1]

    def missing(ranks):
        with pytest.raises(CheckpointError, match="^.*b.ckpt does not exist"):
            on_every_rank(ranks, lambda: read_checkpoint(tmp_path / "b.ckpt"), "reading")
        return True

    assert together(2, missing) == [True, True]
    with pytest.raises(KeyError):
        on_every_rank(Ranks(), lambda: {}["a"], "reading")
