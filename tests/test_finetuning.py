"""Rates that differ over layers, and groups that join an optimizer under its schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedules

import lightkit as lk
from lightkit.errors import ConfigError
from lightkit.finetuning import add_group, follow, rates


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))


def test_S0_09_rates_fall_towards_the_input():
    net = layers()
    groups = lk.param_groups(net, 1.0, decay=2.0)
    assert [(g["name"], g["lr"]) for g in groups] == [("0", 0.25), ("2", 0.5), ("3", 1.0)]
    assert [p for g in groups for p in g["params"]] == list(net.parameters())
    lk.freeze(net[2])
    assert [g["lr"] for g in lk.param_groups(net, 1.0, decay=2.0)] == [0.25, 1.0]
    assert lk.param_groups(list(net), 1.0)[0]["lr"] == pytest.approx(1 / 2.6**2)
    AdamW(lk.param_groups(net, 1.0))


def test_the_layers_of_an_only_child_are_those_of_the_module():
    task = lk.SupervisedTask(layers(), loss="mse", metrics=["mae"])
    groups = lk.param_groups(task, 1.0, decay=2.0)
    assert [(g["name"], g["lr"]) for g in groups] == [("0", 0.25), ("2", 0.5), ("3", 1.0)]
    assert [g["name"] for g in lk.param_groups([layers()], 1.0)] == ["0"]  # layers as given
    assert [g["name"] for g in lk.param_groups(nn.Sequential(nn.Linear(2, 2)), 1.0)] == ["0"]


@pytest.mark.parametrize("wrong", [{"lr": "1"}, {"lr": -1.0}, {"lr": 1.0, "decay": "2"}])
def test_rates_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="is not possible"):
        lk.param_groups(layers(), **wrong)
    with pytest.raises(ConfigError, match="list of modules; got {'Parameter'}"):
        lk.param_groups(layers().parameters(), 1.0)


def test_no_decay_parts_biases_and_norms():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    groups = lk.param_groups(net, 0.1, decay=1.0, no_decay=True)
    optimizer = AdamW(groups, weight_decay=0.3)
    decays = {g["name"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {"0": 0.3, "0_no_decay": 0.0, "1_no_decay": 0.0, "2": 0.3, "2_no_decay": 0.0}
    assert {g["lr"] for g in groups} == {0.1}


def test_parameters_of_the_module_itself_and_shared_ones_come_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.last.weight = self.first.weight

    net = Tied()
    first, last = lk.param_groups(net, 1.0)
    assert [id(p) for p in first["params"]] == [
        *map(id, (net.token, net.first.weight, net.first.bias))
    ]
    assert last["params"] == [net.last.bias]
    alone = nn.Linear(2, 1)
    (only,) = lk.param_groups(alone, 0.5)
    assert only == {"params": [*alone.parameters()], "lr": 0.5, "name": "Linear"}
    with pytest.raises(ConfigError, match="more than 0"):
        lk.param_groups(alone, 0.5, decay=0)


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (step + 1)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedules.StepLR(o, 3),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 12),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "one cycle": lambda o: schedules.OneCycleLR(
        o, [g["lr"] for g in o.param_groups], total_steps=12
    ),
    "cyclic": lambda o: schedules.CyclicLR(
        o, [g["lr"] / 10 for g in o.param_groups], [g["lr"] for g in o.param_groups], 3
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: schedules.SequentialLR(
        o,
        [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, total_iters=4), schedules.ExponentialLR(o, 0.9)]
    ),
}


def move(scheduler, optimizer):
    optimizer.step()
    plateau = isinstance(scheduler, schedules.ReduceLROnPlateau)
    scheduler.step(*[1.0][:plateau])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_group_that_joins_goes_on_as_if_it_had_always_been_there(kind):
    head, backbone = nn.Linear(1, 1), nn.Linear(1, 1)
    groups = [{"params": [*head.parameters()], "lr": 0.4}]
    late = SGD(groups, momentum=0.9)
    always = SGD(
        [*map(dict, groups), {"params": [*backbone.parameters()], "lr": 0.1}], momentum=0.9
    )
    pair = [(late, SCHEDULES[kind](late)), (always, SCHEDULES[kind](always))]
    for step in range(11):
        if step == 5:
            before = rates(late)
            add_group(late, [*backbone.parameters()], times=0.25)
            follow(late, before, [pair[0][1]])
        if step >= 5:
            for one, other in zip(late.param_groups, always.param_groups, strict=True):
                assert one["lr"] == pytest.approx(other["lr"], rel=1e-12)
                assert one["momentum"] == other["momentum"]
        for optimizer, scheduler in pair:
            move(scheduler, optimizer)
    state = pair[0][1].state_dict()
    pair[1][1].load_state_dict(state)


@pytest.mark.parametrize("kind", ["lambda", "step", "one cycle", "sequential"])
def test_a_rate_that_is_set_is_where_the_schedule_goes_on_from(kind):
    optimizer = SGD([{"params": [p], "lr": 0.4} for p in nn.Linear(1, 1).parameters()])
    options = [{"cycle_momentum": False}] if kind == "one cycle" else []
    scheduler = (
        schedules.OneCycleLR(optimizer, 0.4, total_steps=12, **options[0])
        if options
        else SCHEDULES[kind](optimizer)
    )
    for step in range(9):
        if step == 3:
            before = rates(optimizer)
            optimizer.param_groups[1]["lr"] *= 0.5
            follow(optimizer, before, [scheduler])
        first, second = rates(optimizer)
        assert second == pytest.approx(first * (0.5 if step >= 3 else 1), rel=1e-12)
        move(scheduler, optimizer)


def test_a_rate_given_while_the_schedule_stands_at_zero_is_the_one_it_begins_with():
    head, late = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = SGD(head.parameters(), lr=0.4)
    scheduler = schedules.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    before = rates(optimizer)
    add_group(optimizer, [*late.parameters()], times=1.0, lr=0.2)
    follow(optimizer, before, [scheduler])
    for _ in range(4):
        move(scheduler, optimizer)
    assert rates(optimizer) == [0.4, 0.2]


def test_an_optimizer_with_named_parameters_takes_a_group_too():
    optimizer = SGD(nn.Linear(1, 1).named_parameters(), lr=0.4)
    add_group(optimizer, [*nn.Linear(1, 1).parameters()], times=0.5, name="late")
    assert optimizer.param_groups[1]["param_names"] == ["group1.0", "group1.1"]
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["name"]) == (0.2, "late")
