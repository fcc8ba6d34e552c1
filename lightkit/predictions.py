"""What ``predict_step`` returned on all ranks, in the order of the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.data import move_to_device
from lightkit.data.move import with_members

if TYPE_CHECKING:
    from lightkit.run import EvalRun

#: The outputs of one batch: its number over all ranks (-1 where the loader divides its data by
#: itself, so that nobody knows it), and what the step returned.
Numbered = tuple[int, Any]


def outputs_of_all(run: EvalRun) -> list[list[Any]]:
    """Returns the outputs of the steps for each loader, of all ranks, to all ranks.

    With several ranks one collective, with tensors on the CPU; every rank then holds everything.

    Args:
        run: A prediction that is over, and that kept its outputs.
    """
    ranks, outputs = run.metrics.ranks, run.outputs or [[]]
    if ranks.world_size == 1 or run.outputs is None:
        return outputs
    own: list[list[Numbered]] = [[] for _ in outputs]
    if not run.metrics.silent:  # else the rank before has predicted the same
        for number, of_loader in enumerate(outputs):
            own[number] = [
                (batch_number(run, number, index), on_cpu(one))
                for index, one in enumerate(of_loader)
            ]
    found = ranks.gather(own, "predictions")  # collective: the only one of a prediction
    return [in_order([of_rank[n] for of_rank in found]) for n in range(len(outputs))]


def batch_number(run: EvalRun, loader: int, batch_idx: int) -> int:
    """Returns the number of a batch of this rank among those of all ranks; -1 where nobody knows."""
    number = run.loaders[loader].feed.global_index(batch_idx)
    return -1 if number is None else number


def in_order(parts: Sequence[Sequence[Numbered]]) -> list[Any]:
    """Returns outputs, given for each rank, in the order of their batches.

    Those without a number come in the order of the ranks.
    """
    together = [one for part in parts for one in part]
    return [output for _, output in sorted(together, key=lambda one: one[0])]  # stable


def on_cpu(outputs: Any) -> Any:
    """Returns outputs of a step with all tensors on the CPU. Host sync where they are elsewhere."""
    return _small(move_to_device(outputs, "cpu"))


def _small(item: Any) -> Any:
    """Replaces parts of larger tensors by copies: what is sent or written takes all of the memory."""
    if isinstance(item, Tensor):
        item = item.detach()
        whole = (
            item.layout is not torch.strided
            or item.untyped_storage().nbytes() <= item.numel() * item.element_size()
        )
        return item if whole else item.clone()
    return with_members(item, _small)
