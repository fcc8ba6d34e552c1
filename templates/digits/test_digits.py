"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import DigitsData
from model import DigitsNet

import lightkit as lk


def test_one_score_per_class() -> None:
    assert DigitsNet()(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert DigitsNet(classes=3, channels=3, size=30)(torch.zeros(5, 3, 30, 30)).shape == (5, 3)


def test_no_image_is_in_two_splits() -> None:
    data = DigitsData()
    data.setup("fit")
    splits = [set(split.indices) for split in (data.train, data.val, data.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 1797


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=3, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(DigitsNet(), datamodule=DigitsData())
    assert trainer.callback_metrics["val_accuracy"] > 0.95
