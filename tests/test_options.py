"""The Trainer's arguments: what is wrong is said when it is made, with what is allowed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import lightkit as lk
from lightkit.callbacks import EarlyStopping
from lightkit.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_epoch", "max_epochs"),
        ("accumulate_grad_batch", "accumulate_grad_batches"),
        ("gradient_clip", "gradient_clip_val"),
        ("resume_from_checkpoint", "ckpt_path"),
        ("checkpoint_callback", "enable_checkpointing"),
        ("weights_summary", "enable_model_summary"),
        ("epochs", "max_epochs"),
        ("tpu_cores", "accelerator"),
    ],
)
def test_an_unknown_argument_names_what_to_write(name, hint):
    with pytest.raises(ConfigError) as error:
        lk.Trainer(**{name: 1})
    assert repr(name) in str(error.value)
    assert hint in str(error.value)


def test_arguments_are_keywords():
    with pytest.raises(ConfigError, match="keyword arguments only"):
        lk.Trainer(3)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_epochs", -2, "at least -1"),
        ("max_epochs", 2.0, "whole number"),
        ("max_epochs", True, "whole number"),
        ("max_epochs", "3", "whole number"),
        ("max_steps", "many", "no limit"),
        ("accumulate_grad_batches", 0, "at least 1"),
        ("accumulate_grad_batches", None, "at least 1"),
        ("log_every_n_steps", 0, "at least 1"),
        ("check_val_every_n_epoch", 0, "at least 1"),
        ("check_val_every_n_epoch", None, "needs val_check_interval"),
        ("num_sanity_val_steps", -2, "at least -1"),
        ("reload_dataloaders_every_n_epochs", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("gradient_clip_val", 0, "above 0"),
        ("gradient_clip_val", "1", "above 0"),
        ("gradient_clip_algorithm", "nrm", "Did you mean 'norm'"),
        ("precision", "bf16-mixd", "bf16-mixed"),
        ("precision", 8, "'bf16-mixed'"),
        ("strategy", "dpp", "Did you mean 'ddp'"),
        ("strategy", 2, "'fsdp'"),
        ("sync_batchnorm", "yes", "True, False"),
        ("num_nodes", 0, "at least 1"),
        ("enable_progress_bar", "yes", "True, False"),
        ("detect_anomaly", 1, "True, False"),
        ("deterministic", "wran", "'warn'"),
        ("fused", "auto", "None, True, False"),
        ("fast_dev_run", -1, "number of batches"),
        ("fast_dev_run", 1.5, "number of batches"),
        ("overfit_batches", 1.5, "between 0 and 1"),
        ("overfit_batches", -1, "between 0 and 1"),
        ("limit_train_batches", 1.5, "0.0 to 1.0"),
        ("limit_val_batches", -1, "int"),
        ("limit_test_batches", True, "int"),
        ("limit_predict_batches", "all", "int"),
        ("val_check_interval", 0, "'500 steps'"),
        ("val_check_interval", 1.5, "fraction"),
        ("val_check_interval", "sometimes", "val_check_interval="),
        ("max_time", "an hour", "'90 min'"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as error:
        lk.Trainer(**{name: value})
    assert name in str(error.value)
    assert allowed in str(error.value)
    assert len(str(error.value)) < 300


def test_whole_numbers_of_numpy_are_whole_numbers():
    t = lk.Trainer(max_epochs=np.int64(3), val_check_interval=np.int32(2))
    assert t.max_epochs == 3


@pytest.mark.parametrize("name", ["callbacks", "logger"])
def test_callbacks_and_loggers_of_the_wrong_kind(name):
    with pytest.raises(ConfigError, match=f"{name}: 5 is no"):
        lk.Trainer(**{name: [5]})
    with pytest.raises(ConfigError, match=r"Make an object of it: EarlyStopping\(\)"):
        lk.Trainer(**{name: EarlyStopping})


def test_one_callback_needs_no_list():
    stop = EarlyStopping(monitor="val_loss")
    assert lk.Trainer(callbacks=stop).callbacks == [stop]
    assert lk.Trainer(callbacks=(stop,)).callbacks == [stop]
    assert lk.Trainer(callbacks=None).callbacks == []


def test_making_a_trainer_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lk.Trainer(default_root_dir=tmp_path / "runs")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_the_seed_is_set_when_the_trainer_is_made():
    lk.Trainer(seed=11)
    one = torch.rand(3)
    lk.Trainer(seed=11)
    assert torch.equal(torch.rand(3), one)


def test_numbers_may_be_read_back():
    t = lk.Trainer(gradient_clip_val=0.5, min_epochs=1, min_steps=2, precision="16-mixed")
    assert (t.min_epochs, t.min_steps, t.precision) == (1, 2, "16-mixed")
    assert t.options.gradient_clip_val == 0.5


def test_arguments_of_the_field_that_ask_for_nothing_are_accepted():
    lk.Trainer(inference_mode=True, num_nodes=1, sync_batchnorm=False, profiler=None, plugins=None)
    with pytest.raises(ConfigError, match="plugins=3 asks for what is not in this version"):
        lk.Trainer(plugins=3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("advanced", "write 'simple' for a table of all parts of a run, or 'trace'"),
        ("pytorch", "write 'simple' for a table of all parts of a run, or 'trace'"),
        ("simpel", "allowed: None, 'simple', 'trace'. Did you mean 'simple'"),
        (True, "allowed: None, 'simple', 'trace'"),
        (lk.callbacks.SimpleProfiler, "Make an object of it: SimpleProfiler()"),
    ],
)
def test_a_profiler_that_does_not_exist_is_told_with_those_that_do(given, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        lk.Trainer(profiler=given)
