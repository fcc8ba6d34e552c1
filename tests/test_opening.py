"""How a run is put together: its callbacks, its folder, its first and last lines."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import opening
from lightkit.callbacks import EarlyStopping, ModelCheckpoint, ModelSummary, ProgressBar
from lightkit.errors import ConfigError, OptimizerError


class Net(lk.TaskModule):
    def __init__(self, width: int = 4, act: nn.Module | None = None):
        super().__init__()
        self.net = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8, seed: int = 1, **options) -> DataLoader:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, **options)


@pytest.fixture
def quiet(tmp_path):
    def make(**options) -> lk.Trainer:
        defaults = {
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path / "runs",
        }
        return lk.Trainer(**defaults | options)

    return make


# --- callbacks -----------------------------------------------------------------------------------


def kinds(trainer) -> list[type]:
    return [type(c) for c in trainer.callbacks]


def test_defaults_are_added_only_where_they_are_missing(quiet, tmp_path):
    on = {"enable_progress_bar": True, "enable_checkpointing": True, "enable_model_summary": True}
    t = quiet(**on)
    t.fit(Net(), loader())
    assert sorted(k.__name__ for k in kinds(t)) == [
        "ModelCheckpoint",
        "ModelSummary",
        "ProgressBar",
    ]
    mine = [ModelSummary(), ProgressBar(), ModelCheckpoint()]
    t = quiet(callbacks=mine, **on)
    t.fit(Net(), loader())
    assert set(t.callbacks) == set(mine)
    t = quiet()
    t.fit(Net(), loader())
    assert t.callbacks == []


def test_checkpoints_come_last_whatever_the_order_given(quiet):
    class Mine(lk.Callback):
        pass

    one, two, save = Mine(), EarlyStopping(monitor="train_loss"), ModelCheckpoint()
    t = quiet(callbacks=[save, one, two], enable_checkpointing=True)
    t.fit(Net(), loader())
    assert t.callbacks == [one, two, save]
    assert t.early_stopping_callback is two
    assert t.checkpoint_callback is save
    assert t.progress_bar_callback is None


def test_callbacks_of_the_task_replace_those_of_one_kind(quiet):
    class Asks(Net):
        def configure_callbacks(self):
            return EarlyStopping(monitor="val_loss")

    given = EarlyStopping(monitor="train_loss")
    t = quiet(callbacks=given)
    t.fit(Asks(), loader(), loader(4, seed=2))
    assert [c.monitor for c in t.callbacks] == ["val_loss"]
    t.fit(Net(), loader())
    assert t.callbacks == [given]

    class Wrong(Net):
        def configure_callbacks(self):
            return [EarlyStopping]

    with pytest.raises(ConfigError, match="configure_callbacks"):
        t.fit(Wrong(), loader())


def test_a_checkpoint_callback_where_checkpoints_are_off(quiet):
    with pytest.raises(ConfigError, match="enable_checkpointing=False, but"):
        quiet(callbacks=ModelCheckpoint()).fit(Net(), loader())


# --- what is checked before the first batch ------------------------------------------------------


def test_a_validation_that_never_comes_is_said(quiet, caplog):
    quiet(max_epochs=2, check_val_every_n_epoch=3).fit(Net(), loader(), loader(4, seed=2))
    assert "check_val_every_n_epoch=3 is more than max_epochs=2" in caplog.text
    caplog.clear()
    quiet(max_epochs=3, check_val_every_n_epoch=3).fit(Net(), loader(), loader(4, seed=2))
    quiet(max_epochs=-1, max_steps=1, check_val_every_n_epoch=3).fit(Net(), loader(), loader(4))
    assert "never runs" not in caplog.text


def test_a_generator_of_validation_batches_is_not_spent_on_the_sanity_check(quiet):
    class Count(Net):
        def validation_step(self, batch, batch_idx):
            seen.append(self.trainer.sanity_checking)

    seen = []
    quiet().fit(Count(), loader(), (batch for batch in loader(12, seed=2)))
    assert seen == [False] * 3


def test_parameters_that_are_in_no_optimizer(quiet, caplog):
    class Forgets(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    quiet().fit(Forgets(), loader())
    assert "in no optimizer and will never change: head.weight, head.bias" in caplog.text


def test_a_frozen_task(quiet):
    net = Net()
    net.freeze()
    with pytest.raises(OptimizerError, match="all of them are frozen"):
        quiet().fit(net, loader())


# --- folder --------------------------------------------------------------------------------------


def test_versions_count_up_past_what_is_there(quiet, tmp_path):
    for name in ("version_3", "version_x", "other"):
        (tmp_path / "runs" / "Net" / name).mkdir(parents=True)
    t = quiet(enable_checkpointing=True)
    names = []
    for _ in range(2):
        t.fit(Net(), loader())
        names.append(t.run_dir.name)
    assert names == ["version_4", "version_5"]
    assert t.log_dir == str(tmp_path / "runs" / "Net" / "version_5")


def test_what_is_in_the_folder(quiet):
    class Data(lk.DataModule):
        def __init__(self, batch_size: int = 4):
            self.batch_size = batch_size

        def train_dataloader(self):
            return loader()

    t = quiet(logger=True, enable_checkpointing=True)
    t.config_text = "trainer: {}\n"
    t.fit(Net(act=nn.ReLU()), datamodule=Data())
    found = {p.relative_to(t.run_dir).as_posix() for p in t.run_dir.rglob("*") if p.is_file()}
    events = {name for name in found if name.startswith("events.")}
    assert len(events) == 1
    assert found - events - {"code.diff"} == {  # where these files have changes, or lie in no git
        ".lock", "config.yaml", "hparams.json", "metrics.jsonl", "provenance.json", "run.json",
        "checkpoints/last.ckpt", "checkpoints/step_000002.ckpt",
    }  # fmt: skip
    assert (t.run_dir / "config.yaml").read_text() == "trainer: {}\n"
    hparams = json.loads((t.run_dir / "hparams.json").read_text())
    assert hparams["width"] == hparams["batch_size"] == 4


# --- first and last lines ------------------------------------------------------------------------


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_first_and_last_lines(quiet, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = quiet(
        max_epochs=2, max_steps=3, max_time="1 hour", logger=True, seed=5, fused=False,
        precision="bf16-mixed", default_root_dir=None,
    )  # fmt: skip
    t.fit(Net(), loader())
    assert lines(capsys) == [
        "device:   cpu, precision bf16-mixed, seed 5",
        "training: 2 epochs, at most 3 steps, at most 3600 s, 2 batches of 4 per epoch",
        "folder:   runs/Net/version_0",
        "results:  runs/Net/version_0",
        "curves:   tensorboard --logdir runs/Net/version_0",
    ]


def test_lines_without_an_end_or_a_length(quiet, capsys):
    class Stops(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.stop("seen enough")

    quiet(max_epochs=-1, callbacks=Stops(), fused=False).fit(Net(), (b for b in loader()))
    assert lines(capsys) == [
        "not rehearsed: the loader (generator) gives its batches only once",
        "device:   cpu, precision 32-true",
        "training: without end, an unknown number of batches per epoch",
        "stopped: seen enough",
    ]


def test_the_samples_of_a_step_are_told_where_it_takes_several_batches(quiet, capsys):
    quiet(max_epochs=1, accumulate_grad_batches=2).fit(Net(), loader())
    assert "step:     8 samples: 4 per batch x 2 batches" in lines(capsys)
    quiet(max_epochs=1, accumulate_grad_batches=2).fit(Net(), list(loader()))
    assert "step:     2 batches" in lines(capsys)


def test_a_line_for_each_schedule_and_trial(quiet, capsys):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    quiet(overfit_batches=1, fast_dev_run=True).fit(Scheduled(), loader())
    said = lines(capsys)
    assert "trial:    fast_dev_run writes nothing" in said
    assert "trial:    overfit_batches trains on the same batches in every epoch" in said
    assert "schedule: StepLR per epoch: lr 0.01 -> 0.01 (epoch 1)" in said


@pytest.mark.parametrize("kind", [lk.DDPStrategy, lk.FSDPStrategy])
def test_a_strategy_says_how_long_the_others_are_waited_for(quiet, monkeypatch, kind):
    given = []

    def join(env, device, timeout):
        given.append(timeout)
        raise ConfigError("enough")

    monkeypatch.setattr(opening, "join", join)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    trainer = quiet(accelerator="cpu", strategy=kind(timeout=timedelta(minutes=3)))
    with pytest.raises(ConfigError, match="enough"):
        trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(4, 4), torch.ones(4, 1))))
    assert given == [timedelta(minutes=3)]
