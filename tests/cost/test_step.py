"""What a step of the Trainer costs beside that of a loop written by hand."""

from __future__ import annotations

import collections
import statistics
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk

CHUNK = 20
BATCH = (torch.randn(8, 16), torch.randint(0, 4, (8,)))
OFF = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


class Bare(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Net(Bare):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss


class Measured(Bare):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        loss = functional.cross_entropy(scores, y)
        self.accuracy.update(scores, y)
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", self.accuracy)
        return loss


class Hand:
    """The loop that people write."""

    def __init__(self, measured=False):
        self.net = mlp()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        self.accuracy = MulticlassAccuracy(4) if measured else None

    def run(self, steps):
        net, optimizer, accuracy = self.net, self.optimizer, self.accuracy
        for _ in range(steps):
            x, y = BATCH
            optimizer.zero_grad()
            scores = net(x)
            loss = functional.cross_entropy(scores, y)
            loss.backward()
            optimizer.step()
            if accuracy is not None:
                accuracy.update(scores, y)


class Interleaved:
    """A loader that runs the other loop between its chunks: A B B A, by the thread's own clock."""

    def __init__(self, pairs, warmup=20, hand=None):
        self.pairs, self.warmup, self.ratios = pairs, warmup, []
        self.hand = Hand() if hand is None else hand

    def __len__(self):
        return (self.pairs + self.warmup) * 2 * CHUNK

    def __iter__(self):
        hand, clock = self.hand, time.thread_time
        hand.run(CHUNK)
        for pair in range(self.pairs + self.warmup):
            start = clock()
            hand.run(CHUNK)
            middle = clock()
            for _ in range(2 * CHUNK):
                yield BATCH
            end = clock()
            hand.run(CHUNK)
            if pair >= self.warmup:
                self.ratios.append((end - middle) / (middle - start + clock() - end))


def fit(loader, tmp_path, task=Net, **options):
    lk.Trainer(max_epochs=1, default_root_dir=tmp_path, **options).fit(task(), loader)


#: What runs, what is switched off, and the ratio of host time to the hand-written loop that is
#: promised. "all" is TensorBoard, metrics.jsonl, progress and checkpoints; the hand-written loop
#: updates the metric too and has nothing else.
LEVELS = {
    "bare": (Bare, OFF, 0.95),
    "log": (Net, OFF, 1.00),
    "all": (Net, {}, 1.05),
    "all with a metric": (Measured, {}, 1.05),
}


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_costs_no_more_than_a_hand_written_one(tmp_path, capsys, level):
    task, options, promised = LEVELS[level]
    medians = []
    for _ in range(5):
        loader = Interleaved(100, hand=Hand(measured=task is Measured))
        fit(loader, tmp_path, task, **options)
        medians.append(statistics.median(loader.ratios))
        if medians[-1] <= promised:
            break
    with capsys.disabled():
        print(f"\nstep, {level} / hand-written step: {min(medians):.3f}")
    assert min(medians) <= promised, medians


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Window:
    """A loader that opens something before the 51st batch and closes it before the 101st."""

    def __init__(self, begin, end):
        self.begin, self.end = begin, end

    def __len__(self):
        return 120

    def __iter__(self):
        for i in range(120):
            if i == 50:
                self.begin()
            if i == 100:
                self.end()
            yield BATCH


def python_calls(run):
    """Returns how many functions a run calls between what it marks, Python's and C's."""
    counts = collections.Counter()

    def profile(frame, event, argument):
        counts[event] += 1

    run(lambda: sys.setprofile(profile), lambda: sys.setprofile(None))
    return counts["call"] + counts["c_call"]


def test_calls_per_step(tmp_path):
    """A gate without noise: calls per step, all included, beyond those of the hand-written loop."""
    hand = Hand()

    def by_hand(begin, end):
        hand.run(5)
        begin()
        hand.run(50)
        end()

    ours = python_calls(lambda begin, end: fit(Window(begin, end), tmp_path)) / 50
    theirs = python_calls(by_hand) / 50
    # Every call costs 0.1 to 0.3 us; torch's own make up some 180 of a step of 120 us, and those
    # of its wrappers that are left out are more than all of ours.
    assert ours - theirs <= -20, (ours, theirs)


def test_dispatches_per_step(tmp_path):
    """What reaches torch: two detached losses and the reads of a row come, more falls away."""
    mode = Counting()
    fit(Window(mode.__enter__, lambda: mode.__exit__(None, None, None)), tmp_path, fused=False)
    ours = mode.count / 50
    hand, mode = Hand(), Counting()
    with mode:
        hand.run(50)
    assert ours - mode.count / 50 <= -1.9, (ours, mode.count / 50)
