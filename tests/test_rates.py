"""Schedules as long as the fit, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

import lightkit as lk
from lightkit.errors import OptimizerError
from lightkit.testing import assert_resumes_exactly
from tests import small


class Rates(lk.Callback):
    def __init__(self):
        self.rows = []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.rows.append([(g["lr"], g.get("momentum")) for g in optimizer.param_groups])


class Net(small.Net):
    """Two groups; the schedule is made by a function of optimizer and trainer."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def optimizer(self):
        groups = [{"params": [self.net.weight], "lr": 0.02}, {"params": [self.net.bias]}]
        return SGD(groups, lr=0.05, momentum=0.9)

    def configure_optimizers(self):
        optimizer = self.optimizer()
        return [optimizer], [self.schedule(optimizer, self.trainer)]


def cosine(optimizer, warmup: int, total: int) -> SequentialLR:
    """The same by torch's parts, for a group that ends at a tenth of its rate."""
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    low = optimizer.param_groups[0]["initial_lr"] / 10
    fall = CosineAnnealingLR(optimizer, total - warmup, eta_min=low)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def seen(quiet, schedule, **options):
    rates = Rates()
    quiet(callbacks=[rates], **{"max_epochs": 3} | options).fit(Net(schedule), small.loader(20))
    return rates.rows


def by_torch(make, steps: int, group: int = 0):
    """The rates of one group alone under a schedule of torch."""
    given = Net(None).optimizer().param_groups[group]
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=given["lr"], momentum=0.9)
    scheduler, rows = make(optimizer), []
    for _ in range(steps):
        rows.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    return rows


@pytest.mark.parametrize(("options", "steps"), [({}, 15), ({"accumulate_grad_batches": 2}, 9)])
def test_S4_07_one_cycle_is_torch_s_over_the_whole_fit(quiet, options, steps):
    rows = seen(quiet, lambda o, trainer: lk.one_cycle(o, trainer, pct_start=0.4), **options)
    assert len(rows) == steps
    for group, highest in ((0, 0.02), (1, 0.05)):
        wanted = by_torch(
            lambda o, top=highest: OneCycleLR(o, top, total_steps=steps, pct_start=0.4),
            steps,
            group,
        )
        assert [row[group] for row in rows] == wanted


@pytest.mark.parametrize(("warmup", "rise"), [(4, 4), (0.2, 3), (0, 0)])
def test_S4_07_warmup_cosine_is_torch_s_parts(quiet, warmup, rise):
    rows = seen(quiet, lambda o, t: lk.warmup_cosine(o, t, warmup=warmup, final=0.1))
    assert len(rows) == 15
    for group in (0, 1):
        make = (
            cosine
            if rise
            else lambda o, _, total: CosineAnnealingLR(o, total, o.param_groups[0]["lr"] / 10)
        )
        wanted = by_torch(lambda o, make=make: make(o, rise, 15), 15, group)
        for (rate, _), (other, _) in zip([row[group] for row in rows], wanted, strict=True):
            assert rate == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(("given", "options"), [(3, {"max_epochs": -1, "max_steps": 9}), (0.2, {})])
def test_warmup_rises_and_stays(quiet, given, options):
    rows = seen(quiet, lambda o, t: lk.warmup(o, t, warmup=given), **options)
    wanted = [0.25, 0.5, 0.75, *[1.0] * (len(rows) - 3)]
    assert [row[1][0] / 0.05 for row in rows] == pytest.approx(wanted)


def test_the_horizon_is_the_trainer_s_also_with_max_steps(quiet):
    rows = seen(quiet, lambda o, t: lk.warmup_cosine(o, t, warmup=0), max_epochs=-1, max_steps=8)
    assert len(rows) == 8
    assert rows[-1][0][0] == pytest.approx(0.02 * 0.5 * (1 + torch.tensor(7 / 8 * torch.pi).cos()))


@pytest.mark.parametrize("schedule", [lk.one_cycle, lk.warmup_cosine])
def test_it_resumes_exactly(schedule):
    assert_resumes_exactly(Net(schedule), small.loader(20), max_epochs=2, at=[3, 7])


@pytest.mark.parametrize("decay", [1.0, 2.6])
def test_groups_keep_their_proportions(quiet, decay):
    class Layers(Net):
        def optimizer(self):
            return AdamW(lk.param_groups(list(self.children()), 0.01, decay=decay))

    quiet().fit(Layers(lk.one_cycle), small.loader())


def test_what_cannot_be_is_refused(quiet):
    cases = [
        (lk.one_cycle, {"max_epochs": -1, "max_steps": -1, "max_time": "1 min"}, "has no end"),
        (lambda o, t: lk.warmup_cosine(o, t, warmup=15), {}, "warmup=15 is not possible in 15"),
        (lambda o, t: lk.warmup_cosine(o, t, warmup=1.5), {}, "warmup=1.5"),
        (lambda o, t: lk.one_cycle(o, t, steps=0), {}, "steps=0"),
        (lambda o, t: lk.warmup(o, t, warmup=-1), {}, "warmup=-1"),
        (lambda o, t: lk.warmup(o, t, warmup=float("nan")), {}, "warmup=nan"),
        (lambda o, t: lk.warmup_cosine(o, t, final=-1), {}, "final=-1"),
        (
            lambda o, t: lk.one_cycle(o, None),
            {},
            "self.trainer is needed, not an object of NoneType",
        ),
    ]
    for schedule, options, text in cases:
        with pytest.raises(OptimizerError, match=text):
            seen(quiet, schedule, **options)
    task = Net(lk.warmup_cosine)
    with pytest.raises(OptimizerError, match="has no length"):
        quiet().fit(task, (batch for batch in list(small.loader())))
