"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import DigitImages
from model import VAE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, kl_divergence

import lightkit as lk


def test_the_kl_is_that_of_the_distributions() -> None:
    task, images = VAE(), torch.rand(5, 1, 8, 8)
    mean, log_variance = task.encode(images)
    assert mean.shape == log_variance.shape == (5, 8)
    codes = Normal(mean, (0.5 * log_variance).exp())
    right = kl_divergence(codes, Normal(0.0, 1.0)).sum(dim=1).mean()
    assert torch.allclose(task.losses(images)["kl"], right)


def test_images_come_out_as_images() -> None:
    images = VAE()(torch.rand(5, 1, 8, 8))
    assert images.shape == (5, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    assert VAE(size=28)(torch.rand(5, 1, 28, 28)).shape == (5, 1, 28, 28)


def test_learns_and_shows_its_images(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=10, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(VAE(), datamodule=DigitImages())
    assert trainer.callback_metrics["val_loss"] < 40  # the mean of all images has 59
    board = EventAccumulator(str(trainer.run_dir)).Reload()
    assert board.Images("samples")[-1].step == trainer.global_step
