"""What may be read of a task at any time, and where it is: the side of `TrainerView` on a task."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit.data.move import with_members
from lightkit.distributed import Ranks
from lightkit.errors import NotRunningError, UsageError

if TYPE_CHECKING:
    from lightkit.loggers.base import Logger
    from lightkit.task import Link
    from lightkit.trainer import Trainer


class TaskView(nn.Module):
    """The attributes of a task that may be read at any time."""

    _link: Link

    @property
    def trainer(self) -> Trainer:
        """The trainer of the last or the present run."""
        if self._link.trainer is None:
            raise NotRunningError(
                f"{type(self).__name__} has no trainer yet: it gets one by Trainer.fit, validate, "
                f"test or predict."
            )
        return self._link.trainer

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU where there is none."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating parameter; the default type where there is none."""
        for tensor in self.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the task is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def current_epoch(self) -> int:
        """Epochs completed; 0 during the whole first epoch and outside a run."""
        return 0 if self._link.trainer is None else self._link.trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps completed; 0 outside a run."""
        return 0 if self._link.trainer is None else self._link.trainer.global_step

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None."""
        return None if self._link.trainer is None else self._link.trainer.logger

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return [] if self._link.trainer is None else self._link.trainer.loggers

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return 0 if self._link.trainer is None else self._link.trainer.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process on its machine."""
        return 0 if self._link.trainer is None else self._link.trainer.local_rank

    def all_gather(self, data: Any, group: None = None, sync_grads: bool = False) -> Any:
        """Returns the tensors of all ranks: a new first dimension, in the order of ranks.

        A collective: all ranks must call it, with tensors of the same shapes. In an evaluation some
        may have a batch less, so gather at its end there. With one process ``data`` comes back as
        it is, its numbers as tensors.

        Args:
            data: A tensor or number, or mappings and sequences of them, in any nesting.
            group: None, for all ranks.
            sync_grads: Whether gradients flow back to the ranks that the tensors come from.

        Raises:
            UsageError: The ranks have different shapes; on all of them.
        """
        if group is not None:
            raise UsageError(f"self.all_gather(group={group!r}): leave it out, for all ranks.")
        trainer, device = self._link.trainer, self.device
        ranks = Ranks() if trainer is None else trainer.session.strategy.ranks

        def gather(item: Any) -> Any:
            if isinstance(item, (bool, int, float)):
                item = torch.tensor(item, device=device)
            if not isinstance(item, Tensor):
                return with_members(item, gather)
            with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
                return ranks.stack(item, "self.all_gather")

        return gather(data)
