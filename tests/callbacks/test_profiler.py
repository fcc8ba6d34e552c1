"""The table of a run's parts: what is slow is in it, and the shares make up all of it."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import lightkit as lk
from lightkit.callbacks import SimpleProfiler
from lightkit.callbacks.profiler import table
from lightkit.errors import ConfigError
from lightkit.evaluation import may_break_off
from tests.clock import Clock, Slow
from tests.small import Net, loader


class SlowAdam(torch.optim.Adam):
    clock = None

    def step(self, closure=None):
        SlowAdam.clock.sleep(0.5)
        return super().step(closure)


class Backward(torch.autograd.Function):
    clock = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Backward.clock.sleep(0.25)
        return grad


class Task(Net):
    def __init__(self, clock):
        super().__init__()
        self.clock = SlowAdam.clock = Backward.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.sleep(3)
        return Backward.apply(super().training_step(batch, batch_idx))

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(5)
        return super().validation_step(batch, batch_idx)

    def on_validation_end(self):
        self.clock.sleep(0.125)

    def configure_optimizers(self):
        return SlowAdam(self.parameters(), lr=0.01)


class Mine(lk.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.clock.sleep(1)


@pytest.fixture
def clock(monkeypatch):
    moved = Clock(monkeypatch)
    monkeypatch.setattr("lightkit.callbacks.profiler._clock", moved)
    return moved


def rows(text):
    """The rows of a table as {part: (calls, total, mean, share)}."""
    found = {}
    for line in text.splitlines():
        if cells := re.fullmatch(r"(.+?) +(\d*) +([\d.:]+ ?\w*)  (.*?) +([\d.]+) %", line):
            found[cells[1].strip()] = (cells[2], cells[3], cells[4].strip(), float(cells[5]))
    return found


def test_each_part_of_a_fit_has_its_row(clock, tmp_path, quiet, caplog):
    caplog.set_level(logging.INFO, "lightkit")
    trainer = quiet(
        max_epochs=2, profiler="simple", callbacks=[Mine(clock)], enable_checkpointing=True
    )
    trainer.fit(Task(clock), Slow(clock, 2, 4), Slow(clock, 0.5, 3))
    text = (trainer.run_dir / "profile.txt").read_text()
    assert text.rstrip("\n") in [record.getMessage() for record in caplog.records]
    total = 8 * (2 + 3 + 0.25 + 0.5 + 1) + 2 * (3 * 5.5 + 0.125) + 2 * 5.5 + 0.125
    assert text.startswith(f"fit took {total:.1f} s\npart ")
    assert max(map(len, text.splitlines())) <= 80
    found = rows(text)
    for name, calls, each in (
        ("training_step", 8, 3),
        ("backward", 8, 0.25),
        ("SlowAdam.step", 8, 0.5),
        ("Mine.on_train_batch_end", 8, 1),
        ("validation_step", 8, 5),
        ("Task.on_validation_end", 3, 0.125),
    ):
        share = round(100 * calls * each / total, 1)
        assert (found[name][0], found[name][3]) == (str(calls), share), name
    assert found["data"][3] == round(100 * 16 / total, 1)
    assert found["validation data"][3] == round(100 * 3 / total, 1)
    assert found["training_step"][1:3] == ("24.0 s", "3.0 s")
    assert sum(row[3] for row in found.values()) == pytest.approx(100, abs=0.5)
    shares = [row[3] for row in list(found.values())[:-2]]
    assert shares == sorted(shares, reverse=True)


def test_a_fit_with_it_trains_the_same_bits_and_leaves_nothing_behind(quiet):
    def weights(**options):
        torch.manual_seed(3)
        task, trainer = Net(), quiet(max_epochs=2, **options)
        trainer.fit(task, loader(), loader())
        return task.net.weight, trainer

    plain, _ = weights()
    profiled, trainer = weights(profiler="simple", callbacks=[Look()])
    assert torch.equal(plain, profiled)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not any(hasattr(hook, "__wrapped__") for hook in trainer.session.hooks.on_train_start)


class Look(lk.Callback):
    """What must hold while a profiler is at work."""

    def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
        assert trainer.session.flow.times.instrumented
        assert may_break_off(trainer._run.validation)  # our own listeners are still ours


def test_evaluations_have_a_table_too(clock, quiet, tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightkit")
    trainer = quiet(profiler="simple", enable_checkpointing=True)
    task = Task(clock)
    trainer.validate(task, Slow(clock, 0.5, 4))
    (text,) = [r.getMessage() for r in caplog.records if " took " in r.getMessage()]
    assert text.startswith("validate took 22.1 s")
    assert rows(text)["validation_step"][0] == "4"
    assert rows(text)["validation data"][3] == 9.0
    trainer.fit(task, Slow(clock, 0.5, 2))
    trainer.test(task, Slow(clock, 0.5, 4))
    assert "validation_step" not in (trainer.run_dir / "profile.txt").read_text()
    assert "test_step" in (trainer.run_dir / "profile_test.txt").read_text()
    trainer.predict(task, torch.utils.data.DataLoader(torch.ones(4, 4), 2))
    assert "predict_step" in (trainer.run_dir / "profile_predict.txt").read_text()


def test_an_error_leaves_the_table_of_what_was_before_it(clock, quiet):
    class Fails(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ValueError
            return super().training_step(batch, batch_idx)

    trainer = quiet(profiler=SimpleProfiler(), enable_checkpointing=True)
    with pytest.raises(ValueError):
        trainer.fit(Fails(clock), Slow(clock, 2, 4))
    assert rows((trainer.run_dir / "profile.txt").read_text())["SlowAdam.step"][0] == "2"


def test_a_table_that_cannot_be_written_is_a_warning(quiet, caplog):
    class Blocks(lk.Callback):
        def on_fit_start(self, trainer, task):
            (trainer.run_dir / "profile.txt").mkdir()

    quiet(profiler="simple", callbacks=Blocks(), enable_checkpointing=True).fit(Net(), loader())
    assert "profile.txt could not be written: " in caplog.text


def test_fast_dev_run_writes_no_file_and_two_profilers_are_one_too_many(clock, quiet, tmp_path):
    quiet(fast_dev_run=2, profiler="simple").fit(Task(clock), Slow(clock, 2, 4))
    assert not list(tmp_path.rglob("profile*"))
    with pytest.raises(ConfigError, match="would show the same twice"):
        quiet(callbacks=[SimpleProfiler(), SimpleProfiler()])
    both = quiet(callbacks=[SimpleProfiler()], profiler="simple")
    both.fit(Task(clock), Slow(clock, 2, 4))
    assert sum(isinstance(c, SimpleProfiler) for c in both.callbacks) == 1


def test_small_parts_are_one_row():
    parts = {"big": (9.0, 3), "never": (0.0, 0), "one": (1e-3, 2), "two": (2e-3, 1)}
    assert table("fit", parts, 10.0).splitlines() == [
        "fit took 10.0 s",
        "part             calls   total   mean   share",
        "---------------------------------------------",
        "big                  3   9.0 s  3.0 s  90.0 %",
        "2 smaller parts         3.0 ms          0.0 %",
        "the rest                997 ms         10.0 %",
    ]
