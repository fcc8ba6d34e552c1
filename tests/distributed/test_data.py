"""Loaders over ranks through the Trainer and torchrun, against one process."""

from __future__ import annotations

import itertools

import pytest

from tests.distributed import scenes_data
from tests.distributed.harness import torchrun

SCENES = "tests.distributed.scenes_data"


def in_turn(parts):
    """Returns the batches of all ranks in the order of one process."""
    rounds = itertools.zip_longest(*parts)
    return [batch for batches in rounds for batch in batches if batch is not None]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return torchrun(f"{SCENES}:everything", 4, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone():
    return scenes_data.fits()


@pytest.mark.parametrize("kind", scenes_data.KINDS)
def test_ranks_walk_in_the_order_of_one_process(results, alone, kind):
    found, wanted = [each["fits"][kind] for each in results], alone[kind]
    for epoch in (0, 1):
        parts = [each["train"][epoch] for each in found]
        assert [len(part) for part in parts] == [5] * 4
        assert in_turn(parts) == wanted["train"][epoch][:20]


@pytest.mark.parametrize("kind", [k for k in scenes_data.KINDS if k != "stream"])
def test_an_evaluation_is_that_of_one_process(results, alone, kind):
    found, wanted = [each["fits"][kind] for each in results], alone[kind]
    assert len(wanted["val"]) == 3  # with the sanity check, of one batch for each rank
    for number in (1, 2):
        parts = [each["val"][number] for each in found]
        assert [len(part) for part in parts] == [3, 3, 3, 2]
        assert in_turn(parts) == wanted["val"][number]
    tried = in_turn([each["val"][0] for each in found])
    assert tried[:1] == wanted["val"][0]
    assert len(tried) == 4


def test_augmentation_belongs_to_the_batch(results, alone):
    noise = [each["fits"]["workers"]["noise"] for each in results]
    wanted = alone["workers"]["noise"]
    for epoch, first in ((0, 0), (1, 21)):
        parts = [part[5 * epoch : 5 * epoch + 5] for part in noise]
        assert in_turn(parts) == wanted[first : first + 20]


def test_random_states_are_those_of_one_process_on_rank_zero(results, alone):
    for kind in scenes_data.KINDS:
        draws = [each["fits"][kind]["draw"] for each in results]
        assert draws[0] == alone[kind]["draw"], kind
        assert len(set(draws)) == 4


def of(results, name, what="train"):
    return [each["others"][name][what] for each in results]


def test_loaders_that_divide_their_data_are_taken_as_they_are(results):
    parts = of(results, "sampler")
    for epoch in (0, 1):
        seen = [sample for part in parts for batch in part[epoch] for sample in batch]
        assert sorted(seen) == list(range(24))
    assert parts[0][0] != parts[0][1]  # set_epoch was called
    parts = of(results, "own")
    for rank, part in enumerate(parts):
        assert [len(epoch) for epoch in part] == [3, 3]  # as many as the shortest has
        assert all(sample % 4 == rank for batch in part[0] for sample in batch)
    # Nobody knows how many they are: the one with the fewest ends the epoch.
    assert of(results, "unsized") == [[[[rank]] * 5] for rank in range(4)]


def test_arguments_about_data(results):
    parts = of(results, "overfit")
    assert all(part[0] == part[1] and len(part[0]) == 2 for part in parts)
    assert len({tuple(batch) for part in parts for batch in part[0]}) == 8
    assert of(results, "overfit part") == parts  # 10 of 21, two for each
    assert [len(epoch) for part in of(results, "limit") for epoch in part] == [2] * 8
    assert [len(epoch) for part in of(results, "fraction") for epoch in part] == [2] * 8
    validated = of(results, "fraction", "val")
    assert [len(part[1]) for part in validated] == [2, 1, 1, 1]  # half of 11
    assert [len(part[0]) for part in of(results, "dev run")] == [1] * 4
    assert [len(part[0]) for part in of(results, "dev run", "val")] == [1] * 4


def test_epochs_that_begin_early_have_the_order_of_one_process(results):
    alone, parts = scenes_data.early(), of(results, "early")
    for epoch in (0, 1):
        assert in_turn([part[epoch] for part in parts]) == alone["train"][epoch][:20]
    assert in_turn([part[1] for part in of(results, "early", "val")]) == alone["val"][1]
    assert of(results, "early", "draw")[0] == alone["draw"]


def test_a_data_module_prepares_once_and_makes_loaders_anew(results):
    assert of(results, "reload", "prepared") == [1, 0, 0, 0]
    assert of(results, "reload", "made") == [2] * 4
    parts = of(results, "reload")
    for epoch, samples in ((0, 20), (1, 24)):
        seen = [sample for part in parts for batch in part[epoch] for sample in batch]
        assert len(set(seen)) == len(seen) == samples // 8 * 8
        assert max(seen) < samples


def test_mistakes_are_told_on_every_rank(results):
    for rank, each in enumerate(results):
        told = each["others"]
        assert told["few"].startswith("The training loader gives 2 batches, but there are 4 proc")
        assert "training loader of rank 1 has other data" in told["split"]
        assert "random_split(data, lengths, generator=" in told["split"]
        assert "validation loader of rank 1 has other data" in told["split of validation"]
        assert "gives other samples on rank 1, 2, 3 than on rank 0" in told["weights"]
        assert f"between 5 processes and takes share {rank}, but" in told["sampler of others"]


# --- another number of ranks -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """Returns what each rank of each life has seen: 4 ranks, then 3, 2 and 1 go on."""
    folder = tmp_path_factory.mktemp("lives")
    path = lambda kind, life: str(folder / f"{kind}_{life}.ckpt")  # noqa: E731
    kinds = ("shuffled", "workers", "tensors", "stream")

    def run(world, moves):
        if world == 1:
            return [scenes_data.chain(moves)]
        return torchrun(f"{SCENES}:chain", world, folder / "results", moves=moves)

    found = {4: run(4, [["begin", [path(k, 0), 2, k]] for k in kinds])}
    found[3] = run(3, [["go_on", [path(k, 0), k, 1, [3, path(k, 1)]]] for k in kinds])
    found[2] = run(2, [["go_on", [path(k, 1), k, 2, [4, path(k, 2)]]] for k in kinds])
    found[1] = run(1, [["go_on", [path(k, 2), k, 4]] for k in kinds])
    return {
        kind: {world: [each[i] for each in results] for world, results in found.items()}
        for i, kind in enumerate(kinds)
    }


@pytest.mark.parametrize("kind", ["shuffled", "workers", "tensors", "stream"])
def test_other_numbers_of_ranks_go_on_in_the_same_order(lives, alone, kind):
    wanted, lived = alone[kind]["train"], lives[kind]
    began = in_turn([part[0] for part in lived[4]])
    assert began[:8] == wanted[0][:8]  # 2 steps of 4 batches were saved
    third = in_turn([part["train"][0] for part in lived[3]])
    assert third[:3] == wanted[0][8:11]  # 1 step of 3; 8 is no multiple of 3
    assert len(third) <= 12
    second = in_turn([part["train"][0] for part in lived[2]])
    assert second[:4] == wanted[0][11:15]  # 1 step of 2 batches on each of 2
    assert lived[1][0]["train"][0] == wanted[0][15:]
    if kind != "stream":
        assert lived[1][0]["train"][1] == wanted[1]


def test_a_step_sees_the_same_samples(tmp_path):
    """With the global batch kept by accumulation: 2 ranks as 4, and one alone as 4."""
    moves = [["go_on", [str(tmp_path / "a.ckpt"), "shuffled", 2]]]
    four = torchrun(
        f"{SCENES}:chain",
        4,
        tmp_path / "results",
        moves=[["begin", [str(tmp_path / "a.ckpt"), 2]], ["go_on", [str(tmp_path / "a.ckpt")]]],
    )
    two = torchrun(f"{SCENES}:chain", 2, tmp_path / "results", moves=moves)
    one = scenes_data.go_on(str(tmp_path / "a.ckpt"), "shuffled", 4)
    steps = [
        [
            sorted(map(tuple, (b for part in parts for b in part[0][i * n : i * n + n])))
            for i in range(3)
        ]
        for n, parts in (
            (1, [each[1]["train"] for each in four]),
            (2, [each[0]["train"] for each in two]),
            (4, [one["train"]]),
        )
    ]
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0][0]) == 4
