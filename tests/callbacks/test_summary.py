from __future__ import annotations

import logging
from types import SimpleNamespace

import torch
from torch import nn

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
        "708 parameters: 488 trainable, 220 not; 2.83 kB",
    ]


def test_depth():
    def names(depth):
        return [line.split()[0] for line in summarize(Net(), depth).splitlines()[2:-2]]

    assert names(2) == ["body", "body.0", "body.1", "body.2", "head", "loss", "(own)"]
    assert names(-1) == names(2)
    assert summarize(Net(), 0) == "708 parameters: 488 trainable, 220 not; 2.83 kB"


def test_shared_parameters_count_once():
    net = nn.Module()
    net.a = nn.Linear(4, 4)
    net.b = net.a
    net.c = nn.Linear(4, 4)
    net.c.weight = net.a.weight
    assert summarize(net, 0).startswith("24 parameters: 24 trainable, 0 not")


def test_parameters_whose_shape_is_not_known_yet():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    lines = summarize(net).splitlines()
    assert lines[2].split() == ["0", "LazyLinear", "?", "lazy"]
    assert lines[-1].startswith("10 parameters")


def test_a_module_without_parts():
    assert summarize(nn.ReLU()) == "0 parameters: 0 trainable, 0 not; 0 kB"


def test_the_size_follows_the_type():
    assert summarize(nn.Linear(1000, 1000, bias=False).half(), 0).endswith("; 2.0 MB")


def test_the_callback_logs_it_once_on_rank_zero(caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    ModelSummary().on_fit_start(SimpleNamespace(is_global_zero=False), Net())
    assert not caplog.records
    ModelSummary(max_depth=0).on_fit_start(SimpleNamespace(is_global_zero=True), Net())
    (record,) = caplog.records
    assert record.message == summarize(Net(), 0)
