from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.callbacks import Statistics
from lightkit.errors import ConfigError
from lightkit.loggers.base import Logger
from lightkit.testing import assert_resumes_exactly
from tests.small import Net, loader


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # run folders go there


class Lines(Logger):
    def __init__(self):
        super().__init__()
        self.rows, self.histograms = [], []

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def log_histogram(self, name, values, step):
        self.histograms.append((step, name, values))


class Two(Net):
    """Two modules and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.net(x) * self.scale


def fit(task, *callbacks, **options):
    lines = Lines()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "max_epochs": 1, "log_every_n_steps": 1}
    lk.Trainer(callbacks=[*callbacks], logger=lines, **quiet | options).fit(task, loader())
    return lines


def test_norms_are_those_of_a_loop_by_hand():
    """S1-14: what a user would compute in the loop, before clipping."""
    task = Two()
    net = copy.deepcopy(task)
    lines = fit(task, Statistics(), gradient_clip_val=0.01)
    found = [row for _, row in lines.rows if "grad_norm/all" in row]
    optimizer = net.configure_optimizers()
    for row, (x, y) in zip(found, loader(), strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        for name, parameters in (
            ("net", list(net.net.parameters())),
            ("(own)", [net.scale]),
            ("all", list(net.parameters())),
        ):
            grad = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
            weight = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))
            assert row[f"grad_norm/{name}"] == pytest.approx(grad, rel=1e-5)
            assert row[f"weight_norm/{name}"] == pytest.approx(weight, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(row["grad_norm/all"])
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()


@pytest.mark.parametrize(
    ("depth", "names"),
    [(0, {"all"}), (1, {"all", "net", "(own)"}), (-1, {"all", "net.0", "net.1", "(own)"})],
)
def test_depth_chooses_the_modules(depth, names):
    lines = fit(Two(), Statistics(depth=depth, weights=False))
    assert {n.partition("/")[2] for n in lines.rows[0][1] if "/" in n} == names
    assert not any("weight_norm" in name for _, row in lines.rows for name in row)


def test_only_every_so_many_steps_and_the_training_is_the_same():
    task = Two()
    plain = copy.deepcopy(task)
    lines = fit(task, Statistics(2))
    fit(plain)
    assert [step for step, row in lines.rows if "grad_norm/all" in row] == [2, 4]
    for one, two in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def test_nothing_is_read_between_two_rows(monkeypatch):
    """No host sync: what is logged is a tensor until the flush."""
    seen = []

    class Watch(Two):
        def log(self, name, value, **options):
            seen.append(type(value))
            super().log(name, value, **options)

    def refuse(*_):
        raise AssertionError("a value was read")

    class Strict(lk.Callback):
        def on_before_optimizer_step(self, trainer, task, optimizer):
            for name in ("item", "tolist", "__float__", "__bool__"):
                monkeypatch.setattr(torch.Tensor, name, refuse)

    class Loose(lk.Callback):
        def on_before_optimizer_step(self, trainer, task, optimizer):
            monkeypatch.undo()

    fit(Watch(), Strict(), Statistics(1), Loose())
    assert set(seen) == {torch.Tensor}


def test_histograms_come_with_rows(tmp_path):
    """S1-14: to the loggers that know them; TensorBoard does."""
    task = Two()
    lines = fit(task, Statistics(histograms=True), log_every_n_steps=2)
    assert {step for step, _, _ in lines.histograms} == {2, 4}
    names = {name for _, name, _ in lines.histograms}
    assert {"weights/net.0.weight", "gradients/net.1.bias", "weights/scale"} <= names
    board = lk.loggers.TensorBoardLogger()
    fitted = lk.Trainer(
        max_steps=2, log_every_n_steps=1, logger=board, callbacks=[Statistics(histograms=True)],
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    fitted.fit(Two(), loader())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fitted.run_dir), {"histograms": 0}).Reload()
    assert "gradients/net.0.weight" in events.Tags()["histograms"]
    assert [event.step for event in events.Histograms("weights/scale")] == [1, 2]


def test_manual_optimization_with_two_optimizers():
    class Manual(Two):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.norms = []

        def configure_optimizers(self):
            return [torch.optim.SGD([layer.weight], 0.1) for layer in self.net]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            self.norms.append([float(layer.weight.grad.norm()) for layer in self.net])
            for optimizer in self.optimizers():
                optimizer.step()

    task = Manual()
    row = fit(task, Statistics(depth=-1)).rows[0][1]
    for number, norm in enumerate(task.norms[0]):
        assert row[f"grad_norm/net.{number}"] == pytest.approx(norm)
        assert row[f"grad_norm/all-{number}"] == pytest.approx(norm)
    assert "grad_norm/all" not in row
    assert "grad_norm/(own)" not in row


def test_sparse_gradients():
    class Words(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.words(torch.tensor([1, 1, 2])).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    lines = fit(Words(), Statistics(histograms=True))
    assert lines.rows[0][1]["grad_norm/words"] > 0


def test_a_run_goes_on_exactly():
    assert_resumes_exactly(Two, loader(), callbacks=[Statistics(3)], log_every_n_steps=2)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="from 1"):
        Statistics(0)
    with pytest.raises(ConfigError, match="from -1"):
        Statistics(depth=-2)


def test_the_rows_are_in_the_file_of_a_default_run(tmp_path):
    run = lk.Trainer(
        max_steps=2, log_every_n_steps=2, callbacks=[Statistics()], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(Two(), loader())
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["grad_norm/net"] > 0
