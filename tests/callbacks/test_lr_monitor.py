from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightkit.callbacks.lr_monitor import LearningRateMonitor
from lightkit.errors import ConfigError
from lightkit.loggers.base import Logger
from lightkit.schedules import SchedulerEntry
from lightkit.session import Session
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

TASK: Any = nn.Linear(1, 1)


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


def trainer(optimizers: list[Optimizer], entries: list[SchedulerEntry]) -> Any:
    return SimpleNamespace(
        optimizers=optimizers,
        lr_schedulers=entries,
        loggers=[Rows()],
        is_global_zero=True,
        fast_dev_run=False,
        global_step=0,
        log_every_n_steps=3,
        session=Session(),
    )


def fit(callback: LearningRateMonitor, fake: Any, epochs: int = 2, batches: int = 5) -> list[Any]:
    """Plays a fit; the rates are lowered by one per step and ten per epoch."""
    callback.on_train_start(fake, TASK)
    for _ in range(epochs):
        callback.on_train_epoch_start(fake, TASK)
        for batch_idx in range(batches):
            fake.global_step += 1
            for optimizer in fake.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] -= 1
            callback.on_train_batch_end(fake, TASK, None, None, batch_idx)
    return fake.loggers[0].rows if fake.loggers else []


def sgd(**kwargs: Any) -> SGD:
    return SGD(nn.Linear(1, 1).parameters(), lr=100.0, **kwargs)


def test_an_optimizer_without_schedule_is_written_every_epoch() -> None:
    rows = fit(LearningRateMonitor(), trainer([sgd()], []))
    assert rows == [(0, {"lr-SGD": 100.0}), (5, {"lr-SGD": 95.0})]


def test_a_schedule_by_step_is_written_with_the_rows_of_the_log() -> None:
    optimizer = sgd()
    entry = SchedulerEntry(StepLR(optimizer, 1), optimizer, interval="step")
    rows = fit(LearningRateMonitor(), trainer([optimizer], [entry]))
    assert [(step, row["lr-SGD"]) for step, row in rows] == [
        (0, 100.0),
        (3, 97.0),
        (6, 94.0),
        (9, 91.0),
    ]


def test_the_interval_given_wins() -> None:
    optimizer = sgd()
    entry = SchedulerEntry(StepLR(optimizer, 1), optimizer, interval="step")
    by_epoch = fit(LearningRateMonitor("epoch"), trainer([optimizer], [entry]))
    assert [step for step, _ in by_epoch] == [0, 5]
    by_step = fit(LearningRateMonitor("step"), trainer([sgd()], []))
    assert [step for step, _ in by_step] == [0, 3, 6, 9]


def test_accumulated_batches_write_one_row_per_step() -> None:
    fake = trainer([sgd()], [])
    callback = LearningRateMonitor("step")
    callback.on_train_start(fake, TASK)
    for step in (0, 0, 1, 2, 3, 3, 3, 4):
        fake.global_step = step
        callback.on_train_batch_end(fake, TASK, None, None, 0)
    assert [step for step, _ in fake.loggers[0].rows] == [3]


def test_curves_are_told_apart() -> None:
    groups = [
        {"params": [nn.Linear(1, 1).weight]},
        {"params": [nn.Linear(1, 1).weight], "name": "head"},
    ]
    named = sgd()
    optimizers = [SGD(groups, lr=100.0), sgd(), named]
    entry = SchedulerEntry(StepLR(named, 1), named, name="my rate")
    (step, row), *_ = fit(LearningRateMonitor(), trainer(optimizers, [entry]))
    assert step == 0
    assert set(row) == {"lr-SGD/pg1", "lr-SGD/head", "lr-SGD-1", "my rate"}


def test_momentum_on_request() -> None:
    adam = Adam(nn.Linear(1, 1).parameters(), lr=100.0, betas=(0.8, 0.9))
    fake = trainer([sgd(momentum=0.7), adam], [])
    (_, row), *_ = fit(LearningRateMonitor(log_momentum=True), fake)
    assert row["lr-SGD-momentum"] == 0.7
    assert row["lr-Adam-momentum"] == 0.8


def test_other_ranks_write_nothing() -> None:
    fake = trainer([sgd()], [])
    fake.is_global_zero = False
    assert fit(LearningRateMonitor(), fake) == []


def test_without_a_logger_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fake = trainer([sgd()], [])
    fake.loggers = []
    fit(LearningRateMonitor(), fake)
    assert "no logger" in caplog.text


def test_another_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'step'"):
        LearningRateMonitor("steps")


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1.0)
        by_step = {"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}


def loader(count: int = 4) -> DataLoader[Any]:
    data: Any = torch.ones(count, 1)
    return DataLoader(data, batch_size=1)


def real(tmp_path: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **quiet | options)


def test_a_fit_writes_the_rates_beside_its_rows(tmp_path: Path) -> None:
    class Kept(Logger):
        def __init__(self) -> None:
            super().__init__()
            self.rates: list[tuple[int, float]] = []

        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            if "lr-SGD" in metrics:
                self.rates.append((step, metrics["lr-SGD"]))

    logger = Kept()
    trainer = real(
        tmp_path,
        max_epochs=2,
        logger=[logger],
        log_every_n_steps=3,
        callbacks=[LearningRateMonitor()],
    )
    trainer.fit(Net(), loader(4))
    assert logger.rates == [(0, 1.0), (3, 0.5**3), (6, 0.5**6)]
