"""Killed at a named instant, started again by the same call: the run that was never killed.

Weights, states of optimizer, schedules and callbacks, random states, history, the rows of all three
loggers, the files that stay and the samples of each epoch are compared, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.faults.harness import KILLED, Outcome, ended, log_of
from tests.faults.victim import SAMPLES, Settings


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("batch_start", 9),
        ("backward", 10),
        ("before_step", 6),
        ("batch_end", 9),
        ("batch_end", 14),
        ("save_point", 6),
        ("saved", 6),
        ("validation_start", 2),
        ("validation_batch", 6),
        ("validation_end", 3),
        ("validation_end_late", 3),
        ("epoch_end", 1),
        ("epoch_end_late", 2),
        ("epoch_start", 2),
        ("train_end", 1),
        ("fit_end", 1),
    ],
)
def test_in_the_loop(dies_and_is_the_same, place, n):
    found = dies_and_is_the_same({"place": place, "n": n})
    assert found.folders == ["version_0"]  # it went on in its own folder


@pytest.mark.parametrize(
    "place", ["fit_start", "sanity_batch", "sanity_end", "train_start", "batch_start", "backward"]
)
def test_before_the_first_step(dies_and_is_the_same, place):
    dies_and_is_the_same({"place": place})


@pytest.mark.parametrize(
    ("place", "name", "n"),
    [
        ("half", "*", 4),
        ("fsync", "*.lightkit-tmp", 4),
        ("fsynced", "*.lightkit-tmp", 4),
        ("rename", "step*", 3),
        ("renamed", "step*", 3),
        ("fsync", "checkpoints", 3),
        ("linked", "*last*", 3),
        ("rename", "last*", 3),
        ("renamed", "last*", 3),
        ("renamed", "best*", 2),
        ("remove", "step*", 2),
    ],
)
def test_in_the_writing_of_a_checkpoint(dies_and_is_the_same, place, name, n):
    dies_and_is_the_same({"place": place, "name": name, "n": n})


@pytest.mark.parametrize(
    ("place", "name", "n"),
    [("half", "*", 4), ("rename", "step*", 3), ("rename", "last*", 3), ("remove", "step*", 2)],
)
def test_in_the_writer_in_the_background(dies_and_is_the_same, place, name, n):
    plan = {"place": place, "name": name, "n": n}
    dies_and_is_the_same(plan, saving={"async_save": True})


@pytest.mark.parametrize(
    ("place", "name"), [("rename", "run.json"), ("renamed", "run.json"), ("half", "*")]
)
def test_in_the_first_files_of_a_run(dies_and_is_the_same, place, name):
    dies_and_is_the_same({"place": place, "name": name})


def test_in_the_first_moments_of_the_run_that_goes_on(dies_and_is_the_same):
    dies_and_is_the_same(
        {"place": "batch_end", "n": 9},
        {"place": "fit_start"},
        {"place": "open", "name": "metrics*"},
        {"place": "rename", "name": "metrics.csv"},
        {"place": "train_start"},
        {"place": "batch_start"},
        {"place": "half"},
        {"place": "rename", "name": "last*"},
    )


@pytest.mark.parametrize("place", ["save_point", "saved", "epoch_end", "train_end", "fit_end"])
def test_at_the_end_within_an_epoch(dies_and_is_the_same, place):
    kill = {"place": place, "n": 3 if place == "epoch_end" else 17 if "save" in place else 1}
    dies_and_is_the_same(kill, patience=1000, options={"max_epochs": -1, "max_steps": 17})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patience": 1000, "options": {"max_epochs": 2}},
        {"patience": 1000, "options": {"max_epochs": -1, "max_steps": 17}},
    ],
    ids=["stopped early", "all epochs", "all steps"],
)
def test_a_finished_run_is_left_alone(lives, reference, tmp_path, settings):
    settings = Settings(root=str(tmp_path), **settings)
    lives.run(settings)
    before = stamps(tmp_path)
    different = reference(settings).differences(lives.run(settings))
    assert not different, "\n".join(different[:20])
    assert "nothing is left to train" in log_of(tmp_path)
    assert stamps(tmp_path) == before


def stamps(root):
    """Returns when each file of the runs was written, but for locks."""
    files = [p for p in root.glob("runs/**/*") if not p.name.startswith(".")]
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def test_a_finished_run_may_be_trained_longer(lives, reference, tmp_path):
    short = Settings(root=str(tmp_path), patience=1000, options={"max_epochs": 2})
    lives.run(short)
    longer = dataclasses.replace(short, options={"max_epochs": 4})
    different = reference(longer).differences(lives.run(longer))
    assert not different, "\n".join(different[:20])


@pytest.mark.parametrize(
    ("place", "name", "n"),
    [("rename", "last*", 11), ("rename", "best*", 3), ("remove", "step*", 9)],
)
def test_in_the_last_save_of_all(dies_and_is_the_same, place, name, n):
    dies_and_is_the_same({"place": place, "name": name, "n": n})


@pytest.mark.parametrize(("place", "n"), [("batch_end", 20), ("validation_batch", 9)])
def test_with_what_the_trainer_saves_by_itself(dies_and_is_the_same, place, n):
    dies_and_is_the_same({"place": place, "n": n}, saving=None)


def test_many_times_in_a_row(lives, reference, tmp_path):
    # These steps are so short that the disk would not answer before the next death.
    settings = Settings(root=str(tmp_path), saving={"async_save": False})
    kill = dataclasses.replace(settings, kill={"place": "batch_end", "n": 6})
    deaths = 0
    while (code := lives.live(kill)) == KILLED:
        deaths += 1
        assert deaths < 20, "it does not get on"
    assert code == 0, log_of(tmp_path)
    assert deaths >= 6
    assert not reference(settings).differences(Outcome.of(tmp_path))


@pytest.mark.parametrize("order", ["weighted", "sampler", "batches", "batch sampler", "generator"])
def test_ways_of_choosing_samples(dies_and_is_the_same, order):
    dies_and_is_the_same(
        {"place": "batch_end", "n": 9}, {"place": "validation_batch", "n": 6}, order=order
    )


def test_every_sample_once_per_epoch(dies_and_is_the_same):
    found = dies_and_is_the_same({"place": "batch_end", "n": 9}, {"place": "batch_end", "n": 9})
    for epoch in (0, 1):  # the third is left in its middle by EarlyStopping
        seen = [i for (e, _), (indices, _) in found.batches.items() if e == epoch for i in indices]
        assert sorted(seen) == list(range(SAMPLES))


WORKERS = pytest.mark.parametrize(
    "workers",
    [{"workers": 2}, {"workers": 2, "persistent": True}],
    ids=["workers", "persistent workers"],
)


@WORKERS
@pytest.mark.parametrize(("place", "n"), [("half", 4), ("validation_batch", 6)])
def test_with_workers(dies_and_is_the_same, workers, place, n):
    dies_and_is_the_same({"place": place, "n": n}, **workers)


@WORKERS
def test_with_workers_many_ways_and_times(dies_and_is_the_same, workers):
    kills = [{"place": "batch_end", "n": n} for n in (9, 8, 10)]
    dies_and_is_the_same(*kills, order="sampler", **workers)


def test_any_number_of_workers_gives_the_same(reference):
    one, two, four = (reference(Settings(root="", workers=n)) for n in (1, 2, 4))
    assert not one.differences(two)
    assert not one.differences(four)


def test_no_worker_outlives_its_run(lives, tmp_path):
    pids = []
    for persistent in (False, True):
        root, told = tmp_path / str(persistent), tmp_path / f"{persistent}.json"
        kill = {"place": "batch_end", "n": 9, "children": str(told)}
        settings = Settings(root=str(root), kill=kill, workers=2, persistent=persistent)
        assert lives.live(settings) == KILLED
        found = json.loads(told.read_text())
        assert len(found) == (4 if persistent else 2)  # those of the validation live on too
        pids += found
    assert not ended(pids, within=20.0)  # torch's workers look every 5 s


def test_a_worker_that_starts_while_its_run_dies(lives, tmp_path):
    told = tmp_path / "worker.json"
    kill = {"place": "worker_start", "children": str(told)}
    assert lives.live(Settings(root=str(tmp_path), kill=kill, workers=1)) == KILLED
    assert not ended(json.loads(told.read_text()), within=10.0)
