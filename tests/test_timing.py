"""Each second of an epoch is in one part, and the parts make up the epoch."""

from __future__ import annotations

import contextlib
import functools

import pytest

import lightkit as lk
from lightkit import saving
from lightkit.evaluation import may_break_off
from lightkit.timing import KINDS, Times
from tests.clock import Clock, Slow
from tests.small import Net, loader


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def spent(**kinds):
    return pytest.approx({**dict.fromkeys(KINDS, 0.0), **kinds})


def test_time_within_an_inner_part_counts_there_alone(clock):
    times = Times()
    outer, inner = times.part("outer", "callbacks"), times.part("inner", "checkpoint")
    times.begin_epoch(clock(), 0.0)
    clock.sleep(1)
    with outer:
        clock.sleep(2)
        with inner:
            clock.sleep(4)
            with inner:  # the same thing again is no second call
                clock.sleep(8)
        clock.sleep(16)
    clock.sleep(32)
    assert (outer.seconds, inner.seconds) == (18, 12)
    assert (outer.calls, inner.calls) == (1, 1)
    assert times.epoch(clock(), 0.0) == spent(step=33, callbacks=18, checkpoint=12)


def test_a_part_that_is_open_counts_up_to_now(clock):
    times = Times()
    times.begin_epoch(clock(), 0.0)
    with times.validation:
        clock.sleep(3)
        assert times.epoch(clock(), 0.0) == spent(validation=3)
        clock.sleep(4)
    assert times.epoch(clock(), 0.0) == spent(validation=7)


def test_an_exception_leaves_nothing_open(clock):
    times = Times()
    times.begin_epoch(clock(), 0.0)

    def fails():
        clock.sleep(2)
        raise ValueError

    with pytest.raises(ValueError):
        times.timed(fails, times.part("it", "callbacks"))()
    clock.sleep(5)
    assert times.epoch(clock(), 0.0) == spent(callbacks=2, step=5)


@pytest.mark.parametrize("labelled", [False, True])
def test_what_a_caught_exception_leaves_open_ends_with_the_part_around_it(clock, labelled):
    """An optimizer's step that fails never comes to the hook after it."""
    times, ended = Times(), []

    class Label(contextlib.nullcontext):
        def __exit__(self, *error):
            ended.append(self.enter_result)

    times.label = Label if labelled else None
    outer, inner = times.part("outer", "callbacks"), times.part("inner", "callbacks")

    def caught():
        clock.sleep(1)
        times.enter(inner)
        clock.sleep(2)

    for _ in range(3):
        times.timed(caught, outer)()
        clock.sleep(4)
    assert outer.calls == inner.calls == 3
    assert outer.seconds + inner.seconds == 9
    assert ended == ["inner", "outer"] * 3 * labelled


def test_epochs_are_counted_apart_and_together(clock):
    times = Times()
    with times.validation:  # the sanity check, before the first epoch
        clock.sleep(50)
    for seconds in (1, 2):
        times.begin_epoch(clock(), 0.25)  # what the epoch before has waited
        with times.checkpoint:
            clock.sleep(seconds)
        clock.sleep(1)
    assert times.epoch(clock(), 0.5) == spent(step=0.5, checkpoint=2, data=0.5)
    assert times.all_epochs(clock(), 0.5) == spent(step=1.25, checkpoint=3, data=0.75)
    times.end(clock(), 0.5)
    clock.sleep(100)
    assert times.epoch(clock(), 0.5) == spent(step=0.5, checkpoint=2, data=0.5)


def test_a_device_that_still_had_work_was_not_kept_waiting(clock):
    times = Times()
    times.begin_epoch(clock(), 0.0)
    clock.sleep(3)  # for the loader
    times.waiting(clock.sleep, 2)
    assert times.epoch(clock(), 3.0) == spent(data=1, step=4)
    with times.validation:
        times.waiting(clock.sleep, 2)  # belongs to the validation
    with times.part("a profiler's", "step"):
        times.waiting(clock.sleep, 0.5)
    assert times.epoch(clock(), 3.0) == spent(data=0.5, step=5, validation=2)


class Task(Net):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.sleep(3)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(5)
        return super().validation_step(batch, batch_idx)

    def on_validation_end(self):
        self.clock.sleep(0.5)


class Busy(lk.Callback):
    def __init__(self, clock):
        self.clock, self.seen = clock, []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.clock.sleep(0.25)

    def on_train_epoch_end(self, trainer, task):
        self.clock.sleep(1)
        trainer.save_checkpoint(trainer.default_root_dir / "mine.ckpt")
        self.seen.append(trainer.epoch_times)


def test_every_second_of_an_epoch_is_counted_once(clock, monkeypatch, quiet):
    def save(*args, _save=saving.save, **kwargs):
        clock.sleep(7)
        return _save(*args, **kwargs)

    monkeypatch.setattr(saving, "save", save)
    busy = Busy(clock)
    trainer = quiet(max_epochs=2, callbacks=[busy], enable_checkpointing=True)
    begun = clock()
    trainer.fit(Task(clock), Slow(clock, 2, 4), Slow(clock, 0.125, 3))
    sanity = 2 * (0.125 + 5) + 0.5
    one = {
        "data": 4 * 2,
        "step": 4 * 3,
        "validation": 3 * (0.125 + 5),
        "callbacks": 4 * 0.25 + 1 + 0.5,
        "checkpoint": 7,  # of the callback; the Trainer's own follows
    }
    assert busy.seen == [spent(**one), spent(**one)]
    one["checkpoint"] += 7
    assert trainer.epoch_times == spent(**one)  # of the last epoch
    assert sum(trainer.epoch_times.values()) == pytest.approx((clock() - begun - sanity) / 2)
    clock.sleep(100)
    assert trainer.epoch_times == spent(**one)


def test_an_epoch_ends_with_an_error(clock, quiet):
    class Fails(Task):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ValueError("here")

    trainer = quiet()
    with pytest.raises(ValueError, match="here"):
        trainer.fit(Fails(clock), Slow(clock, 2, 4))
    clock.sleep(100)
    assert sum(trainer.epoch_times.values()) == 5  # to load a batch, and half of its step


def test_a_validation_within_an_epoch_is_not_the_step_of_it(clock, quiet):
    trainer = quiet(val_check_interval=2)
    trainer.fit(Task(clock), Slow(clock, 2, 4), Slow(clock, 0.125, 3))
    times = {"validation": 2 * 3 * 5.125, "callbacks": 2 * 0.5}
    assert trainer.epoch_times == spent(data=8, step=12, **times)


def test_samples_per_second_leaves_validations_out_and_a_short_batch_in(clock, quiet):
    seen = []

    class See(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            seen.append(trainer.samples_per_second)

    trainer = quiet(max_epochs=2, callbacks=[See()])
    assert trainer.samples_per_second is None
    trainer.fit(Task(clock), loader(18), loader(8))
    assert seen == [pytest.approx(18 / (5 * 3 + 0.5))] * 2  # with the hook of the validation
    trainer = quiet(callbacks=[See()], limit_train_batches=3)
    trainer.fit(Task(clock), loader(18))
    assert seen[-1] == pytest.approx(12 / 9)
    trainer.fit(Task(clock), Slow(clock, 1, 2))  # nobody knows how many samples these are
    assert seen[-1] is None
    assert trainer.memory > 1e7


def test_only_the_hooks_of_the_user_are_wrapped(quiet):
    class Mine(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            pass

    called = lk.callbacks.LambdaCallback(on_validation_batch_end=lambda *_: None)
    trainer = quiet(callbacks=[Mine(), called, lk.callbacks.Timer()])
    trainer.fit(Net(), loader(), loader())
    table = trainer.session.hooks
    names = [part.name for part in trainer.session.flow.times.parts if part.kind == "callbacks"]
    assert sorted(names) == ["LambdaCallback.on_validation_batch_end", "Mine.on_train_batch_end"]
    for name in ("on_train_batch_end", "on_train_start", "on_train_epoch_start"):
        for hook in getattr(table, name):
            assert isinstance(hook, functools.partial)
            wrapped = hasattr(hook.func, "__wrapped__")
            assert wrapped == ("Mine" in hook.func.__qualname__)


@pytest.mark.parametrize(("keeps", "allowed"), [(True, False), (False, True)])
def test_what_looks_at_hooks_sees_the_callback_behind_the_clock(quiet, keeps, allowed):
    class Keeps(lk.Callback):
        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
            assert may_break_off(trainer._run.validation) is allowed

        if keeps:

            def state_dict(self):
                return {"it": 1}

    quiet(callbacks=[Keeps()]).fit(Net(), loader(), loader())

    class Swaps(lk.Callback):
        def on_validation_start(self, trainer, task):
            assert not may_break_off(trainer._run.validation)

    quiet(callbacks=[Swaps()]).fit(Net(), loader(), loader())
