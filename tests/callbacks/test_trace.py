"""The trace of some steps: a file that can be opened, with those steps and all labels."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lightkit as lk
from lightkit.callbacks import SimpleProfiler, TraceProfiler
from lightkit.errors import ConfigError, UsageError
from tests.small import Net, loader


def read(path):
    """The labels of a trace, with the step that each lies in, or None."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    labels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "user_annotation"]
    steps = {
        int(e["name"].partition("#")[2]): (e["ts"], e["ts"] + e["dur"])
        for e in labels
        if e["name"].startswith("ProfilerStep#")
    }
    found = {}
    for event in labels:
        inside = [n for n, (begin, end) in steps.items() if begin <= event["ts"] <= end]
        found.setdefault(event["name"], []).append(inside[0] if inside else None)
    return steps, found, events


def files(trainer):
    return sorted(path.name for path in (trainer.run_dir / "profile").iterdir())


class Task(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def test_the_default_records_five_steps_with_labels(quiet, caplog):
    caplog.set_level(logging.INFO, "lightkit")
    trainer = quiet(profiler="trace")
    trainer.fit(Task(), loader(80), loader())
    name = "rank0_steps_10-14.pt.trace.json.gz"
    assert files(trainer) == [name, "rank0_steps_10-14_operators.txt"]
    path = trainer.run_dir / "profile" / name
    assert f"trace:    {path} (open it at https://ui.perfetto.dev)" in caplog.messages
    steps, found, events = read(path)
    wanted = list(range(10, 15))
    assert sorted(steps) == wanted
    for label in (
        *("data", "training_step", "backward", "Adam.step", "Task.on_train_batch_end"),
        "MetricLog.on_train_batch_end",
    ):
        assert found[label] == wanted, label
    assert "validation_step" not in found
    assert {e["name"] for e in events if e.get("cat") == "cpu_op"} >= {"aten::addmm"}
    table = (trainer.run_dir / "profile" / files(trainer)[1]).read_text()
    assert "aten::addmm" in table


def test_steps_are_chosen_and_what_lies_between_them_is_labelled(quiet):
    profiler = TraceProfiler(steps=(4, 6), warmup=1)
    trainer = quiet(profiler=profiler, max_epochs=2, enable_checkpointing=True)
    trainer.fit(Task(), loader(), loader(8))  # epochs of 5 steps
    steps, found, _ = read(trainer.run_dir / "profile" / "rank0_steps_4-5.pt.trace.json.gz")
    assert sorted(steps) == [4, 5]
    assert found["training_step"] == [4, 5]
    assert found["validation"] == [5]  # between them
    assert found["validation_step"] == found["validation data"][:2] == [5, 5]
    assert found["checkpoint"] == [5]


def test_from_the_first_step_to_the_end_and_with_accumulation(quiet, recwarn):
    trainer = quiet(profiler=TraceProfiler(steps=(0, 100)), accumulate_grad_batches=2)
    trainer.fit(Task(), loader())
    _, found, _ = read(trainer.run_dir / "profile" / "rank0_steps_0-99.pt.trace.json.gz")
    assert found["training_step"] == [0, 0, 1, 1, 2]
    assert found["Adam.step"] == [0, 1, 2]
    assert not recwarn.list


def test_manual_optimization_and_the_table_beside_it(quiet):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callbacks = [TraceProfiler(steps=(1, 3)), SimpleProfiler()]
    trainer = quiet(callbacks=callbacks)
    trainer.fit(Manual(), loader())
    _, found, _ = read(trainer.run_dir / "profile" / "rank0_steps_1-2.pt.trace.json.gz")
    assert found["training_step"] == found["Adam.step"] == [1, 2]
    table = (trainer.run_dir / "profile.txt").read_text().splitlines()
    assert [line.split()[1] for line in table if line.startswith("training_step")] == ["5"]


def test_it_trains_the_same_bits_and_takes_everything_away(quiet):
    def weights(**options):
        torch.manual_seed(3)
        task, trainer = Net(), quiet(max_epochs=2, **options)
        trainer.fit(task, loader(), loader())
        return task.net.weight, trainer

    seen = []

    class Look(lk.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            times, run = trainer.session.flow.times, trainer._run
            on = times.label is not None
            assert on == times.instrumented == hasattr(run.training_step, "__wrapped__")
            assert on == bool(run.optimizer._optimizer_step_pre_hooks)
            assert on == (run.feed.wrap is not None)
            seen.append(on)

    plain, _ = weights()
    traced, _ = weights(profiler=TraceProfiler(steps=(3, 6), warmup=1), callbacks=[Look()])
    assert torch.equal(plain, traced)
    assert seen == [2 <= step < 6 for step in range(10)]


def test_a_fit_that_is_too_short_says_so(quiet, caplog):
    trainer = quiet(profiler="trace")
    trainer.fit(Net(), loader())
    assert (
        "No trace was written: the fit had 5 steps, and TraceProfiler(steps=(10, 15)) begins"
        in (caplog.text)
    )
    assert not (trainer.run_dir / "profile").exists()
    quiet(profiler="trace", fast_dev_run=3).fit(Net(), loader())
    assert "No trace is written: this fit has no folder." in caplog.text


def test_an_evaluation_alone_is_told_that_it_leaves_no_trace(quiet, caplog):
    trainer = quiet(profiler="trace")
    trainer.validate(Net(), loader())
    assert "TraceProfiler records fits, and this is a validate" in caplog.text
    caplog.clear()
    trainer = quiet(profiler=TraceProfiler(steps=(0, 2)))
    trainer.fit(Net(), loader())
    trainer.validate(Net(), loader())
    assert "TraceProfiler" not in caplog.text


def test_a_trace_that_cannot_be_written_ends_no_fit(quiet, caplog):
    class Blocks(lk.Callback):
        def on_fit_start(self, trainer, task):
            (trainer.run_dir / "profile").write_text("")

    trainer = quiet(profiler=TraceProfiler(steps=(0, 2)), callbacks=Blocks())
    trainer.fit(Net(), loader())
    assert trainer.global_step == 5
    assert "The trace could not be written: " in caplog.text


def test_an_error_ends_the_profiler(quiet):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError
            return super().training_step(batch, batch_idx)

    trainer = quiet(profiler=TraceProfiler(steps=(2, 10)))
    with pytest.raises(ValueError):
        trainer.fit(Fails(), loader())
    assert not torch.autograd._profiler_enabled()
    trainer.fit(Net(), loader(40))  # and it can be used again
    assert files(trainer)[0] == "rank0_steps_2-9.pt.trace.json.gz"


def test_a_profiler_around_the_fit_keeps_what_it_has_seen(quiet):
    with profile(activities=[ProfilerActivity.CPU]) as around:
        with pytest.raises(UsageError, match="A profiler of torch records around this fit"):
            quiet(profiler="trace").fit(Net(), loader(80))
        torch.ones(2) + 1
    assert "aten::add" in {event.key for event in around.key_averages()}


@pytest.mark.parametrize("steps", [(5, 5), (-1, 3), (3,), 5, "10-15", ("1", "3"), (1.5, 3)])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ConfigError, match=r"allowed is a pair \(first, stop\)"):
        TraceProfiler(steps=steps)


@pytest.mark.parametrize("warmup", [-1, "2"])
def test_a_warmup_that_is_none_is_refused(warmup):
    with pytest.raises(ConfigError, match="warmup="):
        TraceProfiler(warmup=warmup)
