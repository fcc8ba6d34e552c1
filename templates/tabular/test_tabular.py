"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import TumourData
from model import TabularNet

import lightkit as lk


def test_one_score_per_class() -> None:
    assert TabularNet(columns=7, classes=3)(torch.zeros(5, 7)).shape == (5, 3)


def test_standardised_with_the_training_rows_only(tmp_path: Path) -> None:
    class WithAConstant(TumourData):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            for split in (self.train, self.val, self.test):
                split.tensors[0][:, 3] = 0.1

    data, task = WithAConstant(), TabularNet()
    trainer = lk.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(task, datamodule=data)
    rows, _ = data.train.tensors
    assert torch.equal(task.mean, rows.mean(dim=0))
    others = torch.arange(30) != 3
    assert torch.equal(task.std[others], rows.std(dim=0)[others])
    assert task.std[3] == 1

    saved = TabularNet.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert torch.equal(saved.mean, task.mean)  # so it takes rows as they are


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=5, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(TabularNet(), datamodule=TumourData())
    assert trainer.callback_metrics["val_accuracy"] > 0.9
