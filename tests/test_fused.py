from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from lightkit.errors import OptimizerError
from lightkit.optim import OptimizerPlan

CPU = torch.device("cpu")


class Task(nn.Module):
    """Stands for a TaskModule: what a plan reads of one."""

    automatic_optimization = True

    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.returned = returned

    def configure_optimizers(self) -> Any:
        return self.returned(self)


def build(
    returned: Callable[[Task], Any], *, fused: bool | None, task: type[Task] = Task
) -> OptimizerPlan:
    return OptimizerPlan.build(task(returned), fused=fused, device=CPU)


def adam(task: Task, **kwargs: Any) -> Adam:
    return Adam(task.parameters(), lr=0.1, **kwargs)


def learn(plan: OptimizerPlan, seed: int = 0) -> None:
    """One step on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in plan.parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    plan.optimizers[0].step()


FUSED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.01}),
    "amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "maximize": (Adam, {"lr": 0.01, "maximize": True}),
    "adamw": (AdamW, {"lr": 0.01}),
    "sgd": (SGD, {"lr": 0.01}),
    "momentum": (SGD, {"lr": 0.01, "momentum": 0.9}),
    "nesterov": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_takes_effect_and_is_equal(case: str) -> None:
    kind, kwargs = FUSED[case]
    plain = build(lambda t: kind(t.parameters(), **kwargs), fused=False)
    fused = build(lambda t: kind(t.parameters(), **kwargs), fused=None)
    assert fused.fused == fused.optimizers
    assert plain.fused == []
    name = "_fused_sgd_" if kind is SGD else f"_fused_{kind.__name__.lower()}_"
    with torch.profiler.profile() as profile:
        learn(fused)
    assert f"aten::{name}" in {event.key for event in profile.key_averages()}
    learn(plain)
    for seed in range(1, 50):
        learn(plain, seed)
        learn(fused, seed)
    pairs = zip(plain.parameters, fused.parameters, strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"{case}: {difference:.1e}")
    assert difference <= 1e-6


class Sparse(Task):
    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__(returned)
        self.table = nn.Embedding(4, 2, sparse=True)


class Half(Task):
    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__(returned)
        self.bfloat16()


class SubAdam(Adam):
    pass


NOT_FUSED: dict[str, tuple[Callable[[Task], Any], type[Task]]] = {
    "another class": (lambda t: Adagrad(t.parameters()), Task),
    "a subclass": (lambda t: SubAdam(t.parameters()), Task),
    "foreach chosen": (lambda t: adam(t, foreach=True), Task),
    "unfused chosen": (lambda t: adam(t, fused=False), Task),
    "differentiable": (lambda t: adam(t, differentiable=True), Task),
    "a tensor as rate": (lambda t: Adam(t.parameters(), lr=torch.tensor(0.1)), Task),
    "sparse gradients": (lambda t: SGD(t.parameters(), lr=0.1), Sparse),
    "half types": (lambda t: SGD(t.parameters(), lr=0.1), Half),
    "dampening": (lambda t: SGD(t.parameters(), lr=0.1, momentum=0.9, dampening=0.1), Task),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_was_not_measured_is_left_alone(case: str) -> None:
    returned, task = NOT_FUSED[case]
    assert build(returned, fused=None, task=task).fused == []
    with pytest.raises(OptimizerError, match="fused=True is not possible for"):
        build(returned, fused=True, task=task)


def test_an_optimizer_with_a_history_is_left_alone() -> None:
    task = Task(lambda t: t.kept)
    task.kept = adam(task)
    learn(OptimizerPlan.build(task, fused=False, device=CPU))
    assert OptimizerPlan.build(task, fused=None, device=CPU).fused == []


def test_other_devices_are_left_alone() -> None:
    task = Task(adam).to("meta")
    assert OptimizerPlan.build(task, fused=None, device=torch.device("meta")).fused == []


def test_a_user_who_asked_for_fused_satisfies_fused_true() -> None:
    plan = build(lambda t: adam(t, fused=True), fused=True)
    assert plan.optimizers[0].param_groups[0]["fused"] is True


def test_loading_an_unfused_state_stays_fused_and_the_other_way_round() -> None:
    plain, fused = build(adam, fused=False), build(adam, fused=None)
    learn(plain)
    learn(fused)
    saved_plain, saved_fused = (copy.deepcopy(p.state_dict()) for p in (plain, fused))
    fused.load_state_dict(saved_plain)
    plain.load_state_dict(saved_fused)
    assert fused.optimizers[0].param_groups[0]["fused"] is True
    assert plain.optimizers[0].param_groups[0]["fused"] is None
    assert saved_plain["optimizers"][0]["param_groups"][0]["fused"] is None
    learn(fused, 1)
    learn(plain, 1)


def test_groups_added_later_run_fused_too() -> None:
    plan = build(adam, fused=None)
    plan.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    plan.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(2).half())]})
    plan.current_parameters()
    assert [g["fused"] for g in plan.optimizers[0].param_groups] == [True, True, None]
    # A scaler must not leave the flag of a skipped step to kernels that one group does not use.
    assert plan.optimizers[0]._step_supports_amp_scaling is False


def test_a_first_gradient_that_comes_late_works_with_momentum() -> None:
    def late(plan: OptimizerPlan) -> list[torch.Tensor]:
        for number, p in enumerate(plan.parameters):
            p.grad = None if number else torch.ones_like(p)
        plan.optimizers[0].step()
        learn(plan)
        learn(plan, 1)
        return [p.detach() for p in plan.parameters]

    returned = lambda t: SGD(t.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    expected, got = late(build(returned, fused=False)), late(build(returned, fused=None))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
