"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import TumourData
from model import TabularNet

import lightkit as lk


def test_one_score_per_class() -> None:
    assert TabularNet(columns=7, classes=3)(torch.zeros(5, 7)).shape == (5, 3)


def test_standardised_with_the_training_rows_only() -> None:
    data = TumourData()
    data.setup("fit")
    train, test = data.train.tensors[0], data.test.tensors[0]
    assert train.mean(dim=0).abs().max() < 1e-4
    assert (train.std(dim=0) - 1).abs().max() < 1e-4
    assert test.mean(dim=0).abs().max() > 1e-2  # the test rows were not used


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=5, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(TabularNet(), datamodule=TumourData())
    assert trainer.callback_metrics["val_accuracy"] > 0.9
