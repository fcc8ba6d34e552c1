"""What a checkpoint says about the position of a run: counters of completed things."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import NoReturn


class Stage(str, enum.Enum):
    """What the trainer is doing."""

    FIT = "fit"
    VALIDATE = "validate"
    TEST = "test"
    PREDICT = "predict"


@dataclass(slots=True)
class TrainState:
    """Counters of *completed* work. Only ``loops.py`` moves them; a checkpoint holds them whole.

    Attributes:
        epoch: Epochs completed. 0 during the whole first epoch, its end hooks included.
        global_step: Optimizer steps completed (one per training step, whatever the number of
            optimizers).
        batch_idx: Batches of the current epoch completed.
        batches_before: Training batches of all completed epochs.
        validations: Validation rounds completed (the sanity check is none).
        seconds: Time since the first epoch began, all runs together that continue each other.
        pending_validation: The validation that a signal broke off, to be run before anything else:
            "step" or "batch" within an epoch (after a step, after a batch that made none), "epoch"
            where the batches of the epoch are over; "" for none.
    """

    epoch: int = 0
    global_step: int = 0
    batch_idx: int = 0
    batches_before: int = 0
    validations: int = 0
    seconds: float = 0.0
    pending_validation: str = ""

    def __getattr__(self, name: str) -> NoReturn:
        """Says for names that a state has elsewhere what to write."""
        from lightkit.elsewhere import STATE, refusal

        raise AttributeError(refusal("trainer.state has no attribute", name, STATE))

    def state_dict(self) -> dict[str, int | float | str]:
        """Returns the counters as plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int | float | str]) -> None:
        """Takes the counters from ``state``; a name it does not hold keeps its default."""
        for name, default in asdict(TrainState()).items():
            setattr(self, name, state.get(name, default))
