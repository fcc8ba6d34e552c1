"""The scaler of 16-mixed by itself: what a skipped step leaves alone. Fits: test_scaler_in_fits.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightkit.errors import NonFiniteError, OptimizerError
from lightkit.fused import FusedChoice
from lightkit.optim import ManualOptimizer
from lightkit.precision import resolve_precision

CPU = torch.device("cpu")
INF, NAN = float("inf"), float("nan")
EVERYWHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def scaled(device="cpu", *, late=None):
    precision = resolve_precision("16-mixed", device)
    if late is not None:
        precision._reads_late = late
    return precision


def optimizers(p):
    """The same optimizer plain, fused by the user, and fused by lightkit."""
    chosen = Adam([p], lr=0.1)
    task = nn.Module()
    task.p = p
    assert FusedChoice([chosen], task, p.device, strict=True).chosen == [chosen]
    return [Adam([p], lr=0.1), Adam([p], lr=0.1, fused=True), chosen]


@EVERYWHERE
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_step_is_made_with_true_gradients(which, device):
    p, q = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    precision, optimizer = scaled(device), optimizers(p)[which]
    plain = Adam([q], lr=0.1)
    for factor in (1.0, -3.0, 0.5):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        assert p.grad[0] == factor * 2.0**16
        precision.unscale(optimizer)
        precision.unscale(optimizer)
        assert p.grad[0] == factor
        precision.step(optimizer)
        precision.end_step()
        plain.zero_grad()
        (q * factor).sum().backward()
        plain.step()
    torch.testing.assert_close(p, q)


@EVERYWHERE
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_overflow_skips_step_and_schedule_and_lowers_the_scale(which, device):
    p = nn.Parameter(torch.ones(3, device=device))
    precision, optimizer = scaled(device), optimizers(p)[which]
    schedule = StepLR(optimizer, 1)
    changed = []
    for factor in (INF, 1.0, NAN, 1.0):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        before = p.detach().clone()
        precision.step(optimizer)
        precision.end_step(schedule.step)  # torch warns, and so fails here, if nothing had stepped
        changed.append(not torch.equal(before, p))
    precision.settle()
    assert changed == [False, True, False, True]
    assert schedule.last_epoch == 2
    assert precision.last_scale == 2.0**14
    assert precision.state_dict()["scaler"]["scale"] == 2.0**14


@pytest.mark.parametrize("late", [False, True])
def test_what_follows_a_step_comes_before_the_next_one(late):
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(late=late), SGD([p], lr=0.1)
    moves = []
    for step, factor in enumerate((1.0, INF, 1.0, INF, NAN, 1.0)):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        precision.unscale(optimizer)
        moves.append(f"step {step}")
        precision.step(optimizer)
        precision.end_step(lambda step=step: moves.append(f"after {step}"))
    if late:
        assert moves[-1] == "step 5"
    precision.settle()
    precision.settle()
    taken = ["step 0", "after 0", "step 1", "step 2", "after 2", "step 3", "step 4", "step 5"]
    assert moves == [*taken, "after 5"]


def test_growth_of_the_scale_is_no_skipped_step():
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=0.1)
    precision.scaler.set_growth_interval(2)
    moves = []
    for _ in range(4):
        optimizer.zero_grad()
        precision.backward(p.sum())
        precision.step(optimizer)
        precision.end_step(lambda: moves.append(1))
    assert (len(moves), precision.last_scale) == (4, 2.0**18)


def test_a_step_that_the_user_leaves_out_moves_the_schedules_as_without_a_scaler():
    precision, moves = scaled(), []
    precision.end_step(lambda: moves.append(1))
    precision.end_step()
    assert moves == [1]


def test_momentum_survives_a_skipped_first_step():
    p, q = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    task = nn.Module()
    task.p = p
    optimizer, plain = (SGD([x], lr=0.1, momentum=0.9) for x in (p, q))
    assert FusedChoice([optimizer], task, CPU, strict=False).chosen == [optimizer]
    precision = scaled()
    for factor in (INF, 1.0, 1.0):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        precision.step(optimizer)
        precision.end_step()
    for _ in range(2):
        plain.zero_grad()
        q.sum().backward()
        plain.step()
    torch.testing.assert_close(p, q)


def test_a_closure_runs_before_the_step():
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=1.0)
    precision.step(optimizer, lambda: precision.backward(p.sum()))
    assert p.item() == 0.0
    with pytest.raises(OptimizerError, match="bf16-mixed"):
        precision.step(torch.optim.LBFGS([p]), lambda: None)


def test_the_state_goes_on_where_it_was():
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=1.0)
    precision.backward((p * INF).sum())
    precision.step(optimizer)
    precision.end_step()
    state = copy.deepcopy(precision.state_dict())
    resumed, moves = scaled(), []
    resumed.load_state_dict({})
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert state["scaler"]["scale"] == resumed.last_scale == 2.0**15
    optimizer.zero_grad()
    resumed.backward(p.sum())
    resumed.step(optimizer)
    resumed.end_step(lambda: moves.append(1))
    assert moves == [1]  # 2**15 is no lower than it was at the checkpoint
    resolve_precision(32, CPU).load_state_dict(state)


def test_a_scale_that_falls_and_falls_is_told_and_ends_the_run(caplog):
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=1.0)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            precision.backward((p * INF).sum())
            precision.step(optimizer)
            precision.end_step()

    steps(16)
    assert (precision.last_scale, caplog.records) == (1.0, [])
    steps(20)
    (record,) = caplog.records
    assert "has fallen to 0.5." in record.getMessage()
    with pytest.raises(NonFiniteError, match=r"fallen to 4\.77e-07.*'bf16-mixed'"):
        steps(1)
    precision.stop_on_nan = False
    steps(3)
    assert len(caplog.records) == 1


# --- manual optimization ---------------------------------------------------------------------------


def test_a_manual_step_unscales_before_hooks_and_clipping():
    p = nn.Parameter(torch.ones(2))
    precision, seen = scaled(), []
    manual = ManualOptimizer(SGD([p], lr=1.0), precision, lambda _: seen.append(p.grad[0].item()))
    precision.backward((p * 2).sum())
    precision.unscale(manual)  # a task that clips by itself
    assert p.grad.tolist() == [2.0, 2.0]
    manual.step()
    precision.end_step()

    def closure():
        manual.zero_grad()
        loss = (p * 3).sum()
        precision.backward(loss)
        return loss

    loss = manual.step(closure)
    assert seen == [2.0, 3.0]
    assert loss.item() == -6.0
    assert p.tolist() == [-4.0, -4.0]


def test_the_scale_moves_once_for_all_optimizers_of_a_step():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    precision = scaled()
    one, two = precision.optimizers = [SGD([p], lr=1.0), SGD([q], lr=1.0)]
    precision.backward((p * INF).sum())
    precision.step(one)
    precision.backward(q.sum())
    precision.step(two)
    assert (p.item(), q.item()) == (1.0, 0.0)
    assert precision.scaler.get_scale() == 2.0**16
    precision.end_step()
    assert precision.scaler.get_scale() == 2.0**15
    precision.scaler.set_growth_interval(2)
    for _ in range(2):
        for optimizer in (one, two):
            optimizer.zero_grad()
            precision.backward(p.sum() + q.sum())
            precision.step(optimizer)
        precision.end_step()
    assert precision.scaler.get_scale() == 2.0**16


@EVERYWHERE
@pytest.mark.parametrize("change", ["growth", "overflow"])
def test_gradients_that_wait_for_their_step_follow_the_scale(change, device):
    p, q = (nn.Parameter(torch.ones(1, device=device)) for _ in range(2))
    precision = scaled(device)
    often, seldom = precision.optimizers = [SGD([p], lr=1.0), SGD([q], lr=1.0)]
    precision.scaler.set_growth_interval(1 if change == "growth" else 100)
    for batch in range(4):
        often.zero_grad()
        precision.backward((p * (INF if change == "overflow" and batch == 1 else 1.0)).sum())
        precision.step(often)
        precision.backward((q * 0.25).sum())  # gathered over four batches
        if batch == 3:
            precision.step(seldom)
        precision.end_step()
    precision.settle()
    assert precision.last_scale == (2.0**20 if change == "growth" else 2.0**15)
    assert p.item() == (-3.0 if change == "growth" else -2.0)
    assert q.item() == 0.0


def test_an_optimizer_may_step_several_times_within_a_step():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    precision = scaled()
    critic, other = precision.optimizers = [SGD([p], lr=1.0), SGD([q], lr=1.0)]
    precision.scaler.set_growth_interval(1)  # every one of them moves the scale
    precision.backward(q.sum())  # waits while the critic steps
    for _ in range(3):
        critic.zero_grad()
        precision.backward(p.sum())
        precision.step(critic)
    precision.step(other)
    precision.end_step()
    assert (p.item(), q.item()) == (-2.0, 0.0)
    assert precision.last_scale == 2.0**19
