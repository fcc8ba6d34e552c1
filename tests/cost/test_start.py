"""What a fit costs around its steps: the start, the turn of an epoch, and what must not grow.

By the process's own clock and the least of several tries, so that a loaded machine does not matter
much; the gates are generous, and the calls that are counted have no noise at all.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from tests.cost.test_step import BATCH, OFF, Interleaved, Net, fit

#: Seconds, as promised; a shared machine is allowed twice as much.
START, BOUNDARY, NOISE = 0.050, 0.005, 2


class Clock:
    """Process time until it is stopped, without what garbage collections take."""

    def __init__(self) -> None:
        self.collecting = self.seconds = 0.0
        gc.callbacks.append(self._collects)
        self.began = time.process_time()

    def _collects(self, phase: str, info: dict[str, int]) -> None:
        self.collecting += time.process_time() * (1 if phase == "stop" else -1)

    def stop(self) -> None:
        if self._collects in gc.callbacks:
            self.seconds = time.process_time() - self.began - self.collecting
            gc.callbacks.remove(self._collects)


class Deep(lk.TaskModule):
    """Notes when its first step begins."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        self.clock = Clock()

    def training_step(self, batch, batch_idx):
        self.clock.stop()
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(steps: int) -> DataLoader:
    x, y = torch.randn(8 * steps, 16), torch.randint(0, 4, (8 * steps,))
    return DataLoader(TensorDataset(x, y), 8, shuffle=True)


def by_hand(layers: int, loader: DataLoader) -> float:
    task = Deep(layers)
    task.clock = Clock()
    task.configure_optimizers()
    task.train()
    next(iter(loader))
    task.clock.stop()
    return task.clock.seconds


def to_first_step(layers: int, folder: str, **options) -> float:
    """Returns process seconds from a call of ``fit`` to the first step, beyond a loop by hand."""
    loader, ours, theirs = data(4), [], []
    for _ in range(5):
        theirs.append(by_hand(layers, loader))
        task = Deep(layers)
        task.clock = Clock()
        lk.Trainer(max_steps=1, default_root_dir=folder, **options).fit(task, loader)
        ours.append(task.clock.seconds)
    return min(ours) - min(theirs)


@pytest.mark.parametrize("layers", [2, 500])
def test_from_fit_to_the_first_step(layers, tmp_path, capsys):
    bare, full = (to_first_step(layers, str(tmp_path), **more) for more in (OFF, {}))
    with capsys.disabled():
        print(f"\n{2 * layers} tensors: {bare * 1e3:.1f} ms bare, {full * 1e3:.1f} with all on")
    assert bare <= START * NOISE
    assert full <= START * NOISE


@pytest.mark.parametrize("level", ["bare", "all but checkpoints"])
def test_from_one_epoch_to_the_next(level, tmp_path, capsys):
    """From the end of an epoch's last step to the first step of the next, without workers."""

    class Turns(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0 and self.trainer.current_epoch:
                seconds.append(time.process_time() - self.ended)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 9:
                self.ended = time.process_time()

    seconds: list[float] = []
    options = OFF if level == "bare" else {"enable_checkpointing": False}
    lk.Trainer(max_epochs=30, default_root_dir=tmp_path, **options).fit(Turns(), data(10))
    median = statistics.median(seconds)
    with capsys.disabled():
        print(f"\nfrom one epoch to the next, {level}: {median * 1e3:.2f} ms")
    assert median <= BOUNDARY


# --- what must not grow --------------------------------------------------------------------------


class Calls:
    """Counts the calls of functions, Python's and C's, between `begin` and `end`."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def begin(self) -> None:
        self.found.append(0)
        sys.setprofile(self._count)

    def end(self) -> None:
        sys.setprofile(None)

    def _count(self, frame, event, argument) -> None:
        self.found[-1] += 1


class Windows(Calls):
    """A loader that counts the calls of 50 steps, from several places on."""

    def __init__(self, *starts: int) -> None:
        super().__init__()
        self.starts = starts

    def __len__(self) -> int:
        return max(self.starts) + 60

    def __iter__(self):
        for i in range(len(self)):
            if i in self.starts:
                self.begin()
            if i - 50 in self.starts:
                self.end()
            yield BATCH


def calls(*starts: int, **options) -> list[int]:
    windows = Windows(*starts)
    lk.Trainer(max_epochs=1, **OFF, **options).fit(Net(), windows)
    return windows.found


def test_the_ten_thousandth_step_calls_what_the_hundredth_does():
    early, late = calls(100, 10_000)
    assert early == late


def test_callbacks_that_do_not_listen_to_steps_cost_a_step_nothing():
    class Silent(lk.Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_fit_start(self, trainer, task):
            pass

    with_callbacks = [calls(100, callbacks=[Silent(i) for i in range(n)]) for n in (0, 5, 50)]
    assert with_callbacks[0] == with_callbacks[1] == with_callbacks[2]


def test_a_late_step_takes_as_long_as_an_early_one(tmp_path):
    """Beside the loop by hand, so that both meet what else the machine does."""
    for _ in range(5):
        loader = Interleaved(300)
        fit(loader, tmp_path)
        early, late = (statistics.median(r) for r in (loader.ratios[:60], loader.ratios[-60:]))
        if late <= early + 0.03:
            break
    assert late <= early + 0.06, (early, late)


def test_the_hundredth_epoch_calls_what_the_third_does():
    class Epochs(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            counted.begin()

        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            counted.end()

        def on_train_end(self, trainer, task):
            counted.end()

    counted = Calls()
    trainer = lk.Trainer(max_epochs=100, callbacks=Epochs(), **OFF)
    trainer.fit(Net(), DataLoader(TensorDataset(*BATCH), 8))
    assert len(trainer.history) == 100
    assert counted.found[2] == counted.found[98]


# --- what a fit leaves behind --------------------------------------------------------------------


def test_a_small_fit_collects_no_garbage(tmp_path, monkeypatch):
    """A search over hyperparameters makes hundreds of them."""
    found = []
    for most in (1, 2):
        before = gc.get_stats()[2]["collections"]
        monkeypatch.setattr("lightkit.calls.SMALL_STEPS", most)
        lk.Trainer(max_steps=2, default_root_dir=tmp_path, **OFF).fit(Net(), data(2))
        found.append(gc.get_stats()[2]["collections"] - before)
    assert found == [1, 0]


def test_nothing_of_a_fit_stays_frozen(tmp_path, monkeypatch):
    """Garbage of the first fit is collected by the second, and nothing by ``gc.freeze`` for ever."""
    monkeypatch.setattr("lightkit.calls.SMALL_STEPS", 0)
    before, gone = gc.get_freeze_count(), []
    for _ in range(3):
        task = Net()
        task.itself = [task]  # a cycle, as tasks have them
        lk.Trainer(max_steps=2, default_root_dir=tmp_path, **OFF).fit(task, data(2))
        gone.append(weakref.ref(task.net))
        del task
    assert gc.get_freeze_count() == before
    assert [ref() is None for ref in gone[:2]] == [True, True]
    gc.collect()
    assert gone[2]() is None
