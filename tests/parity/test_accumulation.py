"""Accumulation gives the gradient of the one big batch, ragged tails and weights included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Mean(lk.TaskModule):
    """A linear model whose loss is the mean over the valid samples of a batch."""

    scale = 1.0

    def __init__(self, weighted=False, optimizer=None):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.weighted = weighted

    def training_step(self, batch, batch_idx):
        x, y, valid = batch
        losses = self.scale * functional.mse_loss(self.net(x).squeeze(1), y, reduction="none")
        if not self.weighted:
            return losses.mean()
        return {"loss": (losses * valid).sum() / valid.sum().clamp(min=1), "weight": valid.sum()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    valid = (torch.rand(count, generator=generator) > 0.4).float()
    return TensorDataset(x, x.sum(1), valid)


def trained(batch_size, accumulate, tmp_path, *, count=23, weighted=False, **options):
    torch.manual_seed(1)
    task = Mean(weighted)
    lk.Trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    ).fit(task, DataLoader(data(count), batch_size=batch_size))
    return task


def assert_close(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [23, 24, 21])
def test_short_last_batches_count_by_their_samples(count, tmp_path):
    small = trained(3, 4, tmp_path, count=count)  # 12 samples a step; the tail is ragged twice
    assert_close(small, trained(12, 1, tmp_path, count=count))


def test_token_weights_equal_the_one_big_batch(tmp_path):
    assert_close(trained(3, 4, tmp_path, weighted=True), trained(12, 1, tmp_path, weighted=True))


def test_token_weights_under_fp16_scaling_equal_the_big_batch(tmp_path, monkeypatch):
    # Small enough losses that the first scale of 65536 overflows in neither run.
    monkeypatch.setattr(Mean, "scale", 1e-3)
    small = trained(3, 4, tmp_path, weighted=True, precision="16-mixed")
    big = trained(12, 1, tmp_path, weighted=True, precision="16-mixed")
    start = Mean()
    for p, q in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)  # fp16 products
    assert any(
        not torch.allclose(p, q, atol=1e-4)
        for p, q in zip(small.parameters(), start.parameters(), strict=True)
    )


def test_a_group_without_weight_is_skipped(tmp_path):
    class NoneValid(Mean):
        def training_step(self, batch, batch_idx):
            x, y, valid = batch
            return super().training_step((x, y, valid * 0), batch_idx)

    torch.manual_seed(1)
    task = NoneValid(weighted=True)
    before = [p.clone() for p in task.parameters()]
    trainer = lk.Trainer(max_epochs=1, accumulate_grad_batches=2, fast_dev_run=4)
    trainer.fit(task, DataLoader(data(23), batch_size=3))
    assert trainer.global_step == 0
    assert all(torch.equal(p, q) for p, q in zip(task.parameters(), before, strict=True))


def test_batches_that_are_skipped_leave_the_mean_of_the_others(tmp_path):
    class SkipsSecond(Mean):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    torch.manual_seed(1)
    task = SkipsSecond()
    reference = Mean()
    reference.load_state_dict(task.state_dict())
    loader = DataLoader(data(12), batch_size=3)
    lk.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    ).fit(task, loader)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for i, batch in enumerate(loader):
        if i % 2 == 0:
            optimizer.zero_grad()
            reference.training_step(batch, i).backward()
            optimizer.step()
    assert_close(task, reference)
