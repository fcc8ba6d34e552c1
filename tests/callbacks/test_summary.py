from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from torch import nn

import lightkit as lk
from lightkit import callbacks
from lightkit.callbacks.summary import ModelSummary, summarize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.body = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20))
        self.head = nn.Linear(20, 3)
        self.loss = nn.CrossEntropyLoss()
        self.body[0].requires_grad_(False)


def test_children_and_totals():
    assert summarize(Net()).splitlines() == [
        "name   type              params  trainable",
        "------------------------------------------",
        "body   Sequential           640  part",
        "head   Linear                63  yes",
        "loss   CrossEntropyLoss       0  -",
        "(own)  Parameter              5  yes",
        "------------------------------------------",
        "708 parameters: 488 trainable, 220 not; 2.8 kB",
    ]


def test_depth():
    def names(depth):
        return [line.split()[0] for line in summarize(Net(), depth).splitlines()[2:-2]]

    assert names(2) == ["body", "body.0", "body.1", "body.2", "head", "loss", "(own)"]
    assert names(-1) == names(2)
    assert summarize(Net(), 0) == "708 parameters: 488 trainable, 220 not; 2.8 kB"


def test_a_narrow_screen_has_fewer_columns():
    lines = summarize(Net(), width=32).splitlines()
    assert lines[:3] == [
        "name   type              params",
        "-------------------------------",
        "body   Sequential           640",
    ]
    assert summarize(Net(), width=30).splitlines()[0] == "name   type"
    assert summarize(Net(), width=42) == summarize(Net())


def test_shared_parameters_count_once():
    net = nn.Module()
    net.a = nn.Linear(4, 4)
    net.b = net.a
    net.c = nn.Linear(4, 4)
    net.c.weight = net.a.weight
    assert summarize(net, 0).startswith("24 parameters, all trainable;")


def test_parameters_whose_shape_is_not_known_yet():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    lines = summarize(net).splitlines()
    assert lines[2].split() == ["0", "LazyLinear", "?", "lazy"]
    assert lines[-1].startswith("10 parameters")


def test_a_module_without_parts():
    assert summarize(nn.ReLU()) == "0 parameters, all trainable; 0.0 kB"


def test_the_size_follows_the_type():
    assert summarize(nn.Linear(1000, 1000, bias=False).half(), 0).endswith("; 2.0 MB")


def test_the_callback_logs_it_once_on_rank_zero(caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    ModelSummary().on_fit_start(SimpleNamespace(is_global_zero=False), Net())
    assert not caplog.records
    ModelSummary(max_depth=0).on_fit_start(SimpleNamespace(is_global_zero=True), Net())
    (record,) = caplog.records
    assert record.message == f"\n{summarize(Net(), 0)}\n"  # apart from the lines around it


def test_the_name_of_ported_code():
    assert callbacks.RichModelSummary is ModelSummary


class Shaped(lk.TaskModule):
    """Everything that a pass could leave a trace in; S4-02."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(8, 10)
        self.net = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.rnn = nn.LSTM(6, 4, batch_first=True)
        self.unused = nn.Linear(2, 2)
        self.score = torchmetrics.MeanMetric()
        self.register_buffer("calls", torch.zeros(()))
        self.net[2].eval()

    def forward(self, x):
        self.calls += 1
        y = self.net(x) + torch.rand(8, 6)
        self.log("made", y.mean())
        self.score(y)
        return self.rnn(y.unsqueeze(1))[0]

    def training_step(self, batch, batch_idx):
        return self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_S4_02_shapes_of_one_pass_with_the_example(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    data = [(torch.randn(8, 10),)] * 2

    def fitted(example, **options):
        torch.manual_seed(5)
        task = Shaped()
        task.example_input_array = example
        task.score.update(3.0)
        quiet(enable_model_summary=True, hints=False, **options).fit(task, data)
        return task

    task = fitted(torch.zeros(8, 10))
    (table,) = [m.strip() for m in caplog.messages if m.startswith("\nname ")]
    assert [re.split("  +", line) for line in table.splitlines()[:6]] == [
        ["name", "type", "params", "trainable", "in", "out"],
        [table.splitlines()[1]],
        ["net", "Sequential", "78", "yes", "[8, 10]", "[8, 6]"],
        ["rnn", "LSTM", "192", "yes", "[8, 1, 6]", "[8, 1, 4], [1, 8, 4], [1, 8, 4]"],
        ["unused", "Linear", "6", "yes", "-", "-"],
        ["score", "MeanMetric", "0", "-", "[8, 6]", "[]"],
    ]
    plain = fitted(None)  # the same fit without the pass
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in task.state_dict().items())
    assert task.calls == 2
    assert task.score.compute() == plain.score.compute()
    assert not any(module._forward_hooks for module in task.modules())
    caplog.clear()
    fitted(torch.zeros(8, 10), precision="bf16-true")
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "[8, 10]" in caplog.text


def test_S4_02_a_failing_pass_is_one_line_and_the_table_goes_without(quiet, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    task = Shaped()
    task.example_input_array = torch.zeros(8, 3)
    trainer = quiet(enable_model_summary=True, hints=False)
    trainer.fit(task, [(torch.randn(8, 10),)])
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("no shapes in the summary: forward(example_input_array) failed: mat1")
    assert f"\n{summarize(task)}\n" in caplog.messages
    assert not any(module._forward_hooks for module in task.modules())


@pytest.mark.parametrize("why", ["lazy", "compiled", "several processes", "sharded"])
def test_no_pass_where_it_would_not_be_free(caplog, why):
    caplog.set_level(logging.INFO, logger="lightkit")
    task = Shaped()
    if why == "lazy":
        task.net = nn.Sequential(nn.LazyLinear(6))
    if why == "compiled":
        task.net._compiled_call_impl = task.net.forward  # as Module.compile leaves it
    trainer = SimpleNamespace(
        is_global_zero=True,
        world_size=2 if why == "several processes" else 1,
        strategy=SimpleNamespace(sharded=why == "sharded"),
    )
    ModelSummary().on_fit_start(trainer, task)
    assert caplog.messages == [f"\n{summarize(task)}\n"]
    assert task.calls == 0
