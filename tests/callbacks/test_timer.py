from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightkit.callbacks import LambdaCallback
from lightkit.callbacks import timer as module
from lightkit.callbacks.timer import Timer
from lightkit.errors import ConfigError
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

TASK: Any = nn.Linear(1, 1)


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def trainer() -> Any:
    reasons: list[str] = []
    # What the ranks of a run have agreed on.
    session = SimpleNamespace(flow=SimpleNamespace(clock=module.time.perf_counter))
    return SimpleNamespace(
        stop=reasons.append, reasons=reasons, sanity_checking=False, session=session
    )


def train(timer: Timer, fake: Any, clock: Clock, batches: int) -> None:
    """Trains batches of 10 seconds, or fewer when stopped."""
    timer.on_train_start(fake, TASK)
    for batch_idx in range(batches):
        if fake.reasons:
            break
        clock.now += 10
        timer.on_train_batch_end(fake, TASK, None, None, batch_idx)
    timer.on_train_epoch_end(fake, TASK)
    timer.on_train_end(fake, TASK)


def test_it_stops_when_the_time_is_over(clock: Clock) -> None:
    timer, fake = Timer("00:00:01:00"), trainer()
    timer.setup(fake, TASK, "fit")
    assert timer.time_remaining() == 60
    train(timer, fake, clock, 100)
    assert timer.time_elapsed() == 60
    assert timer.time_remaining() == 0
    assert fake.reasons == ["the time of 0:01:00 is over"]


@pytest.mark.parametrize("given", ["1 min", timedelta(minutes=1), {"minutes": 1}, "00:00:01:00"])
def test_a_duration_is_given_in_many_ways(given: Any) -> None:
    assert Timer(given).time_remaining() == 60


def test_by_epoch_it_looks_at_the_clock_after_epochs(clock: Clock) -> None:
    timer, fake = Timer("1 min", interval="epoch"), trainer()
    train(timer, fake, clock, 9)
    assert timer.time_elapsed() == 90
    assert len(fake.reasons) == 1


def test_without_a_duration_it_measures(clock: Clock) -> None:
    timer, fake = Timer(), trainer()
    train(timer, fake, clock, 3)
    assert timer.time_elapsed() == 30
    assert timer.time_remaining() is None
    assert fake.reasons == []


def test_stages_are_measured_apart(clock: Clock) -> None:
    timer, fake = Timer(), trainer()
    for start, end in (
        (timer.on_validation_start, timer.on_validation_end),
        (timer.on_test_start, timer.on_test_end),
        (timer.on_predict_start, timer.on_predict_end),
    ):
        clock.now += 1
        start(fake, TASK)
        clock.now += 5
        end(fake, TASK)
    fake.sanity_checking = True
    timer.on_validation_start(fake, TASK)
    clock.now += 5
    timer.on_validation_end(fake, TASK)
    stages = ("train", "validate", "test", "predict")
    assert [timer.time_elapsed(s) for s in stages] == [0, 5, 5, 5]
    with pytest.raises(ConfigError, match="Did you mean 'validate'"):
        timer.time_elapsed("validation")


def test_a_resumed_run_goes_on_counting(clock: Clock) -> None:
    first, fake = Timer("1 min"), trainer()
    train(first, fake, clock, 4)
    second = Timer("1 min")
    second.setup(fake, TASK, "fit")
    second.load_state_dict(first.state_dict())
    train(second, fake, clock, 100)
    assert second.time_elapsed() == 60
    third, fake = Timer("1 min"), trainer()
    third.load_state_dict(second.state_dict())
    third.on_train_start(fake, TASK)
    assert len(fake.reasons) == 1


def test_the_state_holds_a_clock_that_runs(clock: Clock) -> None:
    timer, fake = Timer(), trainer()
    timer.on_train_start(fake, TASK)
    clock.now += 7
    assert timer.state_dict()["time_elapsed"]["train"] == 7


def test_a_new_fit_begins_at_zero_and_errors_end_the_clocks(clock: Clock) -> None:
    timer, fake = Timer(), trainer()
    timer.setup(fake, TASK, "fit")
    timer.on_train_start(fake, TASK)
    clock.now += 7
    timer.on_exception(fake, TASK, KeyError())
    clock.now += 7
    assert timer.time_elapsed() == 7
    timer.setup(fake, TASK, "test")
    assert timer.time_elapsed() == 7
    timer.setup(fake, TASK, "fit")
    assert timer.time_elapsed() == 0


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'epoch'"):
        Timer("1 min", interval="epochs")
    with pytest.raises(ConfigError, match="soon"):
        Timer("soon")


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(count: int = 4) -> DataLoader[Any]:
    data: Any = torch.ones(count, 1)
    return DataLoader(data, batch_size=1)


def real(tmp_path: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **quiet | options)


def test_a_fit_ends_at_the_next_step(tmp_path: Path, clock: Clock) -> None:
    class Slow(Net):
        def on_before_backward(self, loss: Any) -> None:
            clock.now += 10

        def validation_step(self, batch: Any) -> None:
            clock.now += 1

    timer = Timer("25 s")
    agreed = LambdaCallback(
        on_fit_start=lambda t, _: setattr(t.session.flow, "clock", clock.perf_counter)
    )
    trainer = real(tmp_path, max_epochs=5, callbacks=[agreed, timer], num_sanity_val_steps=1)
    trainer.fit(Slow(), loader(4), DataLoader([1.0, 2.0]))
    assert trainer.global_step == 3
    assert timer.time_elapsed() == 30
    assert timer.time_elapsed("validate") == 0
    trainer.validate(Slow(), DataLoader([1.0, 2.0]))
    assert timer.time_elapsed("validate") == 2
    assert timer.time_elapsed() == 30
