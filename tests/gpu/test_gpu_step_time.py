"""What a step on a GPU costs beside that of a loop written by hand, by the clock on the wall."""

from __future__ import annotations

import contextlib
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

import lightkit as lk

CHUNK = 20
#: The step is to cost what a hand-written one does; a shared machine needs room for noise.
LIMIT = 1.25


def network(width, device):
    layers = [m for _ in range(6) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10)).to(device)


class Net(lk.TaskModule):
    def __init__(self, width, device):
        super().__init__()
        self.net = network(width, device)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Hand:
    """The loop that people write, with the same formats, clipping and fused updates."""

    def __init__(self, width, device, precision):
        self.net, self.precision, self.device = network(width, device), precision, device
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "16-mixed")

    def autocast(self):
        if self.precision == "32":
            return contextlib.nullcontext()
        half = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self.device, dtype=half)

    def run(self, batch, steps):
        net, optimizer, scaler = self.net, self.optimizer, self.scaler
        for _ in range(steps):
            x, y = batch
            optimizer.zero_grad()
            with self.autocast():
                loss = functional.cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()


class Interleaved:
    """A loader that runs the other loop between its chunks, A B B A, and measures both."""

    def __init__(self, hand, batch, device, pairs, warmup=5):
        self.hand, self.batch, self.device = hand, batch, device
        self.pairs, self.warmup, self.ratios, self.seconds = pairs, warmup, [], []

    def __len__(self):
        return (self.pairs + self.warmup) * 2 * CHUNK

    def _now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __iter__(self):
        self.hand.run(self.batch, CHUNK)
        for pair in range(self.pairs + self.warmup):
            start = self._now()
            self.hand.run(self.batch, CHUNK)
            middle = self._now()
            for _ in range(2 * CHUNK):
                yield self.batch
            end = self._now()
            self.hand.run(self.batch, CHUNK)
            by_hand = middle - start + self._now() - end
            if pair >= self.warmup:
                self.ratios.append((end - middle) / by_hand)
                self.seconds.append(by_hand / 2 / CHUNK)


def measure(folder, device, precision, width, pairs):
    """Returns the median ratio to the hand-written step, and the latter's milliseconds."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, width, generator=generator).to(device)
    batch = (x, torch.randint(0, 10, (256,), generator=generator).to(device))
    loader = Interleaved(Hand(width, device, precision), batch, device, pairs)
    lk.Trainer(
        accelerator=device,
        precision=precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    ).fit(Net(width, device), loader)
    return statistics.median(loader.ratios), 1e3 * statistics.median(loader.seconds)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    ("device", "width", "pairs"),
    [
        pytest.param("cuda", 64, 60, marks=[pytest.mark.gpu, pytest.mark.slow], id="small on cuda"),
        pytest.param("cuda", 4096, 10, marks=[pytest.mark.gpu, pytest.mark.slow], id="large"),
        pytest.param("cpu", 16, 2, id="cpu"),
    ],
)
def test_a_step_beside_one_by_hand(tmp_path, capsys, device, precision, width, pairs):
    ratio, step = measure(tmp_path, device, precision, width, pairs)
    assert 0.0 < ratio < 20.0
    if device == "cuda":  # on the CPU only the measuring itself is tried
        with capsys.disabled():
            print(f"\n{precision}, width {width}: {ratio:.3f} of {step:.2f} ms by hand")
        assert ratio <= LIMIT
