"""RequeueJob, with a ``scontrol`` that only writes down what it was told."""

from __future__ import annotations

import os
import signal

import pytest

import lightkit as lk
from lightkit.callbacks import RequeueJob
from lightkit.errors import ConfigError
from tests.small import Net, loader


class Send(lk.Callback):
    def __init__(self, number, fail=None):
        self.number, self.fail = number, fail

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            signal.raise_signal(self.number)
            if self.fail:
                raise self.fail


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Puts a ``scontrol`` on the path that runs a line of shell; returns what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(line: str = "true"):
        script = folder / "scontrol"
        script.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/told"\n{line}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "41")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        return tmp_path / "told"

    return make


def fit(quiet, *callbacks, ends=SystemExit):
    with pytest.raises(ends) as error:
        quiet(callbacks=list(callbacks)).fit(Net(), loader())
    return error.value


def test_the_job_goes_back_into_the_queue(quiet, scontrol, caplog):
    told = scontrol()
    caplog.set_level("INFO")
    assert fit(quiet, RequeueJob(), Send(signal.SIGUSR1)).code == 128 + signal.SIGUSR1
    assert told.read_text() == "requeue 41\n"
    assert "job 41 is in the queue again" in caplog.text


def test_a_task_of_an_array(quiet, scontrol, monkeypatch):
    told = scontrol()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    fit(quiet, RequeueJob("SIGTERM"), Send(signal.SIGTERM))
    assert told.read_text() == "requeue 40_1\n"


def test_other_endings_leave_the_queue_alone(quiet, scontrol):
    told = scontrol()
    fit(quiet, RequeueJob(), Send(signal.SIGTERM))
    error = fit(quiet, RequeueJob(), Send(signal.SIGUSR1, OSError("mine")), ends=OSError)
    assert str(error) == "mine"
    quiet(callbacks=RequeueJob()).fit(Net(), loader())
    assert not told.exists()


def test_an_evaluation_after_the_fit_that_a_signal_ended_leaves_it_alone_too(quiet, scontrol):
    class Ends(Net):
        def validation_step(self, batch, batch_idx):
            raise KeyboardInterrupt

    told = scontrol()
    trainer = quiet(callbacks=[RequeueJob(), Send(signal.SIGUSR1)])
    with pytest.raises(SystemExit):
        trainer.fit(Net(), loader())
    with pytest.raises(KeyboardInterrupt):
        trainer.validate(Ends(), loader())
    assert told.read_text().count("requeue") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("echo 'job is not requeueable' >&2; exit 1", "job is not requeueable. Submit the job"),
        ("exit 3", "failed: exit code 3"),
    ],
)
def test_what_scontrol_refuses_is_said(quiet, scontrol, caplog, line, words):
    scontrol(line)
    assert fit(quiet, RequeueJob(), Send(signal.SIGUSR1)).code == 138
    assert words in caplog.text


def test_outside_slurm_and_without_scontrol(quiet, scontrol, monkeypatch, caplog, tmp_path):
    fit(quiet, RequeueJob(), Send(signal.SIGUSR1))
    assert "no SLURM job" in caplog.text
    scontrol()
    monkeypatch.setenv("PATH", str(tmp_path))
    fit(quiet, RequeueJob(), Send(signal.SIGUSR1))
    assert "scontrol requeue 41 failed: [Errno 2]" in caplog.text


def test_a_signal_that_no_fit_listens_to():
    with pytest.raises(ConfigError, match="Did you mean 'SIGUSR1'"):
        RequeueJob("SIGUSR")
