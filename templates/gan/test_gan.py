"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import DigitImages
from model import GAN, covered

import lightkit as lk


def test_an_image_for_each_noise() -> None:
    images = GAN(latent=3)(torch.randn(5, 3))
    assert images.shape == (5, 1, 8, 8)
    assert images.abs().max() <= 1
    assert GAN(size=28)(torch.randn(5, 32)).shape == (5, 1, 28, 28)


def test_the_fixed_noise_is_the_same_in_every_run() -> None:
    torch.manual_seed(1)
    first = GAN()
    torch.manual_seed(2)
    assert torch.equal(first.fixed_noise, GAN().fixed_noise)


def test_covered() -> None:
    crowd = torch.arange(10.0).unsqueeze(1)  # each number has its third neighbour 2 or 3 away
    assert covered(crowd, by=crowd) == 1
    assert covered(torch.tensor([[4.5], [11.0], [13.0], [-13.0]]), by=crowd, k=3) == 0.5


def test_each_optimizer_moves_its_own_network(tmp_path: Path) -> None:
    class OnlyTheGenerator(GAN):
        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            optimizers = super().configure_optimizers()
            optimizers[1].param_groups[0]["lr"] = 0.0
            return optimizers

    trainer = lk.Trainer(seed=0, max_steps=2, accelerator="cpu", default_root_dir=tmp_path)
    task = OnlyTheGenerator()
    before = {name: weight.clone() for name, weight in task.named_parameters()}
    trainer.fit(task, datamodule=DigitImages())
    for name, weight in task.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("discriminator"), name


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(
        seed=0,
        max_epochs=25,
        callbacks=lk.callbacks.EMA(decay=0.99),
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    trainer.fit(GAN(), datamodule=DigitImages())
    assert trainer.callback_metrics["val_precision"] > 0.4  # noise has 0
