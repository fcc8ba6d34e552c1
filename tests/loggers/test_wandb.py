"""Against a stand-in that behaves as the service does, and a real wandb where there is one."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import lightkit as lk
from lightkit.errors import ConfigError
from lightkit.loggers import WandbLogger
from tests.small import Net, loader


class Config(dict):
    def update(self, values, allow_val_change=False):
        assert allow_val_change  # a run that goes on may have other values
        super().update(values)


class Run:
    """A run as the service keeps it: rows, and the last value of each name."""

    def __init__(self, number, **options):
        self.id, self.options = options.get("id") or f"run{number}", options
        self.rows, self.summary, self.config = [], {}, Config()
        self.finished, self.metrics, self.artifacts, self.watched = 0, {}, [], []

    def log(self, row):
        self.rows.append(row)
        self.summary.update(row)

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def watch(self, model, **options):
        self.watched.append((model, options))

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.finished += 1


class Artifact:
    def __init__(self, name, type):
        self.name, self.type, self.folders = name, type, []

    def add_dir(self, folder):
        self.folders.append(folder)


class Service(types.ModuleType):
    """Stands for the module."""

    Artifact = Artifact

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.run = [], None

    def init(self, **options):
        known = [run for run in self.runs if run.id == options.get("id")]
        if known:
            assert options["resume"] == "allow"
            return known[0]
        self.runs.append(Run(len(self.runs), **options))
        return self.runs[-1]

    @staticmethod
    def Histogram(values):
        return ("histogram", values.shape)


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def trainer(folder, logger, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"default_root_dir": folder, "log_every_n_steps": 1, "max_epochs": 2}
    return lk.Trainer(logger=logger, **quiet | options)


class Sized(Net):
    def __init__(self, width: int = 4, rate: float = 0.1):
        super().__init__(width)
        self.save_hyperparameters()


def test_a_fit_is_a_run(service, tmp_path):
    """S1-14: rows against the optimizer step, and the hyperparameters."""
    logger = WandbLogger("first", project="tests", tags=["a"], prefix="x")
    run = trainer(tmp_path, logger)
    run.fit(Sized(rate=0.2), loader(), loader())
    (sent,) = service.runs
    expected = {"name": "first", "project": "tests", "tags": ["a"], "dir": str(run.run_dir)}
    assert sent.options == expected
    assert sent.config["rate"] == 0.2
    assert sent.finished == 1
    assert sent.metrics["*"] == {"step_metric": "trainer/global_step", "step_sync": True}
    steps = [row["trainer/global_step"] for row in sent.rows if "x-train_loss" in row]
    assert set(range(1, 11)) == set(steps)
    assert [row["x-epoch"] for row in sent.rows if "x-val_loss" in row] == [0, 1]
    assert (logger.version, logger.name) == ("run0", "tests")


def test_two_fits_are_two_runs_and_an_evaluation_is_none(service, tmp_path):
    logger = WandbLogger()
    run = trainer(tmp_path, logger, max_epochs=1)
    for _ in range(2):
        run.fit(Net(), loader(), loader())
    run.validate(Net(), loader())
    assert [one.finished for one in service.runs] == [1, 1]


def test_a_run_that_is_resumed_goes_on_with_each_row_once(service, tmp_path):
    class Breaks(Net):
        broken = True

        def training_step(self, batch, batch_idx):
            if self.broken and self.global_step == 8:
                raise RuntimeError("killed")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    start = Net().state_dict()
    tasks = [Breaks(), Breaks(), Breaks()]
    for task in tasks:
        task.load_state_dict(start)
    saver = lk.callbacks.ModelCheckpoint(save_on_exception=False)
    options = {"max_epochs": 3, "callbacks": [saver, lk.callbacks.Statistics(histograms=True)]}
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, WandbLogger(), **options).fit(tasks[0], loader(), loader())
    written = len(service.runs[0].rows)
    tasks[1].broken = tasks[2].broken = False
    logger = WandbLogger()
    again = trainer(tmp_path, logger, **options)
    again.fit(tasks[1], loader(), loader(), ckpt_path="auto")
    assert len(service.runs) == 1
    assert logger.version == "run0"
    assert len(service.runs[0].rows) > written
    trainer(tmp_path / "whole", WandbLogger(), **options).fit(tasks[2], loader(), loader())
    assert service.runs[0].rows == service.runs[1].rows


def test_histograms_and_watching(service, tmp_path):
    logger, task = WandbLogger(), Net()
    logger.watch(task, log_freq=5)
    trainer(
        tmp_path, logger, max_steps=2, callbacks=[lk.callbacks.Statistics(histograms=True)]
    ).fit(task, loader())
    (run,) = service.runs
    assert run.watched == [(task, {"log_freq": 5})]
    found = [row["weights/net.weight"] for row in run.rows if "weights/net.weight" in row]
    assert found == [("histogram", (4,))] * 2  # the values that are finite, in one row


def test_a_run_that_is_there_already_is_used_and_left_open(service, tmp_path):
    for logger, mine in ((WandbLogger(experiment=Run(5)), None), (WandbLogger(), Run(6))):
        service.run = mine
        trainer(tmp_path, logger, max_epochs=1).fit(Net(), loader())
        run = mine or logger._given
        assert service.runs == []
        assert run.rows
        assert run.finished == 0


def test_fits_in_one_run_come_behind_each_other(service, tmp_path):
    """In a run of the user's own, or one that is named: no row is taken for one that was there."""
    service.run = Run(6)
    for _ in range(2):
        trainer(tmp_path, WandbLogger(), max_epochs=1).fit(Net(), loader())
    rows = service.run.rows
    assert [row["trainer/row"] for row in rows] == list(range(1, len(rows) + 1))
    assert sum("train_loss" in row and row["trainer/global_step"] == 1 for row in rows) == 2
    service.run = None
    for _ in range(2):
        trainer(tmp_path, WandbLogger(id="mine"), max_epochs=1).fit(Net(), loader())
    assert len(service.runs[0].rows) == len(rows)


def test_an_id_goes_on_with_its_run(service, tmp_path):
    logger = WandbLogger(id="mine", offline=True, save_dir=tmp_path / "files", entity="us")
    trainer(tmp_path, logger, max_epochs=1).fit(Net(), loader())
    options = service.runs[0].options
    assert (options["id"], options["resume"], options["mode"]) == ("mine", "allow", "offline")
    assert (options["dir"], options["entity"]) == (str(tmp_path / "files"), "us")
    assert (tmp_path / "files").is_dir()


@pytest.mark.parametrize("log_model", [True, "all"])
def test_checkpoints_are_uploaded_at_the_end(service, tmp_path, log_model):
    run = trainer(tmp_path, WandbLogger(log_model=log_model), max_epochs=1)
    run.fit(Net(), loader())
    (artifact,) = service.runs[0].artifacts
    assert artifact.folders == [str(run.run_dir / "checkpoints")]
    assert (artifact.name, artifact.type) == ("model-run0", "model")


def test_what_cannot_be_is_said(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="log_model"):
        WandbLogger(log_model="best")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        trainer(tmp_path, WandbLogger()).fit(Net(), loader())


def test_a_checkpoint_without_a_run_begins_a_new_one(service, tmp_path, caplog):
    logger = WandbLogger()
    logger.open(tmp_path)
    logger.rewind({})
    logger.log_metrics({"a": 1.0}, 1)
    logger.close()
    assert "names no run" in caplog.text
    assert service.runs[0].rows == [{"a": 1.0, "trainer/global_step": 1, "trainer/row": 1}]


def test_a_fast_dev_run_sends_nothing(service, tmp_path):
    trainer(tmp_path, WandbLogger(), fast_dev_run=True).fit(Net(), loader())
    assert service.runs == []


@pytest.mark.filterwarnings("ignore")
def test_with_the_real_package_in_offline_mode(tmp_path, monkeypatch):
    """Its files hold the rows; nothing is sent."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    logger = WandbLogger(project="tests", offline=True, save_dir=tmp_path)
    callbacks = [lk.callbacks.Statistics(histograms=True)]
    run = trainer(tmp_path, logger, callbacks=callbacks)
    run.fit(Sized(), loader(), loader())
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert str(logger.version) in file.name
    content = file.read_bytes()
    for name in (b"train_loss", b"val_loss", b"trainer/global_step", b"weights/net.weight"):
        assert name in content
    last = run.run_dir / "checkpoints" / "last.ckpt"
    again = WandbLogger(project="tests", offline=True, save_dir=tmp_path)
    trainer(tmp_path, again, max_epochs=3, callbacks=callbacks).fit(
        Sized(), loader(), loader(), ckpt_path=last
    )
    assert again.version == logger.version
