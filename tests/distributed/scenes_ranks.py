"""What the processes of test_ranks.py do."""

from __future__ import annotations

import torch

from lightkit.distributed import join, launched
from lightkit.errors import UsageError


def collectives():
    """Every collective once."""
    ranks = join(launched(), torch.device("cpu"))
    rank = ranks.rank
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(10.0 * rank), torch.ones(2).double()]
    ranks.average(tensors)
    copied = torch.full((3,), float(rank))
    ranks.copy_from_zero([copied])
    try:
        ranks.exchange([1.0], "one place" if rank == 0 else "another place")
        parted = ""
    except UsageError as error:
        parted = str(error)
    ranks.wait("the end of the test")
    return {
        "parted": parted,
        "share": ranks.share(f"from {rank}", "a test"),
        "gather": ranks.gather({"rank": rank}, "a test"),
        "exchange": ranks.exchange([rank, 0.5], "a test"),
        "average": tensors,
        "total": ranks.total(torch.tensor(float(rank + 1))),
        "copied": copied,
    }
