from __future__ import annotations

import ast
import logging
import signal
import subprocess
import sys

import pytest

from lightkit.loggers import CSVLogger, JSONLLogger, Logger, TensorBoardLogger
from lightkit.loggers.base import NullExperiment, flatten


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_without_save_dir_the_trainer_gives_the_folder(kind, tmp_path):
    logger = kind()
    assert (logger.log_dir, logger.name, logger.version) == (None, None, None)
    logger.open(tmp_path / "Net" / "version_3")
    logger.close()
    assert logger.log_dir == str(tmp_path / "Net" / "version_3")
    assert (logger.name, logger.version) == ("Net", 3)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_save_dir_gives_the_layout_of_the_field(kind, tmp_path):
    (tmp_path / "digits" / "version_0").mkdir(parents=True)
    (tmp_path / "digits" / "version_10").mkdir()
    (tmp_path / "digits" / "version_x").mkdir()
    assert kind(tmp_path, "digits").log_dir == str(tmp_path / "digits" / "version_11")
    assert kind(tmp_path, "digits", 4).log_dir == str(tmp_path / "digits" / "version_4")
    assert kind(tmp_path, "digits", "first").log_dir == str(tmp_path / "digits" / "first")
    assert kind(str(tmp_path)).log_dir == str(tmp_path / "version_0")
    assert kind(tmp_path, "digits", 4).version == 4
    assert kind(tmp_path, "digits").name == "digits"


def test_the_version_is_chosen_once(tmp_path):
    logger = CSVLogger(tmp_path)
    chosen = logger.log_dir
    (tmp_path / "version_0").mkdir()
    assert logger.log_dir == chosen


def test_each_run_gets_the_next_version_unless_one_is_given(tmp_path):
    logger, fixed = CSVLogger(tmp_path), CSVLogger(tmp_path, version="same")
    for number in range(2):
        for one in (logger, fixed):
            one.open(one.next_dir())
            one.close()
        assert logger.log_dir == str(tmp_path / f"version_{number}")
        assert logger.version == number
        assert fixed.log_dir == str(tmp_path / "same")
    assert CSVLogger().next_dir() is None


def test_asking_for_the_folder_makes_none(tmp_path):
    assert TensorBoardLogger(tmp_path, "a").log_dir is not None
    assert list(tmp_path.iterdir()) == []


def test_experiment_without_a_run_takes_every_call_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    logger = TensorBoardLogger()
    logger.experiment.add_image("digit", object(), 3)
    logger.experiment.add_histogram("weights", values=object())
    logger.log_metrics({"loss": 1.0}, 1)
    logger.flush()
    logger.close()
    assert [r.message for r in caplog.records] == [
        "TensorBoardLogger has no run folder here: what is sent to .experiment is dropped"
    ]


def test_a_logger_of_rows_says_that_it_has_no_experiment(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="lightkit")
    logger = CSVLogger()
    logger.open(tmp_path)
    logger.experiment.add_image("digit", object(), 3)
    logger.close()
    assert [r.message for r in caplog.records] == [
        "CSVLogger has no experiment here: what is sent to .experiment is dropped"
    ]


def test_a_logger_of_ones_own_needs_log_metrics_only(tmp_path):
    class Mine(Logger):
        def __init__(self):  # without super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step):
            self.rows.append((step, dict(metrics)))

    logger = Mine()
    logger.open(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_graph(None)
    logger.log_metrics({"a": 1.0}, 5)
    logger.flush()
    assert logger.mark() == {}
    logger.rewind({})
    logger.close()
    logger.close()
    assert logger.rows == [(5, {"a": 1.0})]
    assert logger.log_dir == str(tmp_path)


def test_a_logger_without_log_metrics_says_which_class():
    class Mine(Logger):
        pass

    with pytest.raises(NotImplementedError, match="Mine must define log_metrics"):
        Mine().log_metrics({}, 0)


KILLED = """
import os, signal, sys, time
from lightkit.loggers import CSVLogger, JSONLLogger, TensorBoardLogger
sys.path.insert(0, sys.argv[2])
from rows import write
loggers = [TensorBoardLogger(), JSONLLogger(), CSVLogger()]
for logger in loggers:
    logger.open(sys.argv[1])
    logger.log_hyperparams({"lr": 0.1})
marks = write(loggers, 0, 25)
write(loggers, 25, 32)
print(repr(marks), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
ROWS = """
def write(loggers, start, end):
    for step in range(start, end):
        for logger in loggers:
            logger.log_metrics({"epoch": step // 10, "train_loss": step / 7}, step + 1)
            if step % 10 == 9:
                for count in range(3):  # an evaluation counts its rows on its own
                    logger.log_metrics({"val_step": count / 3}, step * 3 + count)
                logger.log_metrics({"epoch": step // 10, f"val_{step}": 0.5}, step + 1)
    return [logger.mark() for logger in loggers]
"""


def test_a_run_that_was_killed_and_rewound_has_the_files_of_one_that_was_not(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "rows.py").write_text(ROWS)
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, run, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (events,) = run.glob("events.*")
    with events.open("ab") as file:
        file.write(b"\x07\x00")  # killed in the middle of a record
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    write: dict = {}
    exec(ROWS, write)
    loggers = [TensorBoardLogger(), JSONLLogger(), CSVLogger()]
    for logger, mark in zip(loggers, ast.literal_eval(done.stdout), strict=True):
        logger.open(run, purge_step=26)
        logger.rewind(mark)
    write["write"](loggers, 25, 60)
    others = [TensorBoardLogger(), JSONLLogger(), CSVLogger()]
    for logger in others:
        logger.open(whole)
        logger.log_hyperparams({"lr": 0.1})
    write["write"](others, 0, 60)
    for logger in loggers + others:
        logger.close()
    for name in ("metrics.jsonl", "metrics.csv", "hparams.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    found, wanted = EventAccumulator(str(run)).Reload(), EventAccumulator(str(whole)).Reload()
    assert found.Tags() == wanted.Tags()
    assert len(found.Scalars("val_step")) == 18
    for tag in found.Tags()["scalars"]:
        rows = [[(s.step, s.value) for s in one.Scalars(tag)] for one in (found, wanted)]
        assert rows[0] == rows[1]
    assert list(found.summary_metadata) == list(wanted.summary_metadata)


def test_flatten():
    nested = {"lr": 0.1, "net": {"width": 8, "more": {"depth": 2}}, "empty": {}}
    assert flatten(nested) == {"lr": 0.1, "net/width": 8, "net/more/depth": 2, "empty": {}}


def test_on_other_ranks_a_logger_knows_the_folder_and_writes_nothing(tmp_path):
    (tmp_path / "logs" / "version_0").mkdir(parents=True)  # by rank zero
    for kind in (TensorBoardLogger, JSONLLogger, CSVLogger):
        for given in ({}, {"save_dir": tmp_path / "logs"}):
            logger = kind(**given)
            logger.follow(tmp_path / "logs" / "version_0")
            assert logger.log_dir == str(tmp_path / "logs" / "version_0")
            assert logger.version == 0
            logger.log_metrics({"loss": 1.0}, 1)
            logger.log_hyperparams({"lr": 1.0})
            assert isinstance(logger.experiment, NullExperiment)
            logger.experiment.add_image("a", None, 3).anything()
            assert logger.mark() == {}
            logger.close()
            assert logger.name == ("logs" if not given else None)
    assert [p.name for p in tmp_path.rglob("*")] == ["logs", "version_0"]


def test_a_logger_that_followed_may_write_in_a_later_run(tmp_path):
    logger = JSONLLogger()
    logger.follow(tmp_path / "a")
    logger.open(tmp_path / "b")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    assert logger.log_dir == str(tmp_path / "b")
    assert (tmp_path / "b" / "metrics.jsonl").read_text()
