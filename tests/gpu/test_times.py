"""Times on a GPU, whose host runs ahead: what was no waiting is not told as waiting."""

from __future__ import annotations

import gzip
import json
import time

import pytest
import torch
from torch import nn

import lightkit as lk

pytestmark = pytest.mark.gpu


class Product(lk.TaskModule):
    """A step of one matrix product, whose width says how long the device is busy with it."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(width, width, bias=False)

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Slow:
    """Batches on the device that each take two milliseconds."""

    def __init__(self, width):
        self.width = width

    def __len__(self):
        return 100

    def __iter__(self):
        batch = torch.ones(self.width, self.width, device="cuda")
        for _ in range(100):
            time.sleep(0.002)
            yield batch


def times_of(quiet, width):
    """Returns times, wait and memory of an epoch after the first, which loads kernels."""
    seen = []

    class See(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            seen.append((trainer.epoch_times, trainer.data_wait, trainer.memory))

    trainer = quiet(gpus=1, max_epochs=2, callbacks=[See()], log_every_n_steps=10)
    trainer.fit(Product(width), Slow(width))
    return seen[-1]


def test_a_device_that_is_busy_meanwhile_does_not_wait_for_data(quiet):
    times, waited, memory = times_of(quiet, 8192)  # tens of milliseconds per step
    assert waited > 0.2  # the host did wait
    assert times["data"] < 0.02 * sum(times.values())
    assert memory > 8192 * 8192 * 4


def test_a_device_with_nothing_to_do_waits(quiet):
    times, waited, _ = times_of(quiet, 16)
    assert times["data"] > 0.9 * waited
    assert times["data"] > 0.3 * sum(times.values())


def test_the_trace_has_what_the_device_did(quiet):
    trainer = quiet(gpus=1, profiler=lk.callbacks.TraceProfiler(steps=(5, 8)))
    trainer.fit(Product(256), Slow(256))
    (path,) = (trainer.run_dir / "profile").glob("*.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(e.get("cat") == "kernel" for e in events) >= 3 * 2  # forward and backward
    assert {e["name"] for e in events} >= {"training_step", "backward", "SGD.step"}
    operators = (trainer.run_dir / "profile" / "rank0_steps_5-7_operators.txt").read_text()
    assert "Self CUDA" in operators
