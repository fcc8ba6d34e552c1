from __future__ import annotations

import io
import logging
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader

from lightkit.errors import CheckpointError, OptimizerError
from lightkit.optim import ManualOptimizer, OptimizerPlan
from lightkit.precision import resolve_precision
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

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


def test_optimizers_that_need_a_closure_are_known() -> None:
    assert build(lambda t: torch.optim.LBFGS(t.parameters())).needs_closure
    assert not build(adam).needs_closure
    assert not build(lambda t: ([o := adam(t)], [schedules.StepLR(o, 1)])).needs_closure


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


def test_a_schedule_by_epoch_waits_for_the_first_step() -> None:
    # As after an epoch whose steps the scaler skipped. Torch would warn, and warnings are errors.
    plan = build(lambda t: ([o := adam(t)], [schedules.StepLR(o, 1)]))
    plan.step_schedulers("epoch", 1)
    assert plan.schedulers[0].scheduler.last_epoch == 0
    learn(plan)
    plan.step_schedulers("epoch", 2)
    assert plan.schedulers[0].scheduler.last_epoch == 1


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
    learn(plan)
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
    assert "on a plateau" in line or line.endswith(" 10)")
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


def test_lines_and_lengths_are_in_the_unit_of_each_schedule() -> None:
    def returned(task: Task) -> Any:
        o = adam(task)
        by_step = {"scheduler": schedules.OneCycleLR(o, 0.1, total_steps=100)}
        return [o], [by_step, schedules.ConstantLR(o)]

    plan = build(returned)
    by_step, by_epoch = plan.describe(100, 7)
    assert by_step.endswith("(step 100)")
    assert by_epoch.endswith("(epoch 7)")
    plan.check_horizon(100, 7)
    with pytest.raises(OptimizerError, match="total_steps=101"):
        plan.check_horizon(101, 7)


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


# --- in a fit --------------------------------------------------------------------------------------


class Net(TaskModule):
    """Its validation logs a loss that never gets better."""

    def __init__(self, returned: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.returned = returned
        self.rates: list[float] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", 1.0, batch_size=1)

    def configure_optimizers(self) -> Any:
        return self.returned(self)


def train(tmp_path: Path, task: TaskModule, epochs: int, *, val: bool = True) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, **quiet)
    data: Any = torch.ones(2, 1)
    loader: Any = DataLoader(data, batch_size=1)
    trainer.fit(task, loader, DataLoader(data + 1) if val else None)


def test_a_fit_moves_its_schedules_in_their_units(tmp_path: Path) -> None:
    def by(interval: str, frequency: int = 1) -> Net:
        def returned(task: Net) -> Any:
            o = SGD(task.parameters(), lr=1.0)
            plan = {"interval": interval, "frequency": frequency}
            return [o], [{"scheduler": schedules.StepLR(o, 1, gamma=0.5), **plan}]

        task = Net(returned)
        train(tmp_path, task, 3)
        return task

    assert by("step").rates == [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert by("step", 3).rates == [1, 1, 1, 0.5, 0.5, 0.5]
    assert by("epoch").rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert by("epoch", 2).rates == [1, 1, 1, 1, 0.5, 0.5]


def on_plateau(monitor: str) -> Callable[[Any], Any]:
    def returned(task: Net) -> Any:
        o = SGD(task.parameters(), lr=1.0)
        plateau = schedules.ReduceLROnPlateau(o, patience=0, factor=0.5)
        return {"optimizer": o, "lr_scheduler": {"scheduler": plateau, "monitor": monitor}}

    return returned


def test_a_fit_lowers_the_rate_on_a_plateau(tmp_path: Path) -> None:
    task = Net(on_plateau("val_loss"))
    train(tmp_path, task, 4)
    assert task.rates == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_fit_without_the_metric_of_a_plateau_ends_with_the_names(tmp_path: Path) -> None:
    for val in (True, False):
        with pytest.raises(OptimizerError, match=r"'train_loss'.*"):
            train(tmp_path, Net(on_plateau("val_los")), 4, val=val)


def test_a_task_may_move_its_schedules_in_a_fit(tmp_path: Path) -> None:
    class Own(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            moved.append(float(metric))

    moved: list[float] = []
    train(tmp_path, Own(on_plateau("val_loss")), 2)
    assert moved == [1.0, 1.0]
