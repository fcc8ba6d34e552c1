"""``run.json`` says what a run is; the lock says who works on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightkit import ledger
from lightkit.errors import ConfigError, UsageError
from lightkit.history import History
from lightkit.ledger import Ledger, Lock, Record
from lightkit.limits import Limits
from lightkit.options import Options
from lightkit.state import TrainState
from lightkit.trainer import Trainer


class Task:
    def __init__(self, **hparams):
        self.hparams = hparams


def options(**given) -> Options:
    return Trainer(**given).options


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record(settings={"a": [1, None]}, checkpoints=["checkpoints"], job="slurm 7")
    record.write(tmp_path)
    assert ledger.read(tmp_path) == record
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"id": "a", "later": 1}'])
def test_what_cannot_be_read_is_no_record(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    found = ledger.read(tmp_path)
    assert (found is None) == ("later" not in text)
    assert ledger.read(tmp_path / "missing") is None


def test_how_a_run_ends(tmp_path):
    state = TrainState(epoch=2, global_step=30)
    for error, status in (
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (ValueError("x"), "failed"),
    ):
        entry = Ledger(tmp_path, Record())
        assert ledger.read(tmp_path).status == "running"
        entry.close(error, state, History())
        found = ledger.read(tmp_path)
        assert (found.status, found.epoch, found.global_step) == (status, 2, 30)


def test_settings_are_plain_and_the_same_in_two_processes(tmp_path):
    task = Task(lr=0.1, path=Path("a/b"), layers=(1, 2), net=object(), kind=dict, sub={"x": 1.5})
    found = ledger.settings_of(
        task, Task(size=3), options(seed=4, precision="bf16-mixed"), drawn=False
    )
    assert found["task"] == "Task"
    assert found["task.path"] == "a/b"
    assert found["task.layers"] == [1, 2]
    assert found["task.net"] == "<builtins.object>"
    assert found["task.kind"] == "<builtins.dict>"
    assert found["data.size"] == 3
    assert found["trainer.seed"] == 4
    assert found["trainer.precision"] == "bf16-mixed"
    assert json.loads(json.dumps(found)) == found
    assert not any("max_epochs" in name for name in found)


def test_differences_name_what_was_and_what_is():
    before = {"task.lr": 0.1, "task.old": 1, "trainer.seed": 1, "task.nan": float("nan")}
    now = {"task.lr": 0.2, "task.new": "a", "trainer.seed": None, "task.nan": float("nan")}
    assert ledger.differences(before, now) == [
        "task.lr: 0.1 in the run, 0.2 now",
        'task.new: not there in the run, "a" now',
        "task.old: 1 in the run, not there now",
    ]
    assert ledger.differences(before, before) == []
    assert ledger.differences({"task.a": {"x": 1, "y": 2}}, {"task.a": {"y": 2, "x": 1}}) == []
    assert ledger.differences({"trainer.seed": 1}, {"trainer.seed": 2})


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((10, -1, None), (10, -1, None), False),
        ((10, -1, None), (11, -1, None), True),
        ((10, -1, None), (9, -1, None), False),
        ((10, -1, None), (-1, -1, None), True),
        ((-1, 500, None), (-1, 600, None), True),
        ((-1, -1, 60.0), (-1, -1, 120.0), True),
        ((-1, -1, 60.0), (-1, -1, 30.0), False),
    ],
)
def test_limits_that_allow_more(before, now, expected):
    old, new = (
        ledger.limits_of(Limits(epochs, steps, 0, 0, seconds))
        for epochs, steps, seconds in (before, now)
    )
    assert ledger.raised(new, old) is expected


def test_a_folder_is_locked_once_and_free_again(tmp_path):
    lock = Lock(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="in use by another fit of this process"):
            Lock(same)
    lock.release()
    lock.release()
    Lock(tmp_path).release()


def test_where_there_are_no_locks_two_fits_of_a_process_still_cannot_share_a_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ledger, "fcntl", None)
    lock = Lock(tmp_path)
    with pytest.raises(UsageError, match="in use"):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


HOLDS = """
import sys, time
from pathlib import Path
from lightkit.ledger import Ledger, Record
entry = Ledger(Path(sys.argv[1]), Record())
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_of_another_process_ends_with_it(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=rf"another process \(process {other.pid} on "):
            Ledger(tmp_path, Record())
    finally:
        other.kill()
        other.communicate()
    assert ledger.read(tmp_path).status == "running"  # nobody could say how it ended
    Lock(tmp_path).release()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written.*default_root_dir"):
        Ledger(tmp_path / "missing", Record())


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ((4, 1), (2, 2), True),
        ((4, 1), (1, 4), True),
        ((4, 1), (2, 1), True),
        ((2, 2), (2, 4), False),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(before, now, same):
    """As (processes, batches of each per step); those of a step may be kept by other batches."""
    names = ("processes", "trainer.accumulate_grad_batches")
    old, new = (dict(zip(names, values, strict=True)) for values in (before, now))
    lines = ledger.differences(old, new)
    assert lines == ([] if same else ["trainer.accumulate_grad_batches: 2 in the run, 4 now"])


def test_a_record_of_before_there_were_several_processes_is_that_of_one():
    old = {"trainer.accumulate_grad_batches": 4}
    assert not ledger.differences(old, {**old, "processes": 2})
    assert not ledger.differences(old, {"trainer.accumulate_grad_batches": 2, "processes": 2})
