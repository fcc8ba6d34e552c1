"""Mistakes that a fit tells once, and values that only look like numbers or names."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.callbacks import EarlyStopping, Timer
from lightkit.errors import ConfigError, OptimizerError
from tests.small import Net, loader


class WrongLength(DataLoader):
    said = 9

    def __len__(self):
        return self.said


@pytest.mark.parametrize("said", [3, 9])
def test_a_wrong_length_is_told_once_per_loader(quiet, caplog, said):
    caplog.set_level(logging.WARNING, logger="lightkit")
    train, val = (WrongLength(loader(samples).dataset, 4) for samples in (20, 16))
    train.said = val.said = said
    quiet(max_epochs=3, num_sanity_val_steps=0).fit(Net(), train, val)
    texts = [r.getMessage() for r in caplog.records if "its len() says" in r.getMessage()]
    assert len(texts) == 2
    assert f"The training loader gave 5 batches although its len() says {said}" in texts[0]
    assert f"The validation loader gave 4 batches although its len() says {said}" in texts[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val=nan: allowed is a number above 0"),
        ({"overfit_batches": float("nan")}, "overfit_batches=nan: allowed are a number of batches"),
        ({"max_time": {"hour": 2}}, r"max_time=.*'hour': 2.*days, hours, minutes.*'hours': 2"),
    ],
)
def test_values_that_only_look_right(given, words):
    with pytest.raises(ConfigError, match=words):
        lk.Trainer(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"monitor": 5}, r"monitor=5\): it is the name of a metric, such as 'val_loss'"),
        ({"monitor": None}, r"monitor=None\): it is the name"),
        ({"monitor": ""}, r"monitor=''\): it is the name"),
        ({"monitor": "a", "min_delta": "x"}, r"min_delta='x'\): it is 0 or more"),
        ({"monitor": "a", "min_delta": float("nan")}, r"min_delta=nan\): it is 0 or more"),
    ],
)
def test_what_early_stopping_cannot_use(given, words):
    with pytest.raises(ConfigError, match=words):
        EarlyStopping(**given)


def test_two_that_differ_only_in_what_their_key_does_not_name():
    two = [EarlyStopping("val_loss"), EarlyStopping("val_loss", patience=9)]
    for callbacks in (two, [Timer("1 min"), Timer("2 min")]):
        with pytest.raises(ConfigError, match="different arguments of those it names"):
            lk.Trainer(callbacks=callbacks)


class Scheduled(Net):
    def __init__(self, plans):
        super().__init__()
        self.plans = plans

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], self.plans(optimizer)


def test_a_scheduler_twice(quiet):
    with pytest.raises(OptimizerError, match="returned the same scheduler twice"):
        quiet().fit(Scheduled(lambda optimizer: [StepLR(optimizer, 1)] * 2), loader())


def test_a_monitor_that_is_no_name(quiet):
    def plans(optimizer):
        return [{"scheduler": ReduceLROnPlateau(optimizer), "monitor": 5}]

    with pytest.raises(OptimizerError, match="ReduceLROnPlateau: monitor=5 is no name of a metric"):
        quiet().fit(Scheduled(plans), loader())
