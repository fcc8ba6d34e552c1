"""What the processes of test_ranks.py do."""

from __future__ import annotations

import torch

from lightkit.distributed import join, launched
from lightkit.errors import UsageError
from tests.distributed.quiet import quiet_trainer
from tests.small import Net


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
        "all_gather": all_gather(ranks),
    }


def all_gather(ranks):
    """``self.all_gather`` of a task: what it returns, gradients through it, unequal shapes."""
    task, trainer, rank = Net(), quiet_trainer(), ranks.rank
    assert task.all_gather(torch.ones(2)).shape == (2,)  # before a trainer: one process
    trainer.session.strategy.ranks = ranks
    task._link.hold(trainer)
    own = torch.full((2,), float(rank + 1), requires_grad=True)
    found = task.all_gather({"own": own, "count": rank, "name": "a"})
    stacked = task.all_gather(own, sync_grads=True)
    (stacked * (rank + 1)).sum().backward()
    try:
        task.all_gather(torch.ones(rank + 1))
        unequal = ""
    except UsageError as error:
        unequal = str(error)
    return {**found, "detached": not found["own"].requires_grad, "grad": own.grad, "no": unequal}
