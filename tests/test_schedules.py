from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim import lr_scheduler as schedules

from lightkit.errors import OptimizerError
from lightkit.schedules import SchedulerEntry, no_such_metric


def entry(make: Callable[[Optimizer], Any], **keys: Any) -> SchedulerEntry:
    optimizer = Adam(nn.Linear(3, 2).parameters(), lr=0.1)
    return SchedulerEntry(make(optimizer), optimizer, **keys)


def one_cycle(total: int) -> Callable[[Optimizer], Any]:
    return lambda o: schedules.OneCycleLR(o, 0.1, total_steps=total)


def step_lr(o: Optimizer) -> Any:
    return schedules.StepLR(o, 3)


def test_a_schedule_is_told_in_one_line() -> None:
    line = entry(one_cycle(100), interval="step").describe(100)
    assert line == "OneCycleLR per step: lr 0.004 -> 0.1 (step 30) -> 4e-07 (step 100)"
    line = entry(step_lr).describe(10)
    assert line == "StepLR per epoch: lr 0.1 -> 0.0001 (epoch 10)"
    line = entry(step_lr, frequency=2).describe(10)
    assert line == "StepLR every 2 epochs: lr 0.1 -> 0.01 (epoch 10)"
    line = entry(schedules.ReduceLROnPlateau, monitor="val_loss").describe(10)
    assert line == "ReduceLROnPlateau per epoch: lr 0.1, lowered when 'val_loss' stays on a plateau"
    line = entry(step_lr).describe(10, automatic=False)
    assert line == "StepLR moved by the task: lr 0.1 at the start"


def test_a_resumed_schedule_tells_what_is_left() -> None:
    resumed = entry(step_lr)
    for _ in range(4):
        resumed.optimizer.step()
        resumed.scheduler.step()
    assert resumed.describe(10) == "StepLR per epoch: lr 0.01 -> 0.0001 (epoch 10)"
    assert resumed.describe(4) == "StepLR per epoch: lr 0.01 at the start"


def test_long_or_open_runs_tell_the_first_rate() -> None:
    for steps in (None, 100_000):
        line = entry(one_cycle(100_000), interval="step").describe(steps)
        assert line == "OneCycleLR per step: lr 0.004 at the start"


def test_a_schedule_that_cannot_be_copied_tells_the_first_rate() -> None:
    class Stubborn(schedules.ConstantLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    line = entry(lambda o: Stubborn(o, 1.0)).describe(10)
    assert line == "Stubborn per epoch: lr 0.1 at the start"


def test_a_schedule_made_from_a_method_does_not_copy_its_owner() -> None:
    class Heavy:
        def warm_up(self, epoch: int) -> float:
            return min(1.0, (epoch + 1) / 5)

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the owner was copied")

    line = entry(lambda o: schedules.LambdaLR(o, Heavy().warm_up)).describe(10)
    assert line == "LambdaLR per epoch: lr 0.02 -> 0.1 (epoch 10)"


def test_telling_moves_nothing_and_draws_nothing() -> None:
    real = entry(one_cycle(100), interval="step")
    before, drawn = repr(real.scheduler.state_dict()), torch.get_rng_state()
    groups = repr(real.optimizer.param_groups)
    real.describe(100)
    assert repr(real.scheduler.state_dict()) == before
    assert repr(real.optimizer.param_groups) == groups
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_one_cycle_of_another_length_is_told(caplog: pytest.LogCaptureFixture) -> None:
    by_step = entry(one_cycle(100), interval="step")
    by_step.check_horizon(100)
    by_step.check_horizon(None)
    entry(one_cycle(100), interval="step", frequency=2).check_horizon(200)
    entry(step_lr).check_horizon(3)
    assert caplog.text == ""
    with pytest.raises(OptimizerError, match="total_steps=100, but this run of 101 steps"):
        by_step.check_horizon(101)
    entry(one_cycle(100)).check_horizon(10)
    assert "or set interval='step'" in caplog.text
    by_step.check_horizon(99)
    assert "Make it with total_steps=99" in caplog.text


def test_a_missing_metric_is_told_with_those_there_are() -> None:
    text = no_such_metric("EarlyStopping", "val_los", ["val_loss", "train_loss"])
    assert text == (
        "EarlyStopping monitors 'val_los', which is not among the metrics: 'train_loss', "
        "'val_loss'. Did you mean 'val_loss'?"
    )
    assert no_such_metric("X", "a", []).endswith("metrics: none yet.")
