"""What a save asks for and puts together, in real runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit import saving
from lightkit.callbacks import LambdaCallback, ModelCheckpoint
from lightkit.checkpoint import files, latest, read_checkpoint, writer
from lightkit.errors import CheckpointError, NonFiniteError
from lightkit.loggers import JSONLLogger, Logger
from tests.small import Net, loader


def trainer(folder, *callbacks, **options) -> lk.Trainer:
    options = {"logger": False, "max_epochs": 1} | options
    return lk.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def last(t: lk.Trainer) -> dict:
    return read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")


# ---- what is in a file


def test_the_header_names_the_run_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = trainer("runs")
    t.fit(Net(), loader())
    header = last(t)["lightkit"]
    assert header["run"] == t.session.ledger.record.id
    assert Path(header["folder"]) == t.run_dir.absolute()
    assert header["exact"] is True
    assert latest(t.run_dir / "checkpoints", run=header["run"]) is not None


class Rows(Logger):
    """A logger whose rows are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []

    def log_metrics(self, metrics, step):
        self.rows.append(step)

    def mark(self):
        return {"rows": len(self.rows), "steps": torch.tensor(self.rows)}


def test_the_marks_of_the_loggers_are_in_it_and_only_where_a_run_goes_on(tmp_path):
    weights = ModelCheckpoint(tmp_path / "weights", save_weights_only=True)
    logger = [Rows(), JSONLLogger(), Rows()]
    t = trainer(tmp_path, ModelCheckpoint(), weights, logger=logger, log_every_n_steps=2)
    t.fit(Net(), loader())
    marks = last(t)["loggers"]
    assert list(marks) == ["Rows", "JSONLLogger", "Rows#1"]
    assert marks["Rows"]["rows"] == len(logger[0].rows)
    assert marks["JSONLLogger"]["files"] == {
        "metrics.jsonl": (t.run_dir / "metrics.jsonl").stat().st_size
    }
    assert "loggers" not in read_checkpoint(weights.last_model_path)


@pytest.mark.parametrize("background", [False, True])
def test_rows_are_on_the_disk_before_the_file_counts(tmp_path, monkeypatch, background):
    order, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(descriptor):
        fsync(descriptor)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append((name, os.fstat(descriptor).st_size))

    def spy_replace(source, target):
        order.append(("named", os.path.basename(target)))
        replace(source, target)

    saver = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, async_save=background)
    t = trainer(tmp_path, saver, logger=JSONLLogger(), log_every_n_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", spy_fsync)
        patch.setattr(files.os, "replace", spy_replace)
        t.fit(Net(), loader())
    for step in (2, 4):
        name = f"step_{step:06d}.ckpt"
        size = read_checkpoint(f"{saver.dirpath}/{name}")["loggers"]["JSONLLogger"]["files"]
        before = order[: order.index(("named", name))]
        assert max(s for n, s in before if n == "metrics.jsonl") >= size["metrics.jsonl"] > 0


@pytest.mark.parametrize("times", [1, 1000])
def test_a_logger_that_cannot_write_costs_its_mark_and_not_the_save(
    tmp_path, monkeypatch, caplog, times
):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)

    class Full(Rows):
        calls = -1  # the first one is before the first row

        def mark(self):
            self.calls += 1
            if 0 < self.calls <= times:
                raise OSError(28, "No space left on device")
            return super().mark()

    t = trainer(tmp_path, ModelCheckpoint(), logger=[Full(), Rows()])
    t.fit(Net(), loader())
    assert last(t)["loop"]["global_step"] == 5
    assert list(last(t)["loggers"]) == (["Full", "Rows"] if times == 1 else ["Rows"])
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == (times > 1)
    assert all("Full could not write its rows (No space left on device)" in text for text in told)


def test_a_mark_that_cannot_be_stored_is_named(tmp_path):
    class Odd(Rows):
        def mark(self):
            return {"handle": object()}

    with pytest.raises(CheckpointError, match=r"checkpoint\.loggers\.Odd\.handle cannot be stored"):
        trainer(tmp_path, logger=Odd()).fit(Net(), loader())


# ---- batches per step


@pytest.mark.parametrize("changed", [False, True])
def test_a_number_of_batches_that_a_hook_set_is_kept(tmp_path, changed):
    def run(folder, epochs, path=None):
        steps = []

        def change(t, _):
            if changed and t.current_epoch == 1:
                t.set_accumulation(3)

        note = LambdaCallback(
            on_train_epoch_start=change,
            on_train_epoch_end=lambda t, _: steps.append(t.global_step),
        )
        t = trainer(folder, note, max_epochs=epochs, accumulate_grad_batches=2)
        t.fit(Net(), loader(48), ckpt_path=path)
        return t, steps

    _, whole = run(tmp_path / "a", 4)
    first, begun = run(tmp_path / "b", 2)
    saved = last(first)
    assert saved["flow"].get("accumulate") == (3 if changed else None)
    _, rest = run(tmp_path / "b", 4, first.checkpoint_callback.last_model_path)
    assert begun + rest == whole == ([6, 10, 14, 18] if changed else [6, 12, 18, 24])


def test_a_new_number_of_the_trainers_holds_where_no_hook_set_one(tmp_path):
    first = trainer(tmp_path / "a", accumulate_grad_batches=2)
    first.fit(Net(), loader(48))
    t = trainer(tmp_path / "b", accumulate_grad_batches=4, max_epochs=2)
    t.fit(Net(), loader(48), ckpt_path=first.checkpoint_callback.last_model_path)
    assert t.global_step == 6 + 3


# ---- numbers that are worth keeping


class Spoils(Net):
    """Its weights become something else after a step whose loss was finite."""

    def __init__(self, value: float, step: int = 4) -> None:
        super().__init__()
        self.value, self.step = value, step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == self.step:
            with torch.no_grad():
                self.net.weight[0, 2] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_not_finite_are_never_saved(tmp_path, value):
    t = trainer(tmp_path, ModelCheckpoint(every_n_train_steps=2))
    with pytest.raises(NonFiniteError, match=r"after step 4 \(epoch 1\).*finite: net\.weight\. "):
        t.fit(Spoils(value), loader())
    saved = last(t)
    assert saved["loop"]["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_large_numbers_whose_squares_overflow_are_fine(tmp_path):
    class Frozen(Spoils):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    t = trainer(tmp_path, ModelCheckpoint(every_n_train_steps=2), max_steps=4)
    t.fit(Frozen(3e38), loader())
    assert last(t)["model"]["net.weight"][0, 2] == 3e38


def test_on_request_they_are_saved(tmp_path):
    t = trainer(tmp_path, ModelCheckpoint(), terminate_on_nan=False)
    t.fit(Spoils(float("nan")), loader())
    assert last(t)["loop"]["global_step"] == 5


def test_what_is_frozen_may_be_anything(tmp_path):
    net = Net()
    net.register_parameter("mask", nn.Parameter(torch.tensor(-float("inf")), requires_grad=False))
    t = trainer(tmp_path)
    t.fit(net, loader())
    assert last(t)["model"]["mask"] == -float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_among_many_is_found(dtype, bad):
    class Run:
        task = nn.Module()

    many = torch.full((10_000,), 60_000.0).to(dtype)
    Run.task.register_parameter("many", nn.Parameter(many))
    Run.task.register_parameter("one", nn.Parameter(torch.zeros(3, dtype=dtype)))
    Run.task.register_parameter("none", nn.Parameter(torch.zeros(0, dtype=dtype)))
    saving.check_finite(Run)  # an overflow of the norm is no finding
    Run.state = lk.Trainer().state
    for place in (0, 5001, 9999):
        with torch.no_grad():
            many[place] = bad
        with pytest.raises(NonFiniteError, match="finite: many"):
            saving.check_finite(Run)
        many[place] = 1.0


def test_parameters_of_several_types_and_lazy_ones():
    class Run:
        task = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.LazyLinear(3))

    saving.check_finite(Run)
    Run.state = lk.Trainer().state
    with torch.no_grad():
        Run.task[1].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"finite: 1\.bias\. "):
        saving.check_finite(Run)


def test_a_task_without_parameters_has_none_that_are_bad():
    class Run:
        task = nn.Module()

    saving.check_finite(Run)


# ---- in the background, by hand


def test_a_save_by_hand_in_the_background(tmp_path):
    done = []

    def save(t, _):
        if t.global_step in (2, 4):
            path = tmp_path / f"{t.global_step}.ckpt"
            t.save_checkpoint(path, background=True, then=lambda: done.append(path.name))

    trainer(tmp_path, LambdaCallback(on_save_point=save), enable_checkpointing=False).fit(
        Net(), loader(40)
    )
    assert done == ["2.ckpt", "4.ckpt"]
    assert read_checkpoint(tmp_path / "4.ckpt")["loop"]["global_step"] == 4


def test_its_error_comes_out_at_the_end_of_the_fit(tmp_path, monkeypatch):
    from lightkit.checkpoint import writer

    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
    (tmp_path / "file").write_text("")

    def save(t, _):
        if t.global_step == 4:
            t.save_checkpoint(tmp_path / "file" / "x.ckpt", background=True)

    t = trainer(tmp_path, LambdaCallback(on_save_point=save), enable_checkpointing=False)
    with pytest.raises(CheckpointError, match=r"x\.ckpt could not be written"):
        t.fit(Net(), loader())


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_its_error_is_none_of_the_callbacks(tmp_path, monkeypatch, caplog, on_error):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
    (tmp_path / "file").write_text("")

    def save(t, _):
        if t.global_step == 2:
            t.save_checkpoint(tmp_path / "file" / "x.ckpt", background=True)

    saver = ModelCheckpoint(every_n_train_steps=3, on_error=on_error)
    t = trainer(tmp_path, saver, LambdaCallback(on_save_point=save))
    with pytest.raises(CheckpointError, match=r"x\.ckpt could not be written"):
        t.fit(Net(), loader())
    assert t.global_step == 5
    assert last(t)["loop"]["global_step"] == 5
    assert "Training goes on without a checkpoint" not in caplog.text


# ---- a full disk


FULL = """
import resource, sys, torch
import lightkit as lk
from lightkit.callbacks import ModelCheckpoint, LambdaCallback
from lightkit.checkpoint import writer
from torch.utils.data import DataLoader, TensorDataset
writer.RETRY_SECONDS = 0.01
folder, how, background = sys.argv[1:]
class Wide(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)
    def training_step(self, batch):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())
def tighten(t, task):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = t.global_step in (3, 4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if full else hard, hard))
class Tighten(lk.Callback):
    order = 99
    def on_save_point(self, trainer, task): tighten(trainer, task)
saver = ModelCheckpoint(every_n_train_steps=1, on_error=how, async_save=background == "True")
t = lk.Trainer(default_root_dir=folder, callbacks=[saver, Tighten()], logger=False, max_epochs=1,
               enable_progress_bar=False, enable_model_summary=False)
data = TensorDataset(torch.randn(24, 4))
if background == "True":
    settle = lk.checkpoint.settle
    real, saver_settle = saver._complete, None
    class Wait(lk.Callback):
        order = 101
        def on_save_point(self, trainer, task): settle()
    t._callbacks.append(Wait())
t.fit(Wide(), DataLoader(data, 4))
"""


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("how", ["raise", "warn"])
def test_a_full_disk(tmp_path, how, background):
    command = [sys.executable, "-c", FULL, str(tmp_path), how, str(background)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    folder = tmp_path / "Wide" / "version_0" / "checkpoints"
    newest = latest(folder)
    assert "step_000003.ckpt could not be written: File too large" in output
    assert "It needs about" in output
    assert "free there:" in output
    assert "Trying once more in 0.01 s." in output
    if how == "raise":
        assert done.returncode == 1
        assert newest.name == "step_000002.ckpt"
        assert "lightkit.errors.CheckpointError" in output.splitlines()[-1]
    else:
        assert done.returncode == 0, output
        assert newest.name == "step_000006.ckpt"
        assert output.count("Training goes on without a checkpoint") == 2
        assert f"the last good one is {folder}/step_000002.ckpt, 0.0 min old" in output
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


# ---- devices


@pytest.mark.gpu
@pytest.mark.parametrize("background", [False, True])
def test_from_a_gpu_to_the_cpu_and_back(tmp_path, background, caplog):
    def run(accelerator, epochs, path=None):
        saver = ModelCheckpoint(async_save=background, every_n_train_steps=2)
        t = trainer(tmp_path, saver, accelerator=accelerator, max_epochs=epochs)
        with caplog.at_level(logging.WARNING, logger="lightkit"):
            t.fit(Net(), loader(), ckpt_path=path)
        return t, saver.last_model_path

    _, path = run("gpu", 1)
    assert all(v.device.type == "cpu" for v in read_checkpoint(path)["model"].values())
    t, path = run("cpu", 2, path)
    assert t.global_step == 10
    t, _ = run("gpu", 3, path)
    assert t.global_step == 15
    moments = [v for s in t.optimizers[0].state.values() for v in s.values() if v.ndim]
    assert all(v.device.type == "cuda" for v in moments)
