"""Batches that come to a GPU beside the steps, and tensors that live there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import feeds
from lightkit.data.prefetch import SideStream, lane_of
from tests.gpu.waiting import NoWaiting

pytestmark = pytest.mark.gpu
BATCHES, SIZE, WIDTH = 30, 64, 2048


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCHES * SIZE, WIDTH, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(BATCHES * SIZE)


class Slow(lk.TaskModule):
    """Keeps the device busy in each step, so that copies run beside it; sums what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 1))
        self.register_buffer("busy", torch.randn(WIDTH, WIDTH))
        self.sums: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        busy = self.busy
        for _ in range(20):
            busy = busy @ self.busy / WIDTH
        self.sums.append((x.double().sum(1) + busy.sum() * 0).detach())
        self.ids.append(y.clone())
        return self.net(x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loaders(kind: str):
    x, y = data()
    if kind == "tensors":
        return lk.TensorLoader(x, y, batch_size=SIZE, shuffle=True, pin_memory=True)
    workers = 2 if kind == "workers" else 0
    how = {"num_workers": workers, "persistent_workers": bool(workers), "pin_memory": True}
    return DataLoader(TensorDataset(x, y), SIZE, shuffle=True, **how)


def run(kind: str, tmp_path, **options):
    lk.seed_everything(1, verbose=False)
    task = Slow()
    trainer = lk.Trainer(
        accelerator="cuda",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(task, loaders(kind), loaders(kind))
    x = data()[0].double().sum(1)
    for sums, ids in zip(task.sums, task.ids, strict=True):  # every batch had arrived
        torch.testing.assert_close(sums.cpu(), x[ids.cpu()], rtol=0, atol=1e-6)
    weights = [p.detach().cpu() for p in task.parameters()]
    return torch.cat(task.ids).tolist(), weights, torch.rand(2)


@pytest.mark.parametrize("kind", ["tensors", "workers"])
def test_no_bit_changes(tmp_path, monkeypatch, kind):
    made = []
    monkeypatch.setattr(feeds, "lane_of", lambda device: made.append(device) or lane_of(device))
    found = run(kind, tmp_path)
    assert len(made) == 2
    wanted = run(kind, tmp_path, prefetch=False)
    assert len(made) == 2
    assert found[0] == wanted[0]
    assert all(map(torch.equal, found[1], wanted[1]))
    assert torch.equal(found[2], wanted[2])


def test_reading_in_this_process_may_be_ahead(tmp_path):
    assert run("one process", tmp_path, prefetch=True)[0] == run("one process", tmp_path)[0]


def test_a_copy_is_begun_and_arrives():
    lane = SideStream(torch.device("cuda"))
    pinned, other = torch.arange(1 << 20).pin_memory(), torch.ones(3)
    for _ in range(20):
        found, same = lane.send([pinned, other])
        lane.arrive()
        assert found.device.type == "cuda"
        assert same is other  # not pinned: the step moves it
        assert torch.equal(found.cpu(), pinned)
        del found


def test_nothing_waits(tmp_path):
    guard = NoWaiting("cuda", 3, BATCHES - 2)
    trainer = lk.Trainer(
        accelerator="cuda",
        max_epochs=1,
        log_every_n_steps=1000,
        callbacks=guard,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    try:
        trainer.fit(Slow(), loaders("tensors"))
    finally:
        guard.end()
    assert guard.batches == BATCHES - 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_tensors_that_live_on_the_device(shuffle):
    x, y = data()
    there = lk.TensorLoader(x, y, batch_size=50, shuffle=shuffle, device="cuda")
    here = lk.TensorLoader(x, y, batch_size=50, shuffle=shuffle)
    for _ in range(2):
        found = []
        for loader in (there, here):
            torch.manual_seed(2)
            found.append([*loader])
        for one, two in zip(*found, strict=True):
            assert all(tensor.device.type == "cuda" for tensor in one)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(one, two, strict=True))
    assert there.dataset.tensors[0].device.type == "cuda"


def test_pinned_batches():
    x, y = data()
    for batch in lk.TensorLoader(x, y, batch_size=50, shuffle=True, pin_memory=True):
        assert all(tensor.is_pinned() for tensor in batch)
        assert torch.equal(batch[0], x[batch[1]])
