"""Changes the number of accumulated batches during a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightkit.errors import ConfigError
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Sets ``accumulate_grad_batches`` by epoch.

    ``GradientAccumulationScheduler({0: 1, 4: 8})`` makes a step of every batch in the first four
    epochs, and of every 8 batches from then on. Schedules that move by step need a length that
    takes this into account.

    Args:
        scheduling: The number of batches in a step, by the epoch (counted from 0) from which it
            holds. Before the first one given it is 1.

    Raises:
        ConfigError: When epochs or numbers are not possible, or when the Trainer was given
            another ``accumulate_grad_batches``.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        wrong = not isinstance(scheduling, dict) or not scheduling
        wrong = wrong or any(type(v) is not int for pair in scheduling.items() for v in pair)
        wrong = wrong or min(scheduling) < 0 or min(scheduling.values()) < 1
        if wrong:
            raise ConfigError(
                f"GradientAccumulationScheduler({scheduling!r}): it takes a dict of epochs (from 0 "
                f"on) and numbers of batches (from 1 on), such as {{0: 1, 4: 8}}."
            )
        self.scheduling = {0: 1, **scheduling}

    def factor(self, epoch: int) -> int:
        """Returns the number of batches in a step of ``epoch`` (counted from 0)."""
        return self.scheduling[max(start for start in self.scheduling if start <= epoch)]

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Refuses a second source of the same number."""
        given = trainer.accumulate_grad_batches
        if given not in (1, *self.scheduling.values()):  # 1: nothing was given
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={given}) together with "
                f"GradientAccumulationScheduler({self.scheduling}): give one of them."
            )

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Sets the number for an epoch that is continued, which has no start of its own."""
        trainer.set_accumulation(self.factor(trainer.current_epoch))

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Sets the number for this epoch."""
        trainer.set_accumulation(self.factor(trainer.current_epoch))
