"""Run with ``pytest`` in this folder."""

from pathlib import Path

import pytest
import torch
from data import ClutterData
from model import UNet, segmentation_loss

import lightkit as lk


def test_one_logit_per_pixel() -> None:
    assert UNet()(torch.zeros(2, 1, 16, 32)).shape == (2, 1, 16, 32)
    assert UNet(channels=3)(torch.zeros(2, 3, 15, 29)).shape == (2, 1, 15, 29)


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 8, 8), torch.eye(8).view(1, 1, 8, 8)])
def test_the_loss_is_nothing_where_all_is_right(mask: torch.Tensor) -> None:
    right = 40 * mask - 20
    assert segmentation_loss(right, mask) < 1e-4
    assert segmentation_loss(-right, mask) > 1


def test_masks_lie_on_digits() -> None:
    data = ClutterData(pictures=40)
    data.setup("fit")
    assert [len(split) for split in (data.train, data.val, data.test)] == [40, 10, 10]
    pictures, masks = data.train.tensors
    assert pictures.shape == masks.shape == (40, 1, 24, 24)
    assert pictures[masks == 1].min() > 0.3  # bright below every mask
    assert (pictures[masks == 0] > 0.5).any()  # and scratches are as bright


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=3, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(UNet(), datamodule=ClutterData(pictures=400))
    assert trainer.callback_metrics["val_iou"] > 0.5
