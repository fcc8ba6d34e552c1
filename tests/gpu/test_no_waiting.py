"""Between two flushes nothing waits for the device: clipping, schedules and the scaler included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import metrics, opening
from lightkit.callbacks import (
    EMA,
    DeviceStatsMonitor,
    LearningRateMonitor,
    Statistics,
    ThroughputMonitor,
)
from lightkit.loggers import CSVLogger
from lightkit.precision import ScaledPrecision, resolve_precision
from tests.gpu.waiting import NoWaiting

EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
STEPS, EVERY = 40, 10


class Net(lk.TaskModule):
    """Everything in a step that might wait; the schedule halves the rate with every step."""

    def __init__(self, make=torch.optim.AdamW):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)
        )
        self.make = make

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        loss = 0.1 * functional.cross_entropy(out, y)  # far from the end of fp16 when scaled
        if batch_idx in (15, 16, 25):  # under 16-mixed these steps are skipped
            loss = loss * torch.full((), 1e36, device=loss.device)
        self.log("loss", loss, prog_bar=True)
        self.log("mean", out.mean(), on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.01)
        plan = LambdaLR(optimizer, lambda moves: 1.0 / (1 + moves))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}


class Plain(Net):
    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.net(batch[0]), batch[1])


def loader(device):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(STEPS * 8, 6, generator=generator), torch.arange(STEPS * 8) % 3
    return DataLoader(TensorDataset(x, y), 8, pin_memory=device == "cuda")


@EVERYWHERE
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_waits_between_flushes(tmp_path, monkeypatch, device, precision, make, accumulate):
    guard = NoWaiting(device, 2 * accumulate, STEPS - 1)
    flushes = []

    def read(values, real=metrics.read):
        flushes.append(len(values))
        with guard.allowed():
            return real(values)

    def settle(self, real=ScaledPrecision.settle):
        if device == "cuda":  # waits for an event of the step before, which torch lets pass
            return real(self)
        with guard.allowed():
            return real(self)

    def late(value, where):
        found = resolve_precision(value, where)
        if found.has_scaler:
            found._reads_late = True
        return found

    monkeypatch.setattr(metrics, "read", read)
    monkeypatch.setattr(ScaledPrecision, "settle", settle)
    monkeypatch.setattr(opening, "resolve_precision", late)
    trainer = lk.Trainer(
        accelerator=device,
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=EVERY,
        logger=CSVLogger(tmp_path),
        callbacks=[guard, LearningRateMonitor("step")],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    task = Net(make)
    try:
        trainer.fit(task, loader(device))
    finally:
        guard.end()
    steps = STEPS // accumulate
    assert trainer.global_step == steps
    assert guard.batches == STEPS - 2 * accumulate
    assert len([n for n in flushes if n >= EVERY]) == steps // EVERY
    overflown = {15, 16, 25} if accumulate == 1 else {7, 8, 12}
    skipped = len(overflown) if precision == "16-mixed" else 0
    (entry,) = trainer.lr_schedulers
    assert entry.scheduler.last_epoch == steps - skipped
    assert all(torch.isfinite(p).all() for p in task.parameters())
    if skipped:
        assert trainer.session.precision.last_scale == 2.0 ** (16 - skipped)


@EVERYWHERE
def test_the_guard_sees_what_waits(device):
    guard = NoWaiting(device, 0, 1)
    value = torch.ones(2, device=device)
    guard.on_train_batch_start(None, None, None, 0)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            float(value[0])
        with guard.allowed():
            assert float(value[0]) == 1.0
        with pytest.raises((AssertionError, RuntimeError)):
            bool(value.sum() > 0)
    finally:
        guard.end()
    assert float(value[0]) == 1.0


@EVERYWHERE
def test_averages_statistics_and_monitors_wait_for_nothing(tmp_path, monkeypatch, device):
    """The first average is a copy, by which torch reads its counter; after that nothing is read."""
    guard = NoWaiting(device, 3, STEPS - 1)

    def read(values, real=metrics.read):
        with guard.allowed():
            return real(values)

    monkeypatch.setattr(metrics, "read", read)
    ema = EMA(0.9, use_buffers=True)
    trainer = lk.Trainer(
        accelerator=device,
        max_epochs=1,
        log_every_n_steps=EVERY,
        logger=CSVLogger(tmp_path),
        callbacks=[guard, ema, Statistics(2), ThroughputMonitor(), DeviceStatsMonitor()],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    try:
        trainer.fit(Plain(), loader(device))
    finally:
        guard.end()
    assert ema.updates == STEPS
    assert guard.batches == STEPS - 3
    rows = (tmp_path / "version_0" / "metrics.csv").read_text()
    assert "grad_norm/net" in rows
    assert "throughput/samples_per_second" in rows
