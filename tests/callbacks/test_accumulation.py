from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightkit.callbacks.accumulation import GradientAccumulationScheduler
from lightkit.callbacks.lambda_callback import LambdaCallback
from lightkit.errors import ConfigError
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

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


def test_a_fit_makes_the_steps_that_were_scheduled(tmp_path: Path) -> None:
    callback = GradientAccumulationScheduler({1: 2, 2: 3})
    trainer = real(tmp_path, max_epochs=3, callbacks=[callback])
    steps: list[int] = []
    end = LambdaCallback(on_train_epoch_end=lambda t, _: steps.append(t.global_step))
    trainer.callbacks.append(end)
    trainer.fit(Net(), loader(4))
    assert steps == [4, 6, 8]  # 4 steps of 1 batch, 2 of 2, then 3 batches and the one left over


def test_a_number_for_the_first_epoch_is_no_second_source(tmp_path: Path) -> None:
    trainer = real(tmp_path, max_epochs=1, callbacks=GradientAccumulationScheduler({0: 2}))
    trainer.fit(Net(), loader(4))
    assert trainer.global_step == 2
