"""The proof that users run on their own task: silent where all is well, clear where it is not."""

from __future__ import annotations

import logging
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightkit as lk
from lightkit import differences
from lightkit.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightkit.errors import UsageError
from lightkit.testing import assert_resumes_exactly


class Data(Dataset):
    """Augments by all three global random states; ``counts``: by a number of its own instead."""

    def __init__(self, samples=22, counts=False):
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
        self.count = 0 if counts else None

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.count is not None:
            self.count += 1
            noise = self.count / 10
        else:
            noise = np.random.normal() + random.random() + float(torch.randn(()))
        return self.x[index] + 0.1 * noise, self.x[index].sum(0, keepdim=True)


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0].float()), batch[1])

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0].float()), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Counting(Net):
    """Keeps a number that changes the loss and that no checkpoint knows."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        return super().training_step(batch, batch_idx) * (1 + 0.1 * self.calls)


def loaders(workers=0, **options):
    data = Data(**options)
    val = TensorDataset(data.x[:6] + 1, data.x[:6, :1])
    return DataLoader(data, 4, shuffle=True, num_workers=workers), DataLoader(val, 4)


def refused(*given, **options) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_resumes_exactly(*given, **options)
    return str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_good_task_passes(workers):
    assert_resumes_exactly(Net(), *loaders(workers))


def test_with_all_that_a_run_may_have(tmp_path):
    callbacks = [
        EarlyStopping("val_loss", patience=4),
        LearningRateMonitor(),
        ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, every_n_train_steps=2),
        Timer(),
    ]
    assert_resumes_exactly(
        Net(), *loaders(), at=[2, 3, 4], max_epochs=3, callbacks=callbacks,
        accumulate_grad_batches=2, val_check_interval=2, gradient_clip_val=0.5,
        enable_progress_bar=True, logger=True, default_root_dir=tmp_path,
    )  # fmt: skip
    assert [*tmp_path.iterdir()] == []


def test_everything_that_was_given_stays_as_it_was(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "lightkit")
    task, given = Net(), loaders()
    given[0].generator = torch.Generator().manual_seed(5)
    before = [p.clone() for p in task.parameters()]
    drawn = given[0].generator.get_state()
    lk.seed_everything(7, verbose=False)
    expected = (torch.rand(1), np.random.rand(), random.random())
    lk.seed_everything(7, verbose=False)
    assert_resumes_exactly(task, *given, limit_train_batches=3)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert torch.equal(given[0].generator.get_state(), drawn)
    assert [*tmp_path.iterdir()] == []
    assert capsys.readouterr().out == capsys.readouterr().err == "" == caplog.text
    assert logging.getLogger("lightkit").level == logging.INFO
    with pytest.raises(lk.LightkitError):
        _ = task.trainer


def test_a_counter_that_no_checkpoint_holds():
    said = refused(Counting(), *loaders())
    assert said.startswith("Stopped and resumed at step 2 (epoch 1, after 2 batches), the run does")
    assert re.search(r"row of step 3\.train_loss: \S+ in the whole run, .* \(apart by", said)
    assert "model.net.0.weight: 24 of 24 numbers differ, by up to" in said
    assert "The data up to there are the same." in said
    assert "a plain Python attribute or tensor (register_buffer" in said


def test_a_counter_that_the_checkpoint_holds():
    class Kept(Counting):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["calls"] = self.calls

        def on_load_checkpoint(self, checkpoint):
            self.calls = checkpoint["calls"]

    assert_resumes_exactly(Kept(), *loaders())


def test_a_data_set_that_counts():
    said = refused(Net(), *loaders(counts=True), at=6)
    assert "training batch 0 of epoch 2: it holds other data in the resumed run" in said
    assert "The data differ before anything is computed from them." in said


def test_a_run_that_does_not_even_repeat_itself():
    calls = []

    class Global(Net):
        def training_step(self, batch, batch_idx):
            calls.append(0)
            return super().training_step(batch, batch_idx) * len(calls)

    said = refused(Global(), *loaders())
    assert "Nor does the run repeat itself: a second one from the start" in said
    assert "deterministic=True" in said


def test_only_a_callback_differs():
    class Rising(lk.Callback):
        def __init__(self):
            self.steps, self.most = 0, 0

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.steps += 1
            self.most = max(self.most, self.steps)

        def state_dict(self):
            return {"most": self.most}

        def load_state_dict(self, state_dict):
            self.most = state_dict["most"]

    said = refused(Net(), *loaders(), callbacks=Rising())
    assert "Rising.most: 12 in the whole run, 10 in the resumed one (apart by 2)" in said
    assert "Only callbacks differ." in said
    assert_resumes_exactly(Net(), *loaders(), callbacks=Rising, ignore=["callbacks.*Rising.most"])


def test_only_random_states_differ():
    class Draws(lk.Callback):
        def on_fit_end(self, trainer, task):
            torch.manual_seed(int(task.first))

        def on_train_start(self, trainer, task):
            task.first = trainer.global_step

    said = refused(Net(), *loaders(), callbacks=[Draws()])
    assert "rng.0.torch: " in said
    assert "Only random states differ." in said


def test_a_buffer_that_is_not_saved():
    class Buffered(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen += 1

    said = refused(Buffered(), *loaders())
    assert "buffers (persistent=False).seen: 1 of 1 numbers differ, by up to 2" in said
    assert "make it persistent" in said


def test_a_checkpoint_that_cannot_be_resumed():
    class Broken(Net):
        def on_load_checkpoint(self, checkpoint):
            raise KeyError("calls")

    said = refused(Broken(), *loaders())
    assert said == "Resuming at step 2 (epoch 1, after 2 batches) failed: KeyError: 'calls'"


def test_what_cannot_be_copied_is_made():
    class Locked(Net):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(UsageError, match=r"task cannot be copied .* task=lambda: \.\.\."):
        assert_resumes_exactly(Locked(), *loaders())
    assert_resumes_exactly(Locked, lambda: loaders()[0], lambda: loaders()[1])


def test_data_that_cannot_be_copied_are_shared():
    class Locked(Data):
        def __init__(self, **options):
            super().__init__(**options)
            self.lock = threading.Lock()

    assert_resumes_exactly(Net(), DataLoader(Locked(), 4, shuffle=True))
    said = refused(Counting(), DataLoader(Locked(), 4, shuffle=True))
    assert "(train_dataloaders could not be copied, so the runs shared it: TypeError" in said


def test_a_data_module_and_batches_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return (torch.rand(4) for _ in range(12))

    class Both(lk.DataModule):
        def train_dataloader(self):
            return DataLoader(Stream(), 2)

    class Plain(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

    assert_resumes_exactly(Plain(), datamodule=Both())
    assert_resumes_exactly(Plain, datamodule=Both, max_epochs=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": 0}, "at=0; it must be numbers of optimizer steps, from 1 on"),
        ({"at": []}, r"at=\[\]"),
        ({"at": [2, 12, 99]}, r"at=\[12, 99\]: the run ends at step 12; stop it before"),
        ({"fast_dev_run": True}, "limit_train_batches"),
        ({"max_steps": 1}, "ended at step 1, without a place to stop at before"),
        ({"train_dataloaders": iter([])}, "only once.*train_dataloaders=lambda"),
    ],
)
def test_what_cannot_be_tried(options, said):
    given = dict(zip(("train_dataloaders", "val_dataloaders"), loaders(), strict=True))
    with pytest.raises(UsageError, match=said):
        assert_resumes_exactly(Net(), **given | options)


def test_an_error_of_the_run_itself_is_left_alone():
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        assert_resumes_exactly(Wrong(), *loaders())


def test_importing_lightkit_leaves_it_out():
    code = "import sys, lightkit; print('lightkit.testing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), []),
        (float("nan"), float("nan"), []),
        (torch.tensor([1, 2]), torch.tensor([1, 5]), ["1 of 2 numbers differ, by up to 3"]),
        (torch.tensor([True]), torch.tensor([False]), ["1 of 1 numbers differ, by up to 1"]),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), ["1 of 2 numbers differ"]),
        (torch.zeros(2), torch.zeros(3), [r"float32\[2\] in the whole run, float32\[3\]"]),
        ({"a": 1}, {"b": 1}, ["only in the whole run", "only in the resumed run"]),
        ([1, 2, 3], [1, 4, 5], ["2 in the whole run, 4 in the resumed one"]),
        ((1,), [1, 2], ["1 entries in the whole run, 2 in the resumed one"]),
        ("x", None, ["'x' in the whole run, None in the resumed one"]),
    ],
)
def test_differences(one, two, said):
    found = [how for _, how in differences.compare(one, two, "x", [])]
    assert len(found) == len(said)
    assert all(re.match(pattern, how) for pattern, how in zip(said, found, strict=True))
