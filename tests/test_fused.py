from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

import lightkit as lk
from lightkit.errors import OptimizerError
from lightkit.fused import check_gradients
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
    """One step on random gradients, as autograd gives them: in the order of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in plan.parameters:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
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
    fused = build(lambda t: kind(t.parameters(), **kwargs), fused=True)
    assert fused.fused == fused.optimizers
    assert plain.fused == []
    name = "_fused_sgd_" if kind is SGD else f"_fused_{kind.__name__.lower()}_"
    with torch.profiler.profile() as profile:
        learn(fused)
    assert f"aten::{name}" in {event.key for event in profile.key_averages()}
    learn(plain)
    for seed in range(1, 100):
        learn(plain, seed)
        learn(fused, seed)
    pairs = zip(plain.parameters, fused.parameters, strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"{case}: {difference:.1e}")
    assert difference <= 1e-6


#: By threads, tensors and the numbers in each: which of plain SGD, SGD with momentum and AdamW run
#: fused where nothing was asked for. docs/performance.md has the measurements.
CHOSEN: dict[tuple[int, int, int], str] = {
    (1, 1, 8): "momentum adamw",
    (1, 5, 1000): "momentum adamw",
    (1, 6, 1000): "sgd momentum adamw",
    (1, 6, 100_000): "sgd momentum adamw",
    (1, 6, 100_001): "momentum adamw",
    (4, 6, 16): "momentum adamw",
    (4, 6, 17): "",
    (4, 6, 4 * 32768 - 1): "",
    (4, 6, 4 * 32768): "momentum adamw",
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CHOSEN)
def test_by_default_those_run_fused_that_are_never_slower(
    case: tuple[int, int, int], threads: Callable[[int], None]
) -> None:
    number, tensors, numbers = case
    threads(number)
    found = []
    for name in ("sgd", "momentum", "adamw"):
        kind, kwargs = FUSED[name]

        def returned(
            task: Task, kind: type[Optimizer] = kind, kwargs: dict[str, Any] = kwargs
        ) -> Optimizer:
            task.net = nn.ParameterList(torch.zeros(numbers) for _ in range(tensors))
            return kind(task.net.parameters(), **kwargs)

        assert build(returned, fused=True).fused  # who asks for it gets it
        if build(returned, fused=None).fused:
            found.append(name)
    assert " ".join(found) == CHOSEN[case]


def test_with_several_threads_a_few_small_tensors_beside_large_ones_do_not_matter(
    threads: Callable[[int], None],
) -> None:
    """Plain Adam wakes all threads seven times for a large tensor, fused Adam once for each."""
    threads(2)

    def returned(task: Task) -> Optimizer:
        sizes = [2 * 32768, *[32] * task.small]
        task.net = nn.ParameterList(torch.zeros(n) for n in sizes)
        return adam(task)

    def chosen(small: int) -> bool:
        task = Task(returned)
        task.small = small
        return bool(OptimizerPlan.build(task, fused=None, device=CPU).fused)

    assert chosen(6)
    assert not chosen(7)


def strided(kind: str) -> nn.Parameter:
    """Returns a parameter of 4 x 6 whose numbers lie in memory in a way of their own."""
    values = torch.arange(48.0)
    with_gaps = {"gaps": values.view(4, 12)[:, ::2], "turned": values[:24].view(6, 4).t()}
    return nn.Parameter(with_gaps[kind])


def test_a_parameter_with_gaps_in_memory_is_left_alone() -> None:
    """The fused kernel for the CPU would write into the gaps, without a word."""

    def returned(kind: str, task: Task) -> Optimizer:
        task.net = nn.ParameterList([strided(kind)])
        return adam(task)

    assert build(partial(returned, "gaps"), fused=None).fused == []
    with pytest.raises(OptimizerError, match="a view with gaps"):
        build(partial(returned, "gaps"), fused=True)
    turned, plain = (build(partial(returned, "turned"), fused=f) for f in (None, False))
    for plan in (turned, plain):
        for seed in range(3):
            learn(plan, seed)
    assert turned.fused
    torch.testing.assert_close(turned.parameters[0], plain.parameters[0], rtol=0, atol=1e-6)


class ByHand(lk.TaskModule):
    """Puts gradients there itself, in the order in which they come."""

    automatic_optimization = False

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.turned = turned

    def training_step(self, batch: Any, batch_idx: int) -> None:
        gradient = torch.ones(3, 2).t() if self.turned else torch.ones(2, 3)
        self.weight.grad = gradient
        self.optimizers().step()

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.parameters(), lr=0.1)


def fit_by_hand(turned: bool, folder: Path, **options: Any) -> lk.Trainer:
    trainer = lk.Trainer(max_steps=2, default_root_dir=folder, logger=False, **options)
    trainer.fit(ByHand(turned), range(4))
    return trainer


def test_a_gradient_that_was_put_there_in_another_order_is_refused(tmp_path: Path) -> None:
    """The fused kernel for the CPU would take the wrong numbers, without a word."""
    assert fit_by_hand(False, tmp_path).session.plan.fused
    assert not fit_by_hand(True, tmp_path, fused=False).session.plan.fused
    with pytest.raises(OptimizerError, match=r"shape \(2, 3\) was put there by.*fused=False"):
        fit_by_hand(True, tmp_path)


def test_the_order_says_nothing_where_a_size_is_one() -> None:
    one = nn.Parameter(torch.zeros(1, 3))
    plan = build(lambda t: Adam([one]), fused=None)
    one.grad = torch.ones(3, 1).t()
    assert one.grad.stride() != one.stride()
    check_gradients(plan.optimizers[0])


def test_a_state_of_another_memory_format_is_brought_into_order() -> None:
    def returned(task: Task) -> Optimizer:
        task.net = nn.Conv2d(3, 4, 2)
        if task.last:
            task.net.to(memory_format=torch.channels_last)
        return adam(task)

    def made(last: bool, fused: bool | None) -> OptimizerPlan:
        torch.manual_seed(0)
        task = Task(returned)
        task.last = last
        return OptimizerPlan.build(task, fused=fused, device=CPU)

    first, going_on, expected = made(False, False), made(True, None), made(True, False)
    learn(first)
    for plan in (going_on, expected):
        plan.load_state_dict(copy.deepcopy(first.state_dict()))
        for seed in range(3):
            learn(plan, seed)
    assert going_on.fused
    assert going_on.parameters[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(going_on.parameters[0], expected.parameters[0], rtol=0, atol=1e-6)


class Sparse(Task):
    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__(returned)
        self.table = nn.Embedding(4, 2, sparse=True)


class Rows(Task):
    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__(returned)
        self.rows = nn.Parameter(torch.eye(2).to_sparse_csr())


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
    "sparse parameters": (lambda t: SGD(t.parameters(), lr=0.1), Rows),
    "half types": (lambda t: SGD(t.parameters(), lr=0.1), Half),
    "dampening": (lambda t: SGD(t.parameters(), lr=0.1, momentum=0.9, dampening=0.1), Task),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
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


def test_a_layer_that_is_lazy_is_not_fused(quiet: Any) -> None:
    class Lazy(lk.TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LazyLinear(1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SGD(self.parameters(), lr=0.1)

    task = Lazy()
    quiet(max_epochs=1, fused=None).fit(task, [(torch.ones(2, 3),)])
    assert task.net.weight.shape == (1, 3)
    with pytest.raises(OptimizerError, match="a lazy layer has no size yet"):
        quiet(max_epochs=1, fused=True).fit(Lazy(), [(torch.ones(2, 3),)])


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
