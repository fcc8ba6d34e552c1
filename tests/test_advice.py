"""Hints: told once, with the right number, cause and fix, and only where it matters."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import lightkit as lk
from lightkit import advice, saving
from tests.clock import Clock
from tests.small import Net, loader

MEMORY = TensorDataset(torch.randn(8, 4), torch.randn(8, 1))


class Stream(IterableDataset):
    """Every worker reads all of it."""

    def __iter__(self):
        return iter(Files())


class Files(Dataset):
    """Samples that are loaded."""

    def __init__(self, clock=None, seconds=0.0, length=8):
        self.clock, self.seconds, self.length = clock, seconds, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if self.clock is not None:
            self.clock.sleep(self.seconds)
        return torch.ones(4), torch.ones(1)


class Task(Net):
    def __init__(self, clock, train=1.0, val=0.0):
        super().__init__()
        self.clock, self.train_seconds, self.val_seconds = clock, train, val

    def training_step(self, batch, batch_idx):
        self.clock.sleep(self.train_seconds)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(self.val_seconds)
        return super().validation_step(batch, batch_idx)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def told(caplog):
    """Returns the hints so far, as pairs of name and text."""
    caplog.set_level(logging.INFO, "lightkit")

    def hints():
        found = [r for r in caplog.records if hasattr(r, "hint")]
        assert all(r.name == "lightkit.hints" and r.levelname == "INFO" for r in found)
        assert all(r.getMessage().endswith(f" [{r.hint}]") for r in found)
        return [(r.hint, re.sub(r"^hint: +|\s\[.*$", "", r.getMessage())) for r in found]

    return hints


def test_waiting_for_data_is_told_once_with_share_cause_and_fix(clock, told, quiet, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    trainer = quiet(max_epochs=3)
    trainer.fit(Task(clock, 1.0), DataLoader(Files(clock, 0.5), 2))
    text = (
        "50 % of the time was spent waiting for data: num_workers=0 and 1.0 s per batch; "
        "try num_workers=2"
    )
    assert told() == [("slow-data", text)]


def test_a_later_fit_of_the_same_trainer_is_told_again(clock, told, quiet):
    trainer = quiet()
    for _ in range(2):
        trainer.fit(Task(clock, 1.0), DataLoader(Files(clock, 0.5), 2))
    assert [name for name, _ in told()] == ["slow-data"] * 2


def test_nothing_is_told_where_all_is_well(clock, told, quiet):
    trainer = quiet(max_epochs=3, enable_checkpointing=True)
    trainer.fit(Task(clock, 10.0, 1.0), DataLoader(Files(clock, 0.1), 2), loader())
    assert told() == []


def test_what_costs_less_than_a_second_is_not_worth_a_word(clock, told, quiet):
    trainer = quiet(max_epochs=2)
    trainer.fit(Task(clock, 0.01), DataLoader(Files(clock, 0.05), 2))
    assert told() == []  # 0.8 of 0.88 s
    trainer = quiet(max_epochs=3)
    trainer.fit(Task(clock, 0.01), DataLoader(Files(clock, 0.05), 2))
    assert told()[0][1].startswith("91 % of the time was spent waiting for data")


def test_hints_are_switched_off_by_their_logger(clock, told, quiet):
    logging.getLogger("lightkit.hints").setLevel(logging.WARNING)
    try:
        quiet().fit(Task(clock, 1.0), DataLoader(Files(clock, 0.5), 2))
    finally:
        logging.getLogger("lightkit.hints").setLevel(logging.NOTSET)
    assert told() == []


def test_validation_is_told_when_it_takes_more_than_half(clock, told, quiet):
    trainer = quiet(max_epochs=2)
    trainer.fit(Task(clock, 1.0, 1.0), loader(16), loader(20))
    text = (
        "56 % of the time went into validation: 1 of 5.0 s each; try check_val_every_n_epoch=2 "
        "or limit_val_batches"
    )
    assert told() == [("slow-validation", text)]


def test_a_validation_that_waits_is_told_to_load_faster_also_within_an_epoch(clock, told, quiet):
    seen = []

    class See(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(len(told()))

    trainer = quiet(val_check_interval=2, callbacks=[See()])
    slow = DataLoader(Files(clock, 3.0, 4), 2)
    trainer.fit(Task(clock, 1.0), loader(16), slow)
    assert seen == [0, 0, 1, 1]
    text = (
        "86 % of the time went into validation: 1 of 12 s each, most of it waiting for its loader "
        "with num_workers=0; try more workers there, or val_check_interval"
    )
    assert told() == [("slow-validation", text.replace("12 s", "12.0 s"))]


def test_saving_is_told_with_the_ways_out(clock, told, quiet, monkeypatch):
    def save(*args, _save=saving.save, **kwargs):
        clock.sleep(1)
        return _save(*args, **kwargs)

    monkeypatch.setattr(saving, "save", save)
    quiet(max_epochs=2, enable_checkpointing=True).fit(Task(clock, 1.0), loader(8))
    text = (
        "33 % of the time was spent saving: 1 time, 1.0 s each; try ModelCheckpoint("
        "async_save=True), or save less often (every_n_epochs=, every_n_train_steps=)"
    )
    assert told() == [("slow-checkpoints", text)]
    saver = lk.callbacks.ModelCheckpoint(async_save=True)
    quiet(max_epochs=2, callbacks=[saver], enable_checkpointing=True).fit(
        Task(clock, 1.0), loader(8)
    )
    assert told()[1][1].endswith(
        "1.0 s each; save less often (every_n_epochs=, every_n_train_steps=)"
    )


def test_the_slowest_callback_is_named(clock, told, quiet):
    class Little(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            clock.sleep(0.1)

    class Images(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            clock.sleep(0.4)

    quiet(max_epochs=2, callbacks=[Little(), Images()]).fit(Task(clock, 0.5), loader(20))
    text = (
        "50 % of the time was spent in callbacks: most in Images.on_train_batch_end, 5 calls of "
        "400 ms; do it less often"
    )
    assert told() == [("slow-callbacks", text)]


def test_workers_for_tensors_are_told_at_the_start(told, quiet):
    with_workers = DataLoader(MEMORY, 4, num_workers=1)
    quiet().fit(Net(), with_workers)
    text = (
        "the training data are in memory, and num_workers=1 sends each batch from one process to "
        "another; try num_workers=0 or lightkit.TensorLoader"
    )
    assert told() == [("workers-for-memory", text)]


def test_the_wait_for_starting_workers_is_told_apart(told, quiet, monkeypatch):
    """With workers that are slow to start, which no fake clock can see."""
    monkeypatch.setattr(advice, "_LEAST", 0.1)
    slow = DataLoader(Files(), 2, num_workers=1, worker_init_fn=_begin_slowly)
    quiet(max_epochs=2).fit(Net(), slow)
    ((name, text),) = told()
    assert name == "slow-data"
    pattern = (
        r"\d+ % of the time was spent waiting for data: [\d.]+ ms of it for the first batch of an "
        r"epoch, when num_workers=1 start; try persistent_workers=True"
    )
    assert re.fullmatch(pattern, text), text


def _begin_slowly(worker):
    import time

    time.sleep(0.3)


@pytest.mark.parametrize(
    ("given", "cores", "text"),
    [
        (DataLoader(Files(), 2), 8, "num_workers=0 and 6.0 ms per batch; try num_workers=3"),
        (DataLoader(Files(), 2), 2, "num_workers=0 and 6.0 ms per batch; try num_workers=1"),
        (
            DataLoader(Files(), 2),
            1,
            (
                "num_workers=0 and 6.0 ms per batch, with 1 core for this process; make a sample "
                "cheaper: decode and resize beforehand, augment on the device "
                "(on_after_batch_transfer)"
            ),
        ),
        (
            DataLoader(Files(), 2, num_workers=2),
            8,
            "num_workers=2 and 6.0 ms per batch; try num_workers=5",
        ),
        (
            DataLoader(MEMORY, 2),
            8,
            (
                "the data are in memory and come sample by sample, 6.0 ms per batch; try "
                "lightkit.TensorLoader"
            ),
        ),
        (
            DataLoader(ConcatDataset([Subset(MEMORY, [1]), MEMORY]), 2, num_workers=3),
            8,
            (
                "the data are in memory and come through 3 worker processes, 6.0 ms per batch; "
                "try lightkit.TensorLoader"
            ),
        ),
        (
            DataLoader(MEMORY, 2, collate_fn=lambda samples: samples),  # which may be what is slow
            8,
            "num_workers=0 and 6.0 ms per batch; try num_workers=3",
        ),
        (
            DataLoader(MEMORY, 2, sampler=WeightedRandomSampler([1.0] * 8, 8)),
            8,
            "num_workers=0 and 6.0 ms per batch; try num_workers=3",
        ),
        (
            DataLoader(Stream(), 2),
            8,
            (
                "num_workers=0 and 6.0 ms per batch; try num_workers=3, where each reads a part "
                "of its own (torch.utils.data.get_worker_info)"
            ),
        ),
        (
            [1, 2],
            8,
            "list takes 6.0 ms per batch; a torch DataLoader with num_workers loads beside the step",
        ),
    ],
)
def test_what_is_suggested_fits_the_loader(given, cores, text):
    assert advice.about_data(given, 0.6, 100, 0.4, 0.0, cores) == text


def test_a_long_epoch_is_looked_at_where_it_is_saved(clock, told, quiet):
    seen = []

    class See(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(len(told()))

    saver = lk.callbacks.ModelCheckpoint(every_n_train_steps=2)
    trainer = quiet(callbacks=[saver, See()], enable_checkpointing=True)
    trainer.fit(Task(clock, 1.0), DataLoader(Files(clock, 0.5), 2))
    assert seen == [0, 0, 1, 1]


def test_every_hint_stands_on_the_page():
    root = Path(__file__).parents[1]
    code = (root / "lightkit/advice.py").read_text() + (root / "lightkit/announce.py").read_text()
    said = set(re.findall(r'(?:\bsay\(trainer, |yield )"([\w-]+)"', code))
    assert {"slow-data", "workers-for-memory", "precision"} < said
    page = (root / "docs/profiling.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+-[\w-]+|precision)` \|", page, re.MULTILINE)) == said


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [advice.cores(n) for n in (1, 3, 8, 16)] == [8, 2, 1, 1]
