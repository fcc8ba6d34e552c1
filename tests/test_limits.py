"""How long a fit runs and when it validates, as numbers."""

from __future__ import annotations

from datetime import timedelta

import pytest

import lightkit as lk
from lightkit.errors import ConfigError
from lightkit.limits import Cadence, Limits, make_cadence, parse_duration
from lightkit.state import TrainState


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("00:00:00:05", 5),
        ("01:02:03:04", 86400 + 2 * 3600 + 3 * 60 + 4),
        ("90 min", 5400),
        ("1.5 hours", 5400),
        ("2 Hours", 7200),
        ("30s", 30),
        ("30 seconds", 30),
        ("2 days", 172800),
        (timedelta(minutes=2), 120),
        ({"hours": 1, "minutes": 1}, 3660),
    ],
)
def test_durations(given, seconds):
    assert parse_duration(given, "max_time") == seconds


@pytest.mark.parametrize(
    "given",
    ["", "soon", "5", "1.5.2 h", "10:20", "0 min", "00:00:00:00", {"weekss": 1}, timedelta(0), 5],
)
def test_what_is_no_duration_names_the_argument_and_the_forms(given):
    with pytest.raises(ConfigError, match="max_time="):
        parse_duration(given, "max_time")


def limits(**options) -> Limits:
    return lk.Trainer(logger=False, **options).limits


def test_without_any_limit_ten_epochs():
    t = lk.Trainer()
    assert (t.max_epochs, t.max_steps, t.limits.default_epochs) == (10, -1, True)


def test_one_limit_is_the_only_one():
    assert limits(max_steps=5) == Limits(-1, 5, 0, 0, None)
    assert limits(max_time="5 s") == Limits(-1, -1, 0, 0, 5.0)
    assert limits(max_epochs=2) == Limits(2, -1, 0, 0, None)
    assert limits(max_epochs=-1) == Limits(-1, -1, 0, 0, None)
    assert limits(max_epochs=3, max_steps=7, min_epochs=1, min_steps=2) == Limits(3, 7, 1, 2, None)


def test_more_epochs_than_the_default_may_be_asked_for_as_the_least():
    assert limits(min_epochs=12).max_epochs == 12


def test_fast_dev_run_is_one_epoch_whatever_else_was_asked_for():
    given = {"max_epochs": 50, "min_epochs": 3, "max_steps": 1000, "max_time": "1 h"}
    assert limits(fast_dev_run=3, **given) == Limits(1, -1, 0, 0, None)


@pytest.mark.parametrize(
    "given", [{"min_epochs": 3, "max_epochs": 2}, {"min_steps": 3, "max_steps": 2}]
)
def test_a_least_above_the_most(given):
    with pytest.raises(ConfigError, match="is more than max_"):
        lk.Trainer(**given)


def test_reached_and_may_stop():
    rule = Limits(2, 10, 1, 5, None)
    assert not rule.reached(TrainState(epoch=1, global_step=9))
    assert rule.reached(TrainState(epoch=2, global_step=9))
    assert rule.reached(TrainState(epoch=1, global_step=10))
    assert not rule.may_stop(TrainState(epoch=1, global_step=4))
    assert not rule.may_stop(TrainState(epoch=0, global_step=5))
    assert rule.may_stop(TrainState(epoch=1, global_step=5))
    assert not Limits(-1, -1, 0, 0, None).reached(TrainState(epoch=10**6, global_step=10**9))


@pytest.mark.parametrize(
    ("interval", "every", "batches", "expected"),
    [
        (None, 1, 10, Cadence("epoch", 1)),
        (None, 3, None, Cadence("epoch", 3)),
        (1.0, 2, 10, Cadence("epoch", 2)),
        (1, 1, 10, Cadence("batches", 1, 1)),
        (4, 2, 10, Cadence("batches", 4, 2)),
        (0.25, 1, 10, Cadence("batches", 2, 1)),
        (0.29, 1, 100, Cadence("batches", 29, 1)),
        (0.01, 1, 10, Cadence("batches", 1, 1)),
        (25, None, 10, Cadence("total", 25)),
        (4, 1, None, Cadence("batches", 4, 1)),
        ("500 steps", 1, 10, Cadence("steps", 500)),
        ("1 step", 1, None, Cadence("steps", 1)),
        ("10 min", 1, 10, Cadence("seconds", 600)),
        ("2 s", None, 10, Cadence("seconds", 2)),
    ],
)
def test_cadences(interval, every, batches, expected):
    assert make_cadence(interval, every, batches) == expected


@pytest.mark.parametrize(
    ("interval", "every", "batches", "text"),
    [
        (11, 1, 10, "longer than the epoch"),
        (0.5, 1, None, "has no length"),
        (None, None, 10, "needs val_check_interval"),
        ("0 steps", 1, 10, "val_check_interval='0 steps'"),
        ("often", 1, 10, "val_check_interval='often'"),
    ],
)
def test_cadences_that_cannot_be(interval, every, batches, text):
    with pytest.raises(ConfigError, match=text):
        make_cadence(interval, every, batches)


def test_epochs_are_counted_from_one():
    cadence = Cadence("epoch", 2)
    assert [cadence.due_after_epoch(e) for e in range(4)] == [False, True, False, True]
