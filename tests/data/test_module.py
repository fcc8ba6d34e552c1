from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lightkit.data import DataModule
from lightkit.errors import ConfigError, HookNameError


class Digits(DataModule):
    def __init__(self, batch_size: int = 32, root: str = "data") -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> list[tuple[int, int]]:
        return [(self.batch_size, 1)]


def test_arguments_are_captured_without_further_ado() -> None:
    data = Digits(8)
    assert data.hparams == {"batch_size": 8, "root": "data"}
    assert data.hparams.batch_size == 8


def test_a_dataclass_is_captured_too() -> None:
    @dataclass
    class Table(DataModule):
        path: str
        fraction: float = 0.2

    assert Table("a.csv").hparams == {"path": "a.csv", "fraction": 0.2}


def test_save_hyperparameters_chooses() -> None:
    class Some(DataModule):
        def __init__(self, a: int = 1, b: int = 2) -> None:
            self.save_hyperparameters("a", logger=False)

    assert Some().hparams == {"a": 1}
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        Digits().save_hyperparameters("batchsize")


def test_the_defaults_have_no_loaders_and_pass_batches_on() -> None:
    data = DataModule()
    data.prepare_data()
    data.setup("fit")
    data.teardown("fit")
    assert data.val_dataloader() is None
    assert data.test_dataloader() is None
    assert data.predict_dataloader() is None
    assert data.train_dataloader() is None
    batch = (torch.ones(2), "text")
    assert data.on_before_batch_transfer(batch, 0) is batch
    assert data.on_after_batch_transfer(batch, 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved[0].device.type == "meta"
    assert data.state_dict() == {}


@pytest.mark.parametrize("name", ["train_dataloaders", "prepare_dat", "on_batch_transfer"])
def test_misspelled_hooks_are_errors(name: str) -> None:
    with pytest.raises(HookNameError, match=name):
        type("Wrong", (DataModule,), {name: lambda self: None})
