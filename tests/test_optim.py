from __future__ import annotations

import copy
import io
import logging
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

from lightkit.errors import CheckpointError, OptimizerError
from lightkit.optim import ManualOptimizer, OptimizerPlan
from lightkit.precision import resolve_precision

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

    def warm_up(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / 5)


class ManualTask(Task):
    automatic_optimization = False


def build(
    returned: Callable[[Task], Any], *, fused: bool | None = False, task: type[Task] = Task
) -> OptimizerPlan:
    return OptimizerPlan.build(task(returned), fused=fused, device=CPU)


def adam(task: Task, **kwargs: Any) -> Adam:
    return Adam(task.parameters(), lr=0.1, **kwargs)


def learn(plan: OptimizerPlan, seed: int = 0) -> None:
    """One step on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for p in plan.parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    for optimizer in plan.optimizers:
        optimizer.step()


# --- what configure_optimizers may return --------------------------------------------------------


def test_every_shape_gives_the_same_plan() -> None:
    def step_lr(o: Optimizer) -> Any:
        return schedules.StepLR(o, 1)

    def with_dict(wrap: Callable[[Any, Any], Any]) -> Callable[[Task], Any]:
        return lambda task: wrap(o := adam(task), step_lr(o))

    shapes = [
        with_dict(lambda o, s: ([o], [s])),
        with_dict(lambda o, s: [[o], [s]]),
        with_dict(lambda o, s: ([o], [{"scheduler": s}])),
        with_dict(lambda o, s: {"optimizer": o, "lr_scheduler": s}),
        with_dict(lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s}}),
        with_dict(lambda o, s: [{"optimizer": o, "lr_scheduler": {"scheduler": s}}]),
        with_dict(lambda o, s: ({"optimizer": o, "lr_scheduler": [s]},)),
    ]
    for returned in shapes:
        plan = build(returned)
        (entry,) = plan.schedulers
        assert type(plan.optimizer) is Adam
        assert entry.optimizer is plan.optimizer
        assert (entry.interval, entry.frequency, entry.monitor) == ("epoch", 1, None)
        assert plan.epoch_entries == (entry,)
        assert plan.step_entries == ()


def test_an_optimizer_alone_or_in_a_list_has_no_schedules() -> None:
    for returned in (adam, lambda t: [adam(t)], lambda t: (adam(t),), lambda t: ([adam(t)], [])):
        plan = build(returned)
        assert type(plan.optimizer) is Adam
        assert plan.schedulers == []


def test_keys_of_a_schedule_are_kept() -> None:
    def returned(task: Task) -> Any:
        o = adam(task)
        plan = {"interval": "step", "frequency": 3, "name": "rate", "strict": False}
        plateau = {"scheduler": schedules.ReduceLROnPlateau(o), "monitor": "val_loss"}
        return [o], [{"scheduler": schedules.StepLR(o, 1), **plan}, plateau]

    one, two = build(returned).schedulers
    assert (one.interval, one.frequency, one.name, one.strict) == ("step", 3, "rate", False)
    assert (two.interval, two.monitor, two.is_plateau) == ("epoch", "val_loss", True)


def test_the_monitor_may_stand_beside_the_optimizer() -> None:
    def returned(task: Task) -> Any:
        o = adam(task)
        return {
            "optimizer": o,
            "lr_scheduler": schedules.ReduceLROnPlateau(o),
            "monitor": "val_loss",
        }

    assert build(returned).plateau_entries[0].monitor == "val_loss"


def test_one_cycle_and_cyclic_move_by_step_unless_told() -> None:
    def one_cycle(o: Optimizer) -> Any:
        return schedules.OneCycleLR(o, 0.1, total_steps=10)

    def told(task: Task) -> Any:
        o = adam(task)
        return [o], [{"scheduler": one_cycle(o), "interval": "epoch"}]

    assert build(lambda t: ([o := adam(t)], [one_cycle(o)])).schedulers[0].interval == "step"
    cyclic = build(lambda t: ([o := adam(t)], [schedules.CyclicLR(o, 0.1, 0.2)]))
    assert cyclic.schedulers[0].interval == "step"
    assert build(told).schedulers[0].interval == "epoch"


def test_a_schedule_that_torch_does_not_know_needs_only_step() -> None:
    class Halving:
        def __init__(self, optimizer: Optimizer) -> None:
            self._group = optimizer.param_groups[0]

        def step(self) -> None:
            self._group["lr"] /= 2

    plan = build(lambda t: {"optimizer": (o := adam(t)), "lr_scheduler": Halving(o)})
    plan.step_schedulers("epoch", 1)
    assert plan.optimizers[0].param_groups[0]["lr"] == 0.05
    two = lambda t: ([o := adam(t), adam(t)], [Halving(o)])  # noqa: E731
    with pytest.raises(OptimizerError, match="which optimizer it moves"):
        build(two, task=ManualTask)


def test_none_warns_once_and_has_no_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    plan = build(lambda t: None)
    assert plan.optimizer is None
    assert plan.parameters == []
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_two_optimizers_need_manual_optimization() -> None:
    with pytest.raises(OptimizerError, match="automatic_optimization = False"):
        build(lambda t: [adam(t), adam(t)])
    plan = build(lambda t: [adam(t), adam(t)], task=ManualTask)
    assert len(plan.optimizers) == 2
    assert plan.optimizer is None


def stepped(o: Optimizer, **keys: Any) -> dict[str, Any]:
    return {"optimizer": o, "lr_scheduler": {"scheduler": schedules.StepLR(o, 1), **keys}}


WRONG: dict[str, tuple[Callable[[Task], Any], str]] = {
    "a number": (lambda t: 3, "of type int.*may return an optimizer"),
    "a class": (lambda t: Adam, "the class Adam, not an object"),
    "the pair": (lambda t: (o := adam(t), schedules.StepLR(o, 1)), r"return \[optimizer\], \[sch"),
    "a scheduler among optimizers": (
        lambda t: [[schedules.StepLR(adam(t), 1)], []],
        "stands for an optimizer is of type StepLR",
    ),
    "an optimizer among schedulers": (
        lambda t: [[o := adam(t)], [o]],
        "stands for a scheduler is of type Adam",
    ),
    "a scheduler class": (
        lambda t: {"optimizer": adam(t), "lr_scheduler": schedules.StepLR},
        "the class StepLR",
    ),
    "the same twice": (lambda t: [o := adam(t), o], "same optimizer twice"),
    "interval at the wrong level": (
        lambda t: {**stepped(adam(t)), "interval": "step"},
        "'interval' belongs into the dict of the scheduler",
    ),
    "unknown outer key": (lambda t: {**stepped(adam(t)), "lr_schedule": 1}, "'lr_scheduler'"),
    "scheduler outside": (
        lambda t: {"optimizer": (o := adam(t)), "scheduler": schedules.StepLR(o, 1)},
        "Did you mean 'lr_scheduler'",
    ),
    "unknown inner key": (lambda t: stepped(adam(t), intervall="step"), "mean 'interval'"),
    "no optimizer key": (lambda t: {"lr_scheduler": None}, "without the key 'optimizer'"),
    "no scheduler key": (
        lambda t: {"optimizer": adam(t), "lr_scheduler": {"interval": "step"}},
        "without the key 'scheduler'",
    ),
    "wrong interval": (lambda t: stepped(adam(t), interval="steps"), "Did you mean 'step'"),
    "wrong frequency": (lambda t: stepped(adam(t), frequency=0), "frequency=0"),
    "fractional frequency": (lambda t: stepped(adam(t), frequency=0.5), "frequency=0.5"),
    "another optimizer": (
        lambda t: {"optimizer": adam(t), "lr_scheduler": schedules.StepLR(adam(t), 1)},
        "did not return",
    ),
    "plateau without monitor": (
        lambda t: {"optimizer": (o := adam(t)), "lr_scheduler": schedules.ReduceLROnPlateau(o)},
        "'monitor': 'val_loss'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_an_error_that_names_the_fix(case: str) -> None:
    returned, match = WRONG[case]
    with pytest.raises(OptimizerError, match=match):
        build(returned)


# --- moving schedules ----------------------------------------------------------------------------


def test_step_and_epoch_schedules_move_by_their_frequency() -> None:
    def returned(task: Task) -> Any:
        o = adam(task)
        by_epoch = {"scheduler": schedules.ExponentialLR(o, 0.5), "frequency": 2}
        by_step = {"scheduler": schedules.ConstantLR(o), "interval": "step", "frequency": 3}
        return [o], [by_epoch, by_step]

    plan = build(returned)
    by_epoch, by_step = (e.scheduler for e in plan.schedulers)
    for count in range(1, 8):
        learn(plan)
        plan.step_schedulers("step", count)
    assert (by_epoch.last_epoch, by_step.last_epoch) == (0, 2)
    for count in range(1, 6):
        plan.step_schedulers("epoch", count)
    assert (by_epoch.last_epoch, by_step.last_epoch) == (2, 2)
    plan.step_schedulers("step", 9, skip=True)
    assert by_step.last_epoch == 2


def test_the_rates_are_those_of_a_loop_by_hand() -> None:
    def one_cycle(o: Optimizer) -> Any:
        return schedules.OneCycleLR(o, 0.1, total_steps=12)

    plan = build(lambda t: ([o := adam(t)], [one_cycle(o)]))
    hand = Adam(nn.Linear(3, 2).parameters(), lr=0.1)
    schedule = one_cycle(hand)
    for count in range(1, 13):
        learn(plan)
        plan.step_schedulers("step", count)
        hand.step()
        schedule.step()
        assert plan.optimizers[0].param_groups[0]["lr"] == hand.param_groups[0]["lr"]


def test_manual_optimization_leaves_schedules_to_the_task() -> None:
    plan = build(lambda t: ([o := adam(t)], [schedules.StepLR(o, 1)]), task=ManualTask)
    plan.step_schedulers("epoch", 1)
    assert plan.schedulers[0].scheduler.last_epoch == 0
    assert "moved by the task" in plan.describe(10, 1)[0]


def test_the_task_may_move_schedules_itself() -> None:
    calls: list[tuple[Any, Any]] = []

    class Own(Task):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            calls.append((scheduler, metric))

    def returned(task: Task) -> Any:
        o = adam(task)
        plateau = {"scheduler": schedules.ReduceLROnPlateau(o), "monitor": "val_loss"}
        return [o], [schedules.StepLR(o, 1), plateau]

    plan = build(returned, task=Own)
    plan.step_schedulers("epoch", 1)
    plan.step_plateau("epoch", 1, {"val_loss": torch.tensor(1.0)})
    assert calls == [
        (plan.schedulers[0].scheduler, None),
        (plan.schedulers[1].scheduler, torch.tensor(1.0)),
    ]
    assert plan.schedulers[0].scheduler.last_epoch == 0


def plateau_plan(**keys: Any) -> OptimizerPlan:
    def returned(task: Task) -> Any:
        o = adam(task)
        schedule = schedules.ReduceLROnPlateau(o, patience=0, factor=0.5)
        return {"optimizer": o, "lr_scheduler": {"scheduler": schedule, **keys}}

    return build(returned)


def test_plateau_schedules_read_their_monitor() -> None:
    plan = plateau_plan(monitor="val_loss")
    rates = []
    for count, value in enumerate((1.0, 2.0, 0.5, 0.6), start=1):
        plan.step_schedulers("epoch", count)
        plan.step_plateau("step", count, {"val_loss": torch.tensor(value)})
        plan.step_plateau("epoch", count, {"val_loss": torch.tensor(value)})
        rates.append(plan.optimizers[0].param_groups[0]["lr"])
    assert rates == [0.1, 0.05, 0.05, 0.025]


def test_a_missing_monitor_is_an_error_that_lists_the_metrics() -> None:
    plan = plateau_plan(monitor="val_los")
    plan.step_plateau("epoch", 1, {}, validated=False)
    metrics = {"val_loss": torch.tensor(1.0), "train_loss": torch.tensor(1.0)}
    with pytest.raises(OptimizerError, match=r"'train_loss', 'val_loss'.*mean 'val_loss'"):
        plan.step_plateau("epoch", 1, metrics)


def test_a_missing_monitor_warns_once_if_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    plan = plateau_plan(monitor="accuracy", strict=False)
    for count in (1, 2):
        plan.step_plateau("epoch", count, {})
    assert len(caplog.records) == 1
    assert "none yet" in caplog.text


# --- parameters ----------------------------------------------------------------------------------


def test_parameters_are_listed_once_and_follow_the_groups() -> None:
    plan = build(lambda t: SGD([{"params": [t.net.weight]}], lr=0.1))
    task = Task(adam)
    (optimizer,) = plan.optimizers
    assert plan.current_parameters() is plan.parameters
    assert len(plan.parameters) == 1
    optimizer.add_param_group({"params": list(task.parameters())})
    assert len(plan.current_parameters()) == 3
    extra = nn.Parameter(torch.zeros(1))
    optimizer.param_groups[1]["params"].append(extra)
    assert plan.current_parameters()[-1] is extra
    replaced = [nn.Parameter(torch.zeros(1))]
    optimizer.param_groups[0]["params"] = replaced
    assert plan.current_parameters()[0] is replaced[0]
    optimizer.load_state_dict(optimizer.state_dict())
    assert plan._groups[0][1] is not optimizer.param_groups
    assert len(plan.current_parameters()) == 4
    assert plan._groups[0][1] is optimizer.param_groups


def test_parameters_shared_by_two_optimizers_are_listed_once() -> None:
    plan = build(lambda t: [adam(t), adam(t)], task=ManualTask)
    assert len(plan.parameters) == 2


def test_the_calls_of_every_step_cost_next_to_nothing() -> None:
    plan = build(adam)
    n = 20_000
    params = min(timeit.repeat(plan.current_parameters, number=n, repeat=5)) / n
    steps = min(timeit.repeat(lambda: plan.step_schedulers("step", 5), number=n, repeat=5)) / n
    print(f"current_parameters {params * 1e6:.2f} us, step_schedulers {steps * 1e6:.2f} us")
    assert params < 3e-6
    assert steps < 3e-6


# --- fused ---------------------------------------------------------------------------------------

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


# --- saving ----------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Optimizer, Task], Any]] = {
    "StepLR": lambda o, t: schedules.StepLR(o, 3),
    "MultiStepLR": lambda o, t: schedules.MultiStepLR(o, [2, 5]),
    "LambdaLR": lambda o, t: schedules.LambdaLR(o, t.warm_up),
    "MultiplicativeLR": lambda o, t: schedules.MultiplicativeLR(o, lambda e: 0.9),
    "ConstantLR": lambda o, t: schedules.ConstantLR(o),
    "LinearLR": lambda o, t: schedules.LinearLR(o),
    "ExponentialLR": lambda o, t: schedules.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, t: schedules.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o, t: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o, t: schedules.CosineAnnealingWarmRestarts(o, 4),
    "SequentialLR": lambda o, t: schedules.SequentialLR(
        o, [schedules.LinearLR(o, total_iters=3), schedules.CosineAnnealingLR(o, 7)], [3]
    ),
    "ChainedScheduler": lambda o, t: schedules.ChainedScheduler(
        [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o, t: schedules.CyclicLR(o, 0.01, 0.1, 5, cycle_momentum=True),
    "OneCycleLR": lambda o, t: schedules.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o, t: {
        "scheduler": schedules.ReduceLROnPlateau(o, patience=0),
        "monitor": "val_loss",
    },
    "SWALR": lambda o, t: torch.optim.swa_utils.SWALR(o, 0.05),
}


def move(plan: OptimizerPlan, counts: range) -> list[float]:
    rates = []
    for count in counts:
        learn(plan, count)
        plan.step_schedulers("step", count)
        plan.step_schedulers("epoch", count)
        plan.step_plateau("epoch", count, {"val_loss": torch.tensor(float(count))})
        rates.append(plan.optimizers[0].param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_torch_schedule_is_described_saved_and_continued(name: str) -> None:
    def make() -> OptimizerPlan:
        return build(lambda t: ([o := adam(t)], [SCHEDULES[name](o, t)]), fused=None)

    plan, resumed = make(), make()
    before = repr(plan.state_dict())
    (line,) = plan.describe(10, 10)
    assert repr(plan.state_dict()) == before
    assert line.startswith(f"{name} per ")
    assert "on a plateau" in line or "over 10" in line
    move(plan, range(1, 5))
    buffer = io.BytesIO()
    torch.save(plan.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert move(resumed, range(5, 11)) == move(plan, range(5, 11))


def test_a_state_of_another_shape_says_what_differs() -> None:
    plain = build(adam)
    with_schedule = build(lambda t: ([o := adam(t)], [schedules.StepLR(o, 1)]))
    two_groups = build(lambda t: Adam([{"params": [p]} for p in t.parameters()]))
    fewer = build(lambda t: Adam([t.net.weight]))
    none = {"optimizers": [], "schedulers": []}
    for plan, state, match in (
        (plain, none, "0 optimizers, this run has 1"),
        (plain, with_schedule.state_dict(), "1 schedules, this run has 0"),
        (plain, two_groups.state_dict(), r"2 groups in optimizer 0 \(Adam\), this run has 1"),
        (plain, fewer.state_dict(), r"1 parameters in group 0 of optimizer 0 \(Adam\)"),
    ):
        with pytest.raises(CheckpointError, match=match):
            plan.load_state_dict(state)


# --- words -----------------------------------------------------------------------------------------


def described(scheduler: Callable[[Optimizer], Any], steps: int | None = 100) -> str:
    return build(lambda t: ([o := adam(t)], [scheduler(o)])).describe(steps, 10)[0]


def test_a_schedule_is_told_in_one_line() -> None:
    line = described(lambda o: schedules.OneCycleLR(o, 0.1, total_steps=100))
    assert line == "OneCycleLR per step: lr 0.004 -> 0.1 (step 30) -> 4e-07 over 100 steps"
    line = described(lambda o: schedules.StepLR(o, 3))
    assert line == "StepLR per epoch: lr 0.1 -> 0.0001 over 10 epochs"
    every = described(lambda o: {"scheduler": schedules.StepLR(o, 3), "frequency": 2})
    assert every == "StepLR every 2 epochs: lr 0.1 -> 0.01 over 10 epochs"
    plateau = {"monitor": "val_loss"}
    line = described(lambda o: {"scheduler": schedules.ReduceLROnPlateau(o), **plateau})
    assert line == "ReduceLROnPlateau per epoch: lr 0.1, lowered when 'val_loss' stays on a plateau"


def test_long_or_open_runs_tell_the_first_rate() -> None:
    def one_cycle(o: Optimizer) -> Any:
        return schedules.OneCycleLR(o, 0.1, total_steps=100_000)

    for steps in (None, 100_000):
        assert described(one_cycle, steps) == "OneCycleLR per step: lr 0.004 at the start"


def test_a_schedule_that_cannot_be_copied_tells_the_first_rate() -> None:
    class Stubborn(schedules.ConstantLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    assert described(lambda o: Stubborn(o, 1.0)) == "Stubborn per epoch: lr 0.1 at the start"


def test_a_schedule_made_from_a_method_does_not_copy_the_task() -> None:
    class Heavy(Task):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the task was copied")

    plan = build(lambda t: ([o := adam(t)], [schedules.LambdaLR(o, t.warm_up)]), task=Heavy)
    assert plan.describe(100, 10) == ["LambdaLR per epoch: lr 0.02 -> 0.1 over 10 epochs"]


def test_a_one_cycle_of_another_length_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def plan(**keys: Any) -> OptimizerPlan:
        def returned(task: Task) -> Any:
            o = adam(task)
            return [o], [{"scheduler": schedules.OneCycleLR(o, 0.1, total_steps=100), **keys}]

        return build(returned)

    plan().check_horizon(100, 1)
    plan().check_horizon(None, None)
    plan(frequency=2).check_horizon(200, 1)
    assert caplog.text == ""
    with pytest.raises(OptimizerError, match="total_steps=100, but this run of 101 steps"):
        plan().check_horizon(101, 1)
    plan(interval="epoch").check_horizon(100, 10)
    assert "or set interval='step'" in caplog.text
    plan().check_horizon(99, 1)
    assert "Make it with total_steps=99" in caplog.text


# --- manual optimization -----------------------------------------------------------------------------


def test_a_manual_optimizer_is_the_optimizer() -> None:
    task = Task(adam)
    real = adam(task)
    seen: list[Optimizer] = []
    manual = ManualOptimizer(real, resolve_precision(32, CPU), seen.append)
    assert isinstance(manual, Optimizer)
    assert isinstance(manual, Adam)
    assert manual.param_groups is real.param_groups
    assert manual.state is real.state
    before = task.net.weight.detach().clone()
    task.net(torch.ones(1, 3)).sum().backward()
    assert manual.step() is None
    assert seen == [real]
    assert not torch.equal(task.net.weight, before)
    manual.zero_grad()
    assert task.net.weight.grad is None
    manual.load_state_dict(manual.state_dict())
    with pytest.raises(AttributeError, match="nothing"):
        manual.nothing  # noqa: B018


def test_a_manual_step_with_a_closure_runs_it_first() -> None:
    order: list[str] = []
    task = Task(adam)
    real = torch.optim.LBFGS(task.parameters(), lr=0.1, max_iter=2)
    manual = ManualOptimizer(real, resolve_precision(32, CPU), lambda o: order.append("hooks"))

    def closure() -> torch.Tensor:
        order.append("closure")
        manual.zero_grad()
        loss = task.net(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    loss = manual.step(closure)
    assert order[:4] == ["closure", "hooks"] * 2
    assert loss > closure()


def test_a_schedule_sees_the_steps_of_a_manual_optimizer() -> None:
    task = Task(adam)
    real = adam(task)
    schedule = schedules.StepLR(real, 1)
    manual = ManualOptimizer(real, resolve_precision("bf16-mixed", CPU), lambda o: None)
    task.net(torch.ones(1, 3)).sum().backward()
    manual.step()
    schedule.step()  # torch warns here when it saw no optimizer step, and warnings are errors
    assert schedule.last_epoch == 1
