"""A fit of several processes that fails on one of them: what they do in tests/test_failure.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.test_failure import Net, loader, trainer


class OnOne(Net):
    """Fails on rank 1 alone, and in a single process."""

    def training_step(self, batch: Any) -> Tensor:
        before, self.at = (
            self.at,
            -1 if self.trainer.world_size > 1 > self.trainer.global_rank else 2,
        )
        try:
            return super().training_step(batch)
        finally:
            self.at = before


def one_fails(folder: str) -> None:
    """Trains until rank 1 fails."""
    one = trainer(Path(folder), devices=2)
    one.fit(OnOne(), loader())
