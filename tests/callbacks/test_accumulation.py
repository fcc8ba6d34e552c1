from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightkit.callbacks.accumulation import GradientAccumulationScheduler
from lightkit.errors import ConfigError

TASK: Any = nn.Linear(1, 1)


def trainer(epoch: int = 0, given: int = 1) -> Any:
    factors: list[int] = []
    return SimpleNamespace(
        set_accumulation=factors.append,
        factors=factors,
        current_epoch=epoch,
        accumulate_grad_batches=given,
    )


def test_the_number_changes_at_epochs() -> None:
    callback, fake = GradientAccumulationScheduler({1: 2, 3: 8}), trainer()
    for epoch in range(5):
        fake.current_epoch = epoch
        callback.on_train_epoch_start(fake, TASK)
    assert fake.factors == [1, 2, 2, 8, 8]


def test_an_epoch_that_is_continued_has_its_number_too() -> None:
    callback, fake = GradientAccumulationScheduler({0: 4, 3: 8}), trainer(epoch=2)
    callback.on_fit_start(trainer(given=8), TASK)
    callback.on_train_start(fake, TASK)
    assert fake.factors == [4]


def test_a_second_source_is_refused() -> None:
    callback = GradientAccumulationScheduler({2: 4})
    with pytest.raises(ConfigError, match="accumulate_grad_batches=3"):
        callback.on_fit_start(trainer(given=3), TASK)


@pytest.mark.parametrize("wrong", [{}, {-1: 2}, {0: 0}, {"0": 2}, {0: 1.5}, [1], {True: 2}])
def test_impossible_schedules_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="such as"):
        GradientAccumulationScheduler(wrong)
