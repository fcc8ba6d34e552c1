"""The five classic mistakes of a hand-written loop are impossible, or are said loudly."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.modes = []

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.modes.append(("train", self.training, self.net[2].training))
        return functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.modes.append(("val", self.training, self.net[2].training))
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def dataset(count=22):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        folder = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
        return lk.Trainer(**{"max_epochs": 2, **quiet, **folder, **options})

    return make


def test_forgotten_eval(trainer):
    """S0-01: dropout and batch norm are in eval mode in validation, in train mode after it."""
    task = Net()
    stats = []

    class Watch(lk.Callback):
        def on_validation_start(self, trainer, task):
            stats.append(task.net[1].running_mean.clone())

        def on_validation_end(self, trainer, task):
            assert torch.equal(task.net[1].running_mean, stats[-1])

    loader, val = DataLoader(dataset(), batch_size=4), DataLoader(dataset(), batch_size=4)
    trainer(callbacks=Watch()).fit(task, loader, val)
    assert set(task.modes) == {("train", True, True), ("val", False, False)}
    once = trainer().validate(task, val)
    assert trainer().validate(task, val) == once  # no dropout


def test_forgotten_zero_grad(trainer):
    """S0-02: each step sees its own gradient alone."""
    seen = []

    class Constant(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.weight * 1.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer):
            seen.append(self.weight.grad.item())

    trainer().fit(Constant(), [(torch.zeros(1),)] * 5)
    assert seen == [1.0] * 10


@pytest.mark.parametrize("how", ["loader", "dataset", "subsets"])
def test_training_data_in_validation(trainer, caplog, monkeypatch, how):
    """S0-03: the same loader, dataset or samples twice are warned about."""
    monkeypatch.setattr(logging.getLogger("lightkit"), "propagate", True)
    data = dataset()
    train = DataLoader(data, batch_size=4)
    val = {"loader": train, "dataset": DataLoader(data, batch_size=11)}.get(how)
    if how == "subsets":
        train = DataLoader(Subset(data, range(15)), batch_size=4)
        val = DataLoader(Subset(data, range(12, 22)), batch_size=4)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        trainer(max_epochs=1).fit(Net(), train, val)
    text = caplog.text
    assert "training loader" in text
    assert "random_split" in text
    if how == "subsets":
        assert "shares 3 of its 10 samples" in text


def test_data_that_is_kept_apart_is_not_warned_about(trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightkit"), "propagate", True)
    data = dataset()
    train = DataLoader(Subset(data, range(12)), batch_size=4)
    val = DataLoader(Subset(data, range(12, 22)), batch_size=4)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        trainer(max_epochs=1).fit(Net(), train, val)
    assert caplog.text == ""


def test_batch_on_the_wrong_device(trainer):
    """S0-04: nested batches arrive where, and as, the run computes."""
    seen = []

    class Nested(Net):
        def training_step(self, batch, batch_idx):
            seen.append((batch["in"][0].dtype, batch["in"][0].device, batch["target"].dtype))
            return functional.cross_entropy(self(batch["in"][0]), batch["target"])

    x, y = dataset().tensors
    batches = [{"in": (x[:8], "name"), "target": y[:8]}] * 2
    trainer(max_epochs=1, precision=64).fit(Nested(), batches)
    assert seen == [(torch.float64, torch.device("cpu"), torch.int64)] * 2


def test_metric_averaged_wrongly_over_a_short_last_batch(trainer):
    """S0-05: the mean counts samples, not batches."""

    class Means(Net):
        def validation_step(self, batch, batch_idx):
            x, _ = batch
            self.log("val_mean", x.mean())

    data = dataset(10)
    [row] = trainer().validate(Means(), DataLoader(data, batch_size=4))
    assert row["val_mean"] == pytest.approx(data.tensors[0].double().mean().item(), abs=1e-7)


def test_no_graph_in_validation(trainer):
    """S0-06: nothing in an evaluation records a graph."""

    class Looks(Net):
        def validation_step(self, batch, batch_idx):
            out = self(batch[0])
            assert not out.requires_grad
            return out.mean()

    trainer().validate(Looks(), DataLoader(dataset(), batch_size=4))
