"""What a Trainer leaves behind, which mistakes it names, and how its calls end."""

from __future__ import annotations

import gc
import traceback

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.callbacks import ModelCheckpoint
from lightkit.errors import ConfigError, DataError, NotRunningError, UsageError
from lightkit.loggers import CSVLogger
from tests.small import Net, loader

# --- folder and loggers --------------------------------------------------------------------------


def test_nothing_is_written_without_logger_and_checkpoints(quiet, tmp_path):
    t = quiet()
    t.fit(Net(), loader(), loader(8))
    t.validate(verbose=False, dataloaders=loader())
    assert t.run_dir is None
    assert t.log_dir is None
    assert list(tmp_path.iterdir()) == []


def test_evaluations_write_nothing(tmp_path):
    t = lk.Trainer(default_root_dir=tmp_path / "runs", enable_progress_bar=False)
    t.validate(Net(), loader(), verbose=False)
    t.predict(Net(), loader())
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_writes_nothing_and_ends_after_its_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Draws(Net):
        def training_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("mine", 1.0, 0)
            return super().training_step(batch, batch_idx)

    checkpoint = ModelCheckpoint(monitor="val_loss")
    t = lk.Trainer(
        fast_dev_run=2,
        max_epochs=7,
        val_check_interval=100,
        check_val_every_n_epoch=3,
        callbacks=[checkpoint, lk.callbacks.LearningRateMonitor()],
        enable_progress_bar=False,
    )
    history = t.fit(Draws(), loader(), loader())
    assert t.global_step == 2
    assert len(history) == 1
    assert "val_loss" in history[0]
    assert t.num_val_batches == [2]
    assert t.checkpoint_callback is checkpoint
    assert list(tmp_path.iterdir()) == []
    assert len(t.predict(Net(), loader())) == 2


def test_the_folder_of_an_explicit_logger_is_the_run_folder(tmp_path):
    logger = CSVLogger(save_dir=tmp_path / "mine", name="exp")
    t = lk.Trainer(max_epochs=1, logger=logger, enable_progress_bar=False)
    t.fit(Net(), loader())
    assert t.run_dir == tmp_path / "mine" / "exp" / "version_0"
    assert (t.run_dir / "checkpoints" / "last.ckpt").exists()
    assert t.logger is logger
    assert t.loggers == [logger]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made.*default_root_dir"):
        lk.Trainer(default_root_dir=tmp_path / "file").fit(Net(), loader())


def test_an_error_before_the_first_batch_leaves_no_folder(tmp_path):
    t = lk.Trainer(default_root_dir=tmp_path / "runs", enable_progress_bar=False)
    with pytest.raises(DataError, match="There is no training loader"):
        t.fit(Net())
    assert list(tmp_path.iterdir()) == []


# --- mistakes ------------------------------------------------------------------------------------


def test_what_is_no_task(quiet):
    t = quiet()
    with pytest.raises(UsageError, match=r"Net is a class. Pass an object of it: Net\(...\)"):
        t.fit(Net, loader())
    with pytest.raises(UsageError, match="got Linear"):
        t.fit(nn.Linear(1, 1), loader())
    with pytest.raises(UsageError, match="Pass the task"):
        t.validate(dataloaders=loader())


def test_missing_steps(quiet):
    class Empty(lk.TaskModule):
        def forward(self, x):
            return x

    class NoOptimizer(Empty):
        def training_step(self, batch, batch_idx):
            return batch

    with pytest.raises(UsageError, match="Empty defines no training_step"):
        quiet().fit(Empty(), loader())
    with pytest.raises(UsageError, match="NoOptimizer defines no configure_optimizers"):
        quiet().fit(NoOptimizer(), loader())
    with pytest.raises(UsageError, match="Empty defines no validation_step"):
        quiet().validate(Empty(), loader())
    with pytest.raises(UsageError, match="Empty defines no validation_step"):
        quiet().test(Empty(), loader())
    assert len(quiet().predict(Empty(), loader())) == 5


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_loader_for_an_evaluation(quiet, stage):
    with pytest.raises(DataError, match="There is no loader to run"):
        getattr(quiet(), stage)(Net())


def test_several_processes_without_a_number_are_refused(quiet, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        quiet().fit(Net(), loader())


def test_loaders_and_a_data_module_at_once(quiet):
    class Data(lk.DataModule):
        pass

    with pytest.raises(UsageError, match="either loaders or datamodule="):
        quiet().fit(Net(), loader(), datamodule=Data())
    for arguments in ({"train_dataloaders": Data}, {"datamodule": Data}):
        with pytest.raises(UsageError, match="Data is a class"):
            quiet().fit(Net(), **arguments)


def test_saving_outside_a_fit(quiet, tmp_path):
    class Saves(lk.Callback):
        def on_validation_start(self, trainer, task):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    t = quiet()
    with pytest.raises(NotRunningError, match="while fit runs and when it has ended"):
        t.save_checkpoint(tmp_path / "x.ckpt")
    t.fit(Net(), loader())
    t.callbacks.append(Saves())
    with pytest.raises(NotRunningError):  # in the middle of an evaluation
        t.validate(Net(), loader())
    assert not (tmp_path / "x.ckpt").exists()
    t.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").exists()


# --- how it ends ---------------------------------------------------------------------------------


class Watch(lk.Callback):
    def __init__(self):
        self.seen = []

    def on_exception(self, trainer, task, exception):
        self.seen.append(type(exception).__name__)

    def on_fit_end(self, trainer, task):
        self.seen.append("fit_end")

    def teardown(self, trainer, task, stage):
        self.seen.append(f"teardown {stage}")


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_exception_closes_everything_and_stays_itself(tmp_path, kind):
    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise kind("mine")
            self.log("seen", 1.0)
            return super().training_step(batch, batch_idx)

        def on_exception(self, exception):
            raise RuntimeError("a hook that fails hides nothing")

        def teardown(self, stage):
            raise RuntimeError("nor does this one")

    watch, net = Watch(), Breaks()
    t = lk.Trainer(
        default_root_dir=tmp_path, callbacks=watch, log_every_n_steps=1, enable_progress_bar=False
    )
    with pytest.raises(kind, match="mine") as error:
        t.fit(net, loader())
    frames = traceback.extract_tb(error.value.__traceback__)
    assert frames[-1].name == "training_step"
    assert watch.seen == [kind.__name__, "teardown fit"]
    assert gc.get_freeze_count() == 0
    assert t.stage is None
    assert t.global_step == 2
    assert len((t.run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    net.log("after", 1.0)  # outside a run it goes nowhere
    with pytest.raises(NotRunningError):
        net.optimizers()
    assert not t.logger._writer


def test_without_an_exception_a_failing_teardown_is_seen(quiet):
    class Breaks(Net):
        def teardown(self, stage):
            raise RuntimeError("mine")

    watch = Watch()
    with pytest.raises(RuntimeError, match="mine"):
        quiet(callbacks=watch).fit(Breaks(), loader())
    assert watch.seen == ["fit_end", "teardown fit"]


def test_an_exception_in_setup_is_reported_and_closed(quiet):
    class Data(lk.DataModule):
        def setup(self, stage):
            raise OSError("no such disk")

        def teardown(self, stage):
            watch.seen.append("data")

    watch = Watch()
    t = quiet(callbacks=watch)
    with pytest.raises(OSError, match="no such disk"):
        t.fit(Net(), datamodule=Data())
    assert watch.seen == ["OSError", "data", "teardown fit"]
    assert t.stage is None
    t.fit(Net(), loader())
    assert t.global_step == 5


def test_torch_switches_are_put_back(quiet):
    class Look(Net):
        def training_step(self, batch, batch_idx):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_anomaly_enabled()
            return super().training_step(batch, batch_idx)

    quiet(deterministic="warn", detect_anomaly=True, benchmark=False).fit(Look(), loader(4))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()
