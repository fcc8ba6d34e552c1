from __future__ import annotations

import pytest
import torch

import lightkit as lk
from lightkit.distributed import LaunchEnv, Ranks, join, launched
from tests.distributed.harness import torchrun


def test_one_process_has_nobody_to_wait_for() -> None:
    ranks = join(LaunchEnv(), torch.device("cpu"))
    assert type(ranks) is Ranks
    assert (ranks.rank, ranks.world_size, ranks.is_zero) == (0, 1, True)
    value, tensor = object(), torch.ones(2)
    assert ranks.share(value, "x") is value
    assert ranks.gather(value, "x") == [value]
    assert ranks.decide(lambda: value, "x") is value
    assert ranks.exchange([1, 2.5], "x") == [[1.0, 2.5]]
    assert ranks.total(tensor) is tensor
    assert ranks.stack(tensor, "x") is tensor
    ranks.average([tensor])
    ranks.copy_from_zero([tensor])
    ranks.wait("x")
    assert torch.equal(tensor, torch.ones(2))
    error = RuntimeError("Connection closed by peer")
    assert ranks.explain(error) is error
    ranks.failed(error)
    with pytest.raises(KeyError):
        ranks.decide(lambda: {}["k"], "x")


@pytest.mark.parametrize("world", [1, 3])
def test_every_collective(tmp_path, world) -> None:
    found = torchrun("tests.distributed.scenes_ranks:collectives", world, tmp_path)
    mean = sum(range(world)) / world
    for rank, told in enumerate(found):
        assert told["share"] == "from 0"
        assert told["gather"] == [{"rank": each} for each in range(world)]
        assert told["exchange"] == [[float(each), 0.5] for each in range(world)]
        first, second, third = told["average"]
        assert torch.equal(first, torch.full((2, 3), mean)), rank
        assert torch.equal(second, torch.tensor(10 * mean))
        assert torch.equal(third, torch.ones(2).double())
        assert told["total"] == sum(range(1, world + 1))
        assert torch.equal(told["copied"], torch.zeros(3))
        gathered, each = told["all_gather"], torch.arange(1.0, world + 1)
        several = each[:, None].expand(world, 2) if world > 1 else torch.ones(2)
        assert torch.equal(gathered["own"], several)
        assert gathered["detached"] is (world > 1)
        assert gathered["name"] == "a"
        assert torch.equal(gathered["count"], torch.arange(world) if world > 1 else torch.tensor(0))
        assert torch.equal(gathered["grad"], torch.full((2,), each.sum()))
        assert ("rank 0: (1,); rank 1: (2,)" in gathered["no"]) is (world > 1)
        places = "rank 0 came to 'one place'; rank 1 came to 'another place'; rank 2"
        assert (places in told["parted"]) if world > 1 else not told["parted"]


def test_lines_and_warnings_of_rank_zero_alone(monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    lk.rank_zero_info("a line")
    lk.rank_zero_info("%d more", 2)
    with pytest.warns(DeprecationWarning, match="old") as found:
        lk.rank_zero_warn("old", category=DeprecationWarning)
    assert found[0].filename == __file__
    monkeypatch.setenv("RANK", "1")
    lk.rank_zero_info("another")
    lk.rank_zero_warn("nothing")
    assert caplog.messages == ["a line", "2 more"]


def test_rank_zero_only(monkeypatch) -> None:
    @lk.rank_zero_only
    def report(text: str, *, times: int = 1) -> str:
        """Says something."""
        return text * times

    assert report.__doc__ == "Says something."
    assert report("a", times=2) == "aa"
    monkeypatch.setenv("RANK", "1")
    assert launched().rank == 1
    assert report("a", times=2) is None
