"""The list of past runs, and how some of them differ."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lightkit as lk
from lightkit import runs
from lightkit.callbacks import EarlyStopping
from lightkit.checkpoint import FORMAT
from lightkit.cli import main
from lightkit.errors import ConfigError
from lightkit.ledger import Ledger, Record
from tests.small import Net, loader


class Sized(Net):
    def __init__(self, size: int = 1, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()


def fit(folder: Path, task: lk.TaskModule | None = None, **options) -> lk.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lk.Trainer(**quiet | {"max_epochs": 2, "default_root_dir": folder} | options)
    trainer.fit(task or Sized(), loader(), loader(8, 2))
    return trainer


def folder_of(top: Path, name: str, rows: str = "", saved: bool = False, **values) -> Path:
    """Makes the folder of a run as one that has ended somehow left it."""
    folder = top / name
    (folder / "checkpoints").mkdir(parents=True)
    if saved:
        checkpoint(folder / "checkpoints/last.ckpt")
    given = {"checkpoints": ["checkpoints"], "settings": {"task": "Net"}, "status": "finished"}
    Record(**given | values).write(folder)
    if rows:
        (folder / "metrics.jsonl").write_text(rows)
    return folder


def checkpoint(file: Path, run: str = "", **more) -> None:
    header = {"format": FORMAT, "run": run}
    torch.save({"lightkit": header, "loop": {"global_step": 1}} | more, file)


def status(folder: Path) -> str:
    (run,) = lk.find_runs(folder)
    return run.status


def test_runs_are_found_at_any_depth_the_newest_first(tmp_path):
    for number, name in enumerate(("a/version_0", "b/c/version_0", "version_7")):
        folder_of(tmp_path, name, began=float(number))
    folder_of(tmp_path, ".hidden/version_0")
    folder_of(tmp_path, "a/version_0/inner")  # a run holds none
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    found = [run.folder.relative_to(tmp_path).as_posix() for run in lk.find_runs(tmp_path)]
    assert found == ["version_7", "b/c/version_0", "a/version_0"]
    assert len(lk.find_runs(tmp_path / "version_7")) == 1


def test_how_runs_ended(tmp_path):
    for name, saved, written, shown in (
        ("a", True, "finished", "finished"),
        ("b", False, "finished", "finished"),
        ("c", True, "failed", "failed"),
        ("d", False, "failed", "failed"),
        ("e", True, "interrupted", "resumable"),
        ("f", False, "interrupted", "interrupted"),
        ("g", True, "running", "resumable"),  # killed: nobody holds the lock
        ("h", False, "running", "killed"),
    ):
        folder_of(tmp_path, name, saved=saved, status=written)
        (run,) = lk.find_runs(tmp_path / name)
        assert run.status == shown
        assert run.resumable == (saved and written != "finished")


def test_a_run_is_running_as_long_as_its_process_lives(tmp_path):
    folder = folder_of(tmp_path, "run", saved=True)
    code = (
        "import sys, time; from pathlib import Path; from lightkit.ledger import *;"
        "entry = Ledger(Path(sys.argv[1]), Record(checkpoints=['checkpoints']));"
        "print('there', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout.readline() == "there\n"
        assert [status(folder) for _ in range(2)] == ["running", "running"]  # a look takes no lock
        process.send_signal(signal.SIGKILL)
    assert status(folder) == "resumable"


def test_a_look_leaves_the_lock_of_the_own_process(tmp_path):
    entry = Ledger(folder_of(tmp_path, "run"), Record())
    assert status(tmp_path) == "running"
    taken = (
        "from lightkit.ledger import *; import sys; Lock(__import__('pathlib').Path(sys.argv[1]))"
    )
    words = [sys.executable, "-c", taken, str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "is in use by another process" in done.stderr
    entry._lock.release()


def test_the_results_are_those_of_the_history(tmp_path):
    trainer = fit(
        tmp_path,
        max_epochs=3,
        callbacks=EarlyStopping(
            "train_loss", mode="max", patience=9, check_on_train_epoch_end=True
        ),
    )
    (run,) = lk.find_runs(tmp_path)
    assert (run.folder, run.task, run.status) == (trainer.run_dir, "Sized", "finished")
    assert (run.epoch, run.step, run.error) == (3, 15, "")
    assert run.last == trainer.history[-1]
    # The checkpoint's monitor goes before that of another callback.
    assert run.monitor == trainer.checkpoint_callback.monitor == "val_loss"
    assert run.best == trainer.history.best("val_loss")
    assert run.seconds > 0


def test_a_callbacks_monitor_tells_the_best_epoch(tmp_path):
    stop = EarlyStopping("train_loss", mode="max", patience=9, check_on_train_epoch_end=True)
    trainer = fit(tmp_path, enable_checkpointing=False, callbacks=stop)
    (run,) = lk.find_runs(tmp_path)
    assert run.monitor == "train_loss"
    assert run.best == trainer.history.best("train_loss", "max")


def test_a_failed_run_says_why(tmp_path):
    class Failing(Net):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                raise ArithmeticError("too much\nof all")

    with pytest.raises(ArithmeticError):
        fit(tmp_path, Failing(), rehearse=False)
    (run,) = lk.find_runs(tmp_path)
    assert (run.status, run.error, run.resumable) == ("failed", "ArithmeticError: too much", True)
    assert run.epoch == 1
    assert set(run.last) > {"train_loss", "val_loss"}


def test_only_what_a_fit_can_continue_makes_a_run_resumable(tmp_path):
    """Neither weights alone nor, in a folder that runs share, the checkpoint of another one."""
    folder = folder_of(tmp_path, "run", status="interrupted", id="own")
    checkpoint(folder / "checkpoints/weights.ckpt", loop=None)
    checkpoint(folder / "checkpoints/other.ckpt", run="other")
    (folder / "checkpoints/broken.ckpt").write_bytes(b"x")
    assert status(folder) == "interrupted"
    checkpoint(folder / "checkpoints/last.ckpt", run="own")
    assert status(folder) == "resumable"


def test_files_that_cannot_be_read_hide_no_other_run(tmp_path):
    for name, text in {
        "csv": "step,epoch,val_loss\n5,0,1.5\n10,1,2,3,4\n",  # more cells than names
        "long": "step,epoch,val_loss\n5,0,1.5\n10,1," + "9" * 200_000,
        "jsonl": '{"step": 5, "epoch": 0, "val_loss": 1.5}\n{"step": 6, "epoch": 1e999}\n',
    }.items():
        kind = "jsonl" if name == "jsonl" else "csv"
        (folder_of(tmp_path, name, status="running") / f"metrics.{kind}").write_text(text)
    (folder_of(tmp_path, "folder", status="running") / "metrics.jsonl").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/run.json").write_text('{"name": "of another program"}')
    found = {run.folder.name: run.best.get("val_loss") for run in lk.find_runs(tmp_path)}
    assert found == {"csv": 1.5, "long": 1.5, "jsonl": 1.5, "folder": None}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_rows_tell_of_a_run_that_was_killed(tmp_path, kind):
    """Its ``run.json`` knows nothing; what is broken or no number is passed over."""
    if kind == "jsonl":
        rows = (
            '{"step": 5, "epoch": 0, "train_loss": 3.0}\n{"step": 5, "epoch": 0, "val_loss": 0.5}\n'
            '{"step": 10, "epoch": 1, "val_loss": null}\n7\n{"step": 12, "epoch": "x"}\n'
            '{"step": 15, "epoch": 2, "train_loss": 1.0, "val_loss": 0.75}\n{"step": 20, "epo'
        )
    else:
        rows = "step,epoch,train_loss,val_loss\n5,0,3.0,0.5\n10,1,,nan\n15,2,1.0,0.75\n"
    limits = {"max_epochs": 9, "max_steps": -1}
    folder = folder_of(tmp_path, "run", status="running", limits=limits)
    (folder / f"metrics.{kind}").write_text(rows)
    (run,) = lk.find_runs(tmp_path)
    assert (run.status, run.epoch, run.step) == ("killed", 2, 15)
    assert (run.monitor, run.best["val_loss"], run.best["epoch"]) == ("val_loss", 0.5, 1)
    assert run.last == {"step": 15, "epoch": 3, "train_loss": 1.0, "val_loss": 0.75}
    assert "2/9" in runs.table([run], 200)


def test_a_value_that_is_not_finite_is_none(tmp_path):
    class Spoilt(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", math.nan if self.current_epoch else 1.0)

    fit(tmp_path, Spoilt(), enable_checkpointing=False, terminate_on_nan=False)
    (run,) = lk.find_runs(tmp_path)
    assert run.last["val_loss"] is None
    assert run.best["val_loss"] == 1.0
    json.loads((run.folder / "run.json").read_text(), parse_constant=pytest.fail)


def test_runs_of_the_first_version_are_listed(tmp_path):
    record = {"id": "a", "status": "finished", "epoch": 2, "global_step": 9, "checkpoints": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "epoch": 1, "val_loss": 2.5}\n')
    (run,) = lk.find_runs(tmp_path)
    assert (run.status, run.epoch, run.step, run.best["val_loss"]) == ("finished", 2, 9, 2.5)
    assert runs.difference([run, run], 80)


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_list_fits_the_screen(tmp_path, width, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        folder_of(
            tmp_path, f"runs/Network/version_{number}", began=time.time() - 10**number * 400,
            best={"val_accuracy": 0.5}, monitors=[["val_accuracy", "max"]], epoch=number,
            last={"epoch": 1}, limits={"max_epochs": 12}, seconds=3600.0 * number,
        )  # fmt: skip
    lines = runs.table(lk.find_runs(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[-1] for line in lines[1:]] == [
        f"runs/Network/version_{number}" for number in range(3)
    ]
    assert ("val_accuracy 0.5000" in lines[1]) == (width >= 60)
    if width == 200:
        assert lines[0].split() == [
            *("status", "task", "epochs", "steps", "best", "took", "age", "folder")
        ]
        assert lines[3].split() == [
            *("finished", "Net", "2/12", "0", "val_accuracy", "0.5000", "2:00:00", "11", "h"),
            "runs/Network/version_2",
        ]


def test_one_long_folder_takes_only_as_many_columns_as_it_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b" * 44):
        folder_of(tmp_path, name, best={"val_loss": 0.5}, last={"epoch": 1}, epoch=3)
    lines = runs.table(lk.find_runs("."), 80).splitlines()
    assert lines[0].split() == ["status", "epochs", "best", "folder"]
    assert max(map(len, lines)) <= 80
    assert not any("..." in line for line in lines)


def test_a_folder_that_is_too_long_loses_its_beginning(tmp_path):
    folder_of(tmp_path, "a" * 60 + "/version_0")
    lines = runs.table(lk.find_runs(tmp_path), 40).splitlines()
    assert max(map(len, lines)) <= 40
    assert "..." in lines[1]
    assert lines[1].endswith("aaa/version_0")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (12.4, "12 s"), (90, "2 min"), (7300, "2 h"), (86400 * 40, "40 d")],
)
def test_ages(seconds, text):
    assert runs.age(seconds) == text


def test_how_two_runs_differ(tmp_path):
    one = fit(tmp_path, Sized(size=1), max_epochs=2, gradient_clip_val=1.0)
    two = fit(tmp_path, Sized(size=3), max_epochs=3)
    entry = json.loads((two.run_dir / "provenance.json").read_text())
    entry[-1] |= {"git": {"revision": "abc", "diff": "code.diff"}, "python": "3.99"}
    (two.run_dir / "provenance.json").write_text(json.dumps(entry))
    (two.run_dir / "code.diff").write_text("--- a\n+++ b\n-x\n+y\n+z\n")
    found = runs.compare([runs._only(one.run_dir), runs._only(two.run_dir)])
    assert found["configuration"] == {
        "trainer.max_epochs": [2, 3],
        "trainer.gradient_clip_val": [1.0, None],
        "task.size": [1, 3],
    }
    code = found["code and machine"]
    assert code["revision"][1] == "abc"
    assert code["python"][1] == "3.99"
    assert code["changes"][1].startswith("+2 -1 lines, ")
    assert {"argv", "torch", "host"}.isdisjoint(code)
    assert found["last epoch"]["val_loss"] == [t.history[-1]["val_loss"] for t in (one, two)]
    assert found["best epoch by val_loss"]["val_loss"] == [
        t.history.best("val_loss")["val_loss"] for t in (one, two)
    ]
    for width in (40, 80, 200):
        text = runs.difference(lk.find_runs(tmp_path), width)
        assert max(map(len, text.splitlines())) <= width
    assert "gradient_clip_val" in text


def test_what_is_not_known_of_a_diff_is_not_called_none(tmp_path):
    for git, shown in (
        (None, None),
        ({"changed": 0, "diff": None}, "none"),
        ({"changed": 2, "diff": None}, "2, no diff"),
        ({"changed": None, "diff": None}, "unknown, no diff"),
        ({"changed": 2, "diff": "code.diff"}, "code.diff is gone"),
    ):
        (tmp_path / "provenance.json").write_text(json.dumps([{"git": git}]))
        Record().write(tmp_path)
        assert runs._circumstances(runs._only(tmp_path))["changes"] == shown


def test_names_that_are_too_long_stay_below_their_title(tmp_path):
    names = ("trainer.limit_val_batches", "trainer.check_val_every_n_epoch")
    found = [runs._only(folder_of(tmp_path, x, settings=dict.fromkeys(names, x))) for x in "ab"]
    for width in (60, 77, 80, 120):
        lines = runs.difference(found, width).splitlines()
        first = lines.index("configuration") + 1
        assert all(line.startswith("  ") for line in lines[first : lines.index("", first)])


def test_three_runs_stand_side_by_side(tmp_path):
    found = [
        runs._only(folder_of(tmp_path, name, settings={"task": "Net", "task.x": name}))
        for name in "abc"
    ]
    assert runs.compare(found)["configuration"] == {"task.x": ["a", "b", "c"]}


# --- the command ---------------------------------------------------------------------------------

PROJECT = """
from tests.small import Net, loader
import lightkit as lk

class Data(lk.DataModule):
    def train_dataloader(self):
        return loader()
"""


def test_the_command_lists_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "runs_project.py").write_text(PROJECT)
    words = ["fit", "--task", "runs_project.Net", "--data", "runs_project.Data", "--trainer.seed=1"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    for limit in (2, 3):
        assert main([*words, *quiet, f"--trainer.limit_train_batches={limit}"]) == 0
    capsys.readouterr()
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("finished  Net")
    assert lines[1].endswith("runs/Net/version_1")
    assert main(["runs", "runs", "--json"]) == 0
    (two, one) = json.loads(capsys.readouterr().out)
    assert (one["status"], one["step"], two["step"]) == ("finished", 2, 3)
    assert main(["runs", one["folder"], two["folder"]]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "limit_train_batches" in line)
    assert line.split() == ["trainer.limit_train_batches", "2", "3"]
    assert main(["runs", one["folder"], two["folder"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["configuration"] == {"trainer.limit_train_batches": [2, 3]}
    assert [run["folder"] for run in found["runs"]] == [one["folder"], two["folder"]]


def test_letters_that_the_terminal_lacks_are_written_as_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, "caf\u00e9")
    for encoding in ("ascii", "utf-8"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(["runs", "."]) == 0
        shown = screen.buffer.getvalue().decode()
        assert ("caf\\xe9" in shown) == (encoding == "ascii")


def test_the_command_answers_wrong_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["runs", "empty"]) == 0
    assert capsys.readouterr().out == "no runs below empty\n"
    for words, parts in {
        ("runs",): ["runs: there is no such folder", "default_root_dir"],
        ("runs", "empty", "empty"): ["empty: there is no run.json", "lightkit runs FOLDER"],
        ("runs", "--last", "3"): ["wrong use", "allowed: lightkit runs [FOLDER]"],
        ("fit", "--json"): ["fit has no flag --json"],
    }.items():
        assert main([*words]) == 2
        err = capsys.readouterr().err
        assert all(part in err for part in parts), err
    assert main(["runs", "--help"]) == 0
    out = capsys.readouterr().out
    assert "lightkit runs RUN RUN" in out
    assert "--json" in out
    with pytest.raises(ConfigError, match="no such folder"):
        lk.find_runs(tmp_path / "missing")


def test_a_terminal_gets_as_many_columns_as_it_has(tmp_path, monkeypatch):
    folder_of(tmp_path, "a" * 200)
    assert max(map(len, runs.report([str(tmp_path)]).splitlines())) > 200
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(os.environ, "COLUMNS", "70")
    assert max(map(len, runs.report([str(tmp_path)]).splitlines())) <= 70
