from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightkit.callbacks.lambda_callback import LambdaCallback
from lightkit.errors import HookNameError
from lightkit.task import TaskModule
from lightkit.trainer import Trainer


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, callback: LambdaCallback) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, **quiet)
    trainer.fit(Net(), DataLoader(torch.ones(4, 1), batch_size=2))


def test_functions_are_called_with_what_the_hook_gets() -> None:
    calls: list[Any] = []
    callback: Any = LambdaCallback(
        on_fit_start=lambda trainer, task: calls.append((trainer, task)),
        on_train_batch_end=lambda *args: calls.append(args),
        state_dict=lambda: {"kept": 1},
    )
    callback.on_fit_start("trainer", "task")
    callback.on_train_batch_end("trainer", "task", "outputs", "batch", 3)
    callback.on_fit_end("trainer", "task")
    assert calls == [("trainer", "task"), ("trainer", "task", "outputs", "batch", 3)]
    assert callback.state_dict() == {"kept": 1}


def test_the_loop_calls_only_what_was_given(tmp_path: Path) -> None:
    calls: list[str] = []
    callback = LambdaCallback(
        on_train_epoch_end=lambda trainer, task: calls.append(f"epoch {trainer.current_epoch}"),
        on_fit_end=lambda *_: calls.append("end"),
    )
    fit(tmp_path, callback)
    assert calls == ["epoch 0", "epoch 1", "end"]


def test_a_name_that_is_no_hook_is_refused_with_the_nearest() -> None:
    with pytest.raises(HookNameError, match="Did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)


def test_a_value_that_cannot_be_called_is_refused() -> None:
    wrong: Any = 3
    with pytest.raises(HookNameError, match="on_fit_start must be a function, not int"):
        LambdaCallback(on_fit_start=wrong)
