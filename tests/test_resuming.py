"""What ``ckpt_path`` means, in which folder a run goes on, and what is said at its end."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch

import lightkit as lk
from lightkit import cli, ledger, screen
from lightkit.callbacks import ModelCheckpoint
from lightkit.errors import CheckpointError, ConfigError, UsageError
from lightkit.loggers import CSVLogger, JSONLLogger
from tests.small import Net, loader


class Crash(lk.Callback):
    """Raises after a step, as a defect of the user's would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("a defect")


def every(steps: int, **options) -> ModelCheckpoint:
    return ModelCheckpoint(every_n_train_steps=steps, save_on_exception=False, **options)


def fit(root: Path, *, ckpt_path="auto", width=4, callbacks=(), **options):
    """Trains 5 steps per epoch; a fresh task and trainer each time, as in a new process."""
    torch.manual_seed(3)
    defaults = {"max_epochs": 3, "log_every_n_steps": 2, "enable_progress_bar": False}
    t = lk.Trainer(default_root_dir=root, callbacks=list(callbacks), **defaults | options)
    net = Net(width)
    t.fit(net, loader(), loader(8), ckpt_path=ckpt_path)
    return net, t


def crash(root: Path, at: int = 8, **options) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        fit(root, callbacks=[Crash(at), every(3)], **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def rows(t: lk.Trainer) -> bytes:
    return (t.run_dir / "metrics.jsonl").read_bytes()


def equal(a: lk.TaskModule, b: lk.TaskModule) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def untimed(history):
    return [{k: v for k, v in row.items() if k != "time"} for row in history]


# --- auto ----------------------------------------------------------------------------------------


def test_auto_begins_anew_and_then_goes_on_in_the_same_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    whole, one = fit(tmp_path / "a", callbacks=[every(3)])
    assert "there is no run to continue" in caplog.text
    crash(tmp_path / "b")
    assert ledger.read(tmp_path / "b/Net/version_0").status == "failed"
    net, two = fit(tmp_path / "b", callbacks=[every(3)])
    assert two.run_dir == tmp_path / "b/Net/version_0"
    assert [p.name for p in (tmp_path / "b/Net").iterdir()] == ["version_0"]
    assert equal(whole, net)
    assert rows(one) == rows(two)
    assert untimed(one.history) == untimed(two.history)
    assert ledger.read(two.run_dir).status == "finished"


def test_a_finished_run_is_left_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    net, one = fit(tmp_path)
    before = contents(tmp_path)
    again, two = fit(tmp_path)
    assert contents(tmp_path) == before
    assert equal(net, again)
    assert two.history == one.history
    assert two.global_step == 15
    assert two.run_dir == one.run_dir
    assert two.checkpoint_callback.best_model_path == one.checkpoint_callback.best_model_path
    assert "is finished (3 epochs, 15 steps): nothing is left to train" in caplog.text
    fit(tmp_path, max_epochs=2)  # a lower limit asks for nothing either
    assert contents(tmp_path) == before


def test_a_finished_run_restores_its_best_weights_again(tmp_path):
    def saver():
        return ModelCheckpoint(monitor="val_loss", mode="max", restore_best=True)

    net, _ = fit(tmp_path, callbacks=[saver()])
    again, _ = fit(tmp_path, callbacks=[saver()])
    assert equal(net, again)


def test_a_raised_limit_goes_on(tmp_path):
    whole, one = fit(tmp_path / "a", max_epochs=4)
    fit(tmp_path / "b")
    net, two = fit(tmp_path / "b", max_epochs=4)
    assert equal(whole, net)
    assert rows(one) == rows(two)
    assert two.run_dir.name == "version_0"


def test_a_run_that_ended_within_an_epoch_goes_on(tmp_path):
    whole, one = fit(tmp_path / "a", max_epochs=3)
    fit(tmp_path / "b", max_epochs=-1, max_steps=7)
    net, two = fit(tmp_path / "b", max_epochs=3)
    assert equal(whole, net)
    assert untimed(one.history) == untimed(two.history)


def test_other_settings_are_an_error_that_lists_them(tmp_path):
    fit(tmp_path, width=4)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="would continue") as error:
        fit(tmp_path, width=5, accumulate_grad_batches=2)
    assert "task.width: 4 in the run, 5 now" in str(error.value)
    assert "trainer.accumulate_grad_batches: 1 in the run, 2 now" in str(error.value)
    assert contents(tmp_path) == before


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, caplog):
    caplog.set_level("INFO")
    whole, one = fit(tmp_path / "a")
    crash(tmp_path / "b", at=2)
    net, two = fit(tmp_path / "b")
    assert two.run_dir.name == "version_0"
    assert equal(whole, net)
    assert rows(one) == rows(two)
    assert "version_0 ended before its first checkpoint, so it begins anew" in caplog.text
    crash(tmp_path / "c", at=2)
    before = contents(tmp_path / "c")
    _, t = fit(tmp_path / "c", gradient_clip_val=1.0)  # mended by another setting
    assert t.run_dir.name == "version_1"
    assert (
        contents(tmp_path / "c/Net/version_0").items()
        <= {k.removeprefix("Net/version_0/"): v for k, v in before.items()}.items()
    )


def test_a_finished_run_whose_checkpoints_are_gone(tmp_path):
    _, t = fit(tmp_path)
    for path in (t.run_dir / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="its checkpoints are gone"):
        fit(tmp_path)


def test_a_torn_newest_checkpoint_is_passed_over(tmp_path, caplog):
    whole, one = fit(tmp_path / "a", callbacks=[every(3, save_top_k=-1)])
    with pytest.raises(RuntimeError, match="a defect"):
        fit(tmp_path / "b", callbacks=[Crash(8), every(3, save_top_k=-1)])
    folder = tmp_path / "b/Net/version_0/checkpoints"
    newest = folder / "step_000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])  # last.ckpt is the same file
    net, two = fit(tmp_path / "b", callbacks=[every(3, save_top_k=-1)])
    assert "step_000006.ckpt is damaged or truncated" in caplog.text
    assert equal(whole, net)
    assert rows(one) == rows(two)


def test_auto_takes_the_run_of_its_own_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    crash(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    fit(tmp_path, ckpt_path=None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _, t = fit(tmp_path)
    assert t.run_dir.name == "version_0"
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # a new job takes the newest of all
    _, t = fit(tmp_path)
    assert t.run_dir.name == "version_1"


def test_auto_passes_over_a_run_that_somebody_works_on(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    crash(tmp_path)
    lock = ledger.Lock(tmp_path / "Net/version_0")
    try:
        _, t = fit(tmp_path)
        assert t.run_dir.name == "version_1"
        assert "version_0 is passed over: another fit is at work on it" in caplog.text
    finally:
        lock.release()


def test_a_logger_with_a_folder_of_its_own(tmp_path):
    def logger():
        return CSVLogger(tmp_path / "logs", "net")

    whole, one = fit(tmp_path / "x", logger=CSVLogger(tmp_path / "whole"), callbacks=[every(3)])
    with pytest.raises(RuntimeError, match="a defect"):
        fit(tmp_path, logger=logger(), callbacks=[Crash(8), every(3)])
    net, two = fit(tmp_path, logger=logger(), callbacks=[every(3)])
    assert two.run_dir == tmp_path / "logs/net/version_0"
    assert equal(whole, net)
    assert (one.run_dir / "metrics.csv").read_bytes() == (two.run_dir / "metrics.csv").read_bytes()


def test_checkpoints_elsewhere_shared_by_two_runs(tmp_path):
    shared = tmp_path / "shared"
    whole, _ = fit(tmp_path / "a", callbacks=[every(3)])
    fit(tmp_path / "b", ckpt_path=None, max_epochs=9, callbacks=[every(3, dirpath=shared)])
    with pytest.raises(RuntimeError, match="a defect"):
        fit(tmp_path / "c", callbacks=[Crash(8), every(3, dirpath=shared)])
    net, _ = fit(tmp_path / "c", callbacks=[every(3, dirpath=shared)])
    assert equal(whole, net)


def test_a_run_folder_may_be_moved(tmp_path):
    whole, one = fit(tmp_path / "a", callbacks=[every(3)])
    crash(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "c")
    net, two = fit(tmp_path / "c", callbacks=[every(3)])
    assert two.run_dir == tmp_path / "c/Net/version_0"
    assert equal(whole, net)
    assert rows(one) == rows(two)


def test_auto_needs_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="enable_checkpointing=False"):
        fit(tmp_path, enable_checkpointing=False)


def test_a_trial_run_continues_nothing(tmp_path):
    crash(tmp_path)
    before = contents(tmp_path)
    _, t = fit(tmp_path, fast_dev_run=True)
    assert t.global_step == 1
    assert contents(tmp_path) == before


# --- a path, "last", "best" ----------------------------------------------------------------------


def test_the_newest_checkpoint_goes_on_in_its_folder(tmp_path):
    whole, one = fit(tmp_path / "a", callbacks=[every(3)])
    for number, given in enumerate(("last", "path")):
        root = tmp_path / str(number)
        crash(root)
        path = root / "Net/version_0/checkpoints/last.ckpt" if given == "path" else given
        net, two = fit(root, ckpt_path=path, callbacks=[every(3)])
        assert two.run_dir == root / "Net/version_0"
        assert equal(whole, net)
        assert rows(one) == rows(two)


def test_an_older_checkpoint_begins_a_new_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    whole, one = fit(tmp_path, callbacks=[every(3, save_top_k=-1)])
    before = contents(one.run_dir)
    older = one.run_dir / "checkpoints/step_000006.ckpt"
    net, two = fit(tmp_path, ckpt_path=older, callbacks=[every(3, save_top_k=-1)])
    assert two.run_dir.name == "version_1"
    assert equal(whole, net)
    assert contents(one.run_dir) == before
    assert (
        "version_0 stays as it is and a new run begins: there are later checkpoints" in caplog.text
    )


def test_changed_settings_begin_a_new_folder(tmp_path, caplog):
    caplog.set_level("INFO")
    crash(tmp_path)
    before = contents(tmp_path / "Net/version_0")
    _, t = fit(tmp_path, ckpt_path="last", gradient_clip_val=1.0, callbacks=[every(3)])
    assert t.run_dir.name == "version_1"
    assert "trainer.gradient_clip_val: null in the run, 1.0 now" in caplog.text
    assert "optimizers with their learning rates" in caplog.text
    assert contents(tmp_path / "Net/version_0") == before


def test_nothing_left_to_train_writes_nothing(tmp_path):
    net, one = fit(tmp_path)
    before = contents(tmp_path)
    again, two = fit(tmp_path, ckpt_path="last")
    assert equal(net, again)
    assert two.history == one.history
    assert contents(tmp_path) == before


def test_an_earlier_configuration_is_kept(tmp_path):
    first = fit_configured(tmp_path, "a: 1\n", 1)
    fit_configured(tmp_path, "a: 2\n", 2)
    assert (first / "config.yaml").read_text() == "a: 2\n"
    assert (first / "config_until_step_5.yaml").read_text() == "a: 1\n"


def fit_configured(root: Path, text: str, epochs: int) -> Path:
    t = lk.Trainer(default_root_dir=root, max_epochs=epochs, enable_progress_bar=False, seed=1)
    t.config_text = text
    t.fit(Net(), loader(), loader(8), ckpt_path="auto")
    return t.run_dir


# --- the end -------------------------------------------------------------------------------------


def test_the_line_that_goes_on(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    crash(Path("runs"))
    said = [r.getMessage() for r in caplog.records][-1]
    assert (
        said == 'resume:   trainer.fit(..., ckpt_path="runs/Net/version_0/checkpoints/last.ckpt")'
    )
    caplog.clear()
    crash(Path("other"), at=1)
    assert "nothing to go on from: no checkpoint was written" in caplog.records[-1].getMessage()


CONFIG = """
trainer: {max_epochs: 2, default_root_dir: runs, enable_progress_bar: false}
data: {class_path: project.Data}
task: {class_path: project.Task}
"""
PROJECT = """
import os
import torch
from tests.small import Net, loader
import lightkit as lk

class Data(lk.DataModule):
    def setup(self, stage):
        self.drawn = torch.rand(1).item()
    def train_dataloader(self):
        return loader()

class Task(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        with open("drawn.txt", "a") as file:
            file.write(f"{self.trainer.datamodule.drawn} {self.trainer.options.seed}\\n")
        if os.path.exists("crash") and self.trainer.global_step == 7:
            raise RuntimeError("a defect")
"""


def test_the_command_line_goes_on_with_its_own_seed(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    Path("project.py").write_text(PROJECT)
    Path("config.yaml").write_text(CONFIG)
    Path("crash").touch()
    command = ["fit", "--config", "config.yaml", "--ckpt_path", "auto"]
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(command)
    said = caplog.records[-1].getMessage()
    assert said.startswith(
        "resume:   lightkit fit --config runs/Task/version_0/config.yaml --ckpt_path "
    )
    Path("crash").unlink()
    assert cli.main(command) == 0
    drawn = Path("drawn.txt").read_text().splitlines()
    assert len(set(drawn)) == 1
    assert [p.name for p in Path("runs/Task").iterdir()] == ["version_0"]
    record = json.loads(Path("runs/Task/version_0/run.json").read_text())
    assert record["status"] == "finished"
    # What repeats the run begins where it began.
    assert "ckpt_path: null" in Path("runs/Task/version_0/config.yaml").read_text()
    assert str(record["seed"]) in drawn[0]
    assert cli.main(command) == 0  # finished: nothing more
    assert Path("drawn.txt").read_text().splitlines() == drawn


class CtrlC(lk.Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_notebook_returns_and_the_trainer_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "in_notebook", lambda: True)
    whole, one = fit(tmp_path / "a")
    torch.manual_seed(3)
    t = lk.Trainer(
        default_root_dir=tmp_path / "b", max_epochs=3, log_every_n_steps=2,
        callbacks=CtrlC(), enable_progress_bar=False,
    )  # fmt: skip
    net = Net()
    assert t.fit(net, loader(), loader(8)) == []
    assert t.interrupted == "SIGINT"
    assert t.global_step == 4
    assert ledger.read(t.run_dir).status == "interrupted"
    t.fit(net, loader(), loader(8), ckpt_path="last")
    assert t.interrupted is None
    assert equal(whole, net)
    assert rows(one) == rows(t)


def test_ctrl_c_elsewhere_is_raised_after_the_save(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, callbacks=[CtrlC()])
    whole, _ = fit(tmp_path / "whole")
    net, t = fit(tmp_path)
    assert t.run_dir.name == "version_0"
    assert equal(whole, net)


def test_two_fits_cannot_go_on_in_one_folder(tmp_path):
    class Nested(lk.Callback):
        def on_train_epoch_start(self, trainer, task):
            if trainer.current_epoch == 1:
                with pytest.raises(UsageError, match="in use by another fit"):
                    ledger.Lock(trainer.run_dir)
                seen.append(fit(tmp_path)[1].run_dir.name)

    seen: list[str] = []
    fit(tmp_path, ckpt_path=None, callbacks=[Nested()])
    assert seen == ["version_1"]


class Stops(lk.Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            trainer.stop("enough")


def test_a_run_that_was_stopped_is_finished_too(tmp_path):
    net, one = fit(tmp_path, callbacks=[Stops()])
    before = contents(tmp_path)
    again, two = fit(tmp_path)  # without what stopped it
    assert two.global_step == 7
    assert untimed(two.history) == untimed(one.history)
    assert equal(net, again)
    assert contents(tmp_path) == before
    _, three = fit(tmp_path, max_epochs=4)  # a raised limit goes on
    assert three.global_step == 20


def test_last_means_the_newest_of_this_very_run(tmp_path):
    shared = tmp_path / "shared"
    torch.manual_seed(3)
    t = lk.Trainer(
        max_epochs=3, default_root_dir=tmp_path, enable_progress_bar=False,
        callbacks=[every(3, dirpath=shared)],
    )  # fmt: skip
    net = Net()
    t.fit(net, loader(), loader(8))
    t._callbacks.append(Crash(7))
    with pytest.raises(RuntimeError, match="a defect"):
        t.fit(Net(), loader(), loader(8))
    t._callbacks.pop()
    t.validate(net, loader(8), verbose=False)
    t.fit(Net(), loader(), loader(8), ckpt_path="last")
    assert t.run_dir.name == "version_1"
    assert t.global_step == 15


def test_last_and_auto_look_where_the_logger_writes_and_for_this_task(tmp_path):
    class Other(Net):
        pass

    logger = CSVLogger(tmp_path / "logs")
    with pytest.raises(RuntimeError, match="a defect"):
        fit(tmp_path, logger=logger, callbacks=[Crash(8), every(3)])
    t = lk.Trainer(
        max_epochs=1, default_root_dir=tmp_path, logger=CSVLogger(tmp_path / "logs"),
        enable_progress_bar=False,
    )  # fmt: skip
    t.fit(Other(), loader(), loader(8), ckpt_path="auto")
    assert t.run_dir.name == "version_1"
    for given in ("last", "auto"):
        _, t = fit(tmp_path, logger=CSVLogger(tmp_path / "logs"), ckpt_path=given)
        assert t.run_dir == tmp_path / "logs/version_0"


def test_what_another_process_did_meanwhile_counts(tmp_path, monkeypatch):
    """The record is read again under the lock: by then the run may have been finished."""
    crash(tmp_path)
    folder = tmp_path / "Net/version_0"
    true, calls = ledger.Lock, []

    def slow(place):
        if place == folder and not calls:
            calls.append(place)
            fit(tmp_path, callbacks=[every(3)])
        return true(place)

    monkeypatch.setattr(ledger, "Lock", slow)
    _, t = fit(tmp_path, callbacks=[every(3)])
    assert calls
    assert t.global_step == 15
    assert ledger.read(folder).status == "finished"
    assert [json.loads(line)["step"] for line in rows(t).splitlines()].count(15) <= 3


def test_an_error_after_ctrl_c_is_seen_in_a_notebook_too(tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "in_notebook", lambda: True)

    class Both(CtrlC):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 4:
                raise ValueError("my own defect")

    with pytest.raises(ValueError, match="my own defect"):
        fit(tmp_path, callbacks=[Both()])


def test_the_current_folder_may_change(tmp_path, monkeypatch):
    class Leaves(lk.Callback):
        def on_train_start(self, trainer, task):
            (tmp_path / "elsewhere").mkdir()
            os.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    _, t = fit(Path("runs"), callbacks=[Leaves()], logger=[CSVLogger(), JSONLLogger()])
    assert ledger.read(tmp_path / "runs/Net/version_0").status == "finished"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert t.run_dir == tmp_path / "runs/Net/version_0"


def test_an_evaluation_leaves_the_logger_of_a_fit_open(tmp_path):
    class Tests(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            lk.Trainer(logger=trainer.logger, enable_progress_bar=False).test(
                Net(), loader(8), verbose=False
            )

    _, one = fit(tmp_path / "a", logger=JSONLLogger())
    _, two = fit(tmp_path / "b", logger=JSONLLogger(), callbacks=[Tests()])
    steps = [[json.loads(line)["step"] for line in rows(t).splitlines()] for t in (one, two)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (3, ConfigError, "ckpt_path=3 is no path; allowed are a path, 'last', 'best'"),
        ("lasst", CheckpointError, "no such file. Did you mean 'last'?"),
        ("Auto", CheckpointError, "no such file. Did you mean 'auto'?"),
    ],
)
def test_what_ckpt_path_may_be(tmp_path, given, error, text):
    with pytest.raises(error) as caught:
        fit(tmp_path, ckpt_path=given)
    assert text in str(caught.value)


def test_other_data_are_other_settings(tmp_path):
    fit(tmp_path)
    t = lk.Trainer(default_root_dir=tmp_path, max_epochs=4, enable_progress_bar=False)
    with pytest.raises(ConfigError, match="loader.samples: 20 in the run, 24 now"):
        t.fit(Net(), loader(24), loader(8), ckpt_path="auto")


def test_a_copy_of_a_checkpoint_begins_a_new_folder(tmp_path):
    crash(tmp_path / "a")
    copy = tmp_path / "mine.ckpt"
    copy.write_bytes((tmp_path / "a/Net/version_0/checkpoints/last.ckpt").read_bytes())
    before = contents(tmp_path / "a")
    _, t = fit(tmp_path / "b", ckpt_path=copy)
    assert t.run_dir == tmp_path / "b/Net/version_0"
    assert contents(tmp_path / "a") == before


def test_a_state_of_an_exception_is_named_as_such(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="a defect"):
        fit(tmp_path, callbacks=[Crash(8)])
    fit(tmp_path)
    assert "saved after an error: not bit for bit" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_left_and_a_new_one_begun(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    crash(tmp_path)
    folder, true = tmp_path / "Net/version_0", os.access
    before = contents(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and true(path, mode))
    _, t = fit(tmp_path, ckpt_path="last")
    assert t.run_dir.name == "version_1"
    assert contents(folder) == before
    assert "a new run begins: its folder cannot be written" in caplog.text


def test_the_line_of_the_command_line_can_be_copied_whatever_the_folder_is_called(
    tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    t = lk.Trainer(
        default_root_dir="my runs", max_epochs=3, callbacks=[Crash(8), every(3)],
        enable_progress_bar=False,
    )  # fmt: skip
    t.config_text = "trainer: {}\n"
    with pytest.raises(RuntimeError, match="a defect"):
        t.fit(Net(), loader(), loader(8))
    words = shlex.split(caplog.records[-1].getMessage())
    assert Path(words[words.index("--config") + 1]).is_file()
    assert Path(words[words.index("--ckpt_path") + 1]).is_file()
