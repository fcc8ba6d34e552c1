"""Times, hints and profilers on several ranks."""

from __future__ import annotations

import pytest

from tests.distributed.harness import torchrun


def test_rank_zero_speaks_for_all_and_each_may_write_a_trace(tmp_path):
    ranks = torchrun("tests.distributed.scenes_times:profiled", 2, tmp_path, folder=str(tmp_path))
    assert [rank["told"] for rank in ranks] == [["slow-data"], []]
    assert ranks[0]["table"]  # which the others do not wait for
    for rank in ranks:
        assert rank["samples"] == [pytest.approx(32, rel=0.05)] * 2  # those of both
        assert [name for name in rank["files"] if name.endswith(".gz")] == [
            f"profile/rank{i}_steps_1-2.pt.trace.json.gz" for i in range(2)
        ]


def test_rank_zero_tells_of_what_does_not_learn(tmp_path):
    ranks = torchrun("tests.distributed.scenes_times:alarmed", 2, tmp_path)
    assert ranks[0] == {
        "ddp": ["zero-gradient"],
        "ddp_find_unused_parameters_true": ["zero-gradient"],
        "fsdp": ["no-gradient"],  # of sharded gradients no values are looked at
    }
    assert ranks[1] == {strategy: [] for strategy in ranks[0]}
