"""What a person sees who opens TensorBoard on a run folder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from tests.browser.chromium import CHROMIUM, CURVES, Page, tensorboard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium"),
]

TEXTS = "return all.map(e => e.children.length ? '' : e.textContent.trim()).filter(t => t);"


class Net(lk.TaskModule):
    def __init__(self, lr: float, width: int = 8):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean())
        return torch.nn.functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture
def runs(tmp_path):
    """Two runs of 5 epochs with 20 steps each, a row every 5 steps."""
    x = torch.randn(160, 4)
    data = TensorDataset(x, (x.sum(-1) > 0).long())
    for lr in (0.1, 0.2):
        trainer = lk.Trainer(
            max_epochs=5,
            accelerator="cpu",
            log_every_n_steps=5,
            enable_progress_bar=False,
            default_root_dir=tmp_path / "runs",
        )
        trainer.fit(Net(lr), DataLoader(data, 8), DataLoader(TensorDataset(*data[:32]), 8))
    return tmp_path / "runs"


@pytest.fixture
def serve():
    """Starts TensorBoard on a free port of this machine and returns its address."""
    with contextlib.ExitStack() as servers:
        yield lambda folder: servers.enter_context(tensorboard(folder))


@pytest.fixture
def address(runs, serve):
    return serve(runs)


@pytest.fixture
def page(tmp_path):
    page = Page(tmp_path / "profile")
    yield page
    page.close()


def test_the_curves_are_on_the_time_series_page(page, address, tmp_path):
    page.open(f"{address}?forceSVG=true&tagFilter=loss%7Cacc#timeseries")
    curves = page.wait_for(CURVES)
    texts = page.evaluate(TEXTS)
    picture = page.screenshot(tmp_path / "timeseries.png")
    assert {"train_loss", "val_loss", "val_acc"} <= set(texts)
    assert {"Net/version_0", "Net/version_1"} <= set(texts)
    assert sorted(set(curves)) == [5, 20]  # every row of both kinds became a point
    assert len(picture) > 30_000  # a blank page is a third of that


def test_the_hparams_page_has_hyperparameters_and_metrics(page, address, tmp_path):
    page.open(f"{address}#hparams")
    texts = page.wait_for(
        f"const t = (() => {{{TEXTS}}})(); return t.includes('Trial ID') && t.includes('0.20000')"
        " ? t : null;"
    )
    page.screenshot(tmp_path / "hparams.png")
    assert {"lr", "width", "train_loss", "val_loss", "val_acc"} <= set(texts)
    assert "hp_metric" not in texts
    assert {"0.10000", "0.20000"} <= set(texts)


def test_the_main_job_has_its_curves(page, serve, tmp_path):
    subprocess.run(
        [
            *(sys.executable, "-m", "lightkit", "fit", "--config", "configs/digits.yaml"),
            *("--trainer.default_root_dir", str(tmp_path / "runs"), "--trainer.accelerator", "cpu"),
        ],
        cwd=Path(__file__).parents[2],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    page.open(f"{serve(tmp_path / 'runs')}?forceSVG=true&tagFilter=loss%7Caccuracy#timeseries")
    curves = page.wait_for(CURVES)
    texts = page.evaluate(TEXTS)
    picture = page.screenshot(tmp_path / "digits.png")
    assert {"train_loss", "val_loss", "val_accuracy", "DigitsNet/version_0"} <= set(texts)
    assert 12 in curves  # a point for each validation
    assert len(picture) > 30_000
