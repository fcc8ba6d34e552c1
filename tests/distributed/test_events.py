"""Functions as listeners, what is added to losses, and fits without data, on two ranks."""

from __future__ import annotations

import torch

from tests.distributed.harness import torchrun
from tests.distributed.scenes_ddp import Net, Tokens
from tests.distributed.scenes_events import fit


def test_two_ranks_do_what_one_process_does(tmp_path):
    """S1-04, S1-05, S1-07, S1-10, S3-03."""
    found = torchrun("tests.distributed.scenes_events:everything", 2, tmp_path)
    for name, alone in {
        "net": fit(Net, 2),
        "unused allowed": fit(Net, 2),
        "sharded": fit(Net, 2),
        "tokens": fit(Tokens, 2),
        "accumulated": fit(Net, 2, accumulate_grad_batches=3),
    }.items():
        for told in found:
            for ours, theirs in zip(told[name], alone, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5), name
            assert all(map(torch.equal, told[name], found[0][name])), name
    assert [told["calls"] for told in found] == [([0, 0], [0, 0]), ([], [1, 1])]
    assert found[0]["rows"] == found[1]["rows"]
    for row in found[0]["rows"]:
        assert row["std"] > 0
        assert row["last"] != row["running"]
    x = torch.tensor([2.0, 1.0])
    for _ in range(5):
        x = x - 0.1 * 2 * (x - 3)
    for told in found:
        assert torch.allclose(told["bowl"][0], x)
        assert told["bowl"][1] == 5
