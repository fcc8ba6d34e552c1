from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader

from lightkit.errors import ConfigError, OptimizerError
from lightkit.fused import FusedChoice
from lightkit.optim import ManualOptimizer
from lightkit.precision import Precision, ScaledPrecision, resolve_precision
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "name", "dtype", "scaled"),
    [
        (32, "32-true", None, False),
        ("32", "32-true", None, False),
        ("32-true", "32-true", None, False),
        ("bf16", "bf16-mixed", None, False),
        ("BF16-mixed", "bf16-mixed", None, False),
        (16, "16-mixed", None, True),
        ("16", "16-mixed", None, True),
        ("16-mixed", "16-mixed", None, True),
        ("bf16-true", "bf16-true", torch.bfloat16, False),
        ("16-true", "16-true", torch.float16, False),
        (64, "64-true", torch.float64, False),
        ("64-true", "64-true", torch.float64, False),
    ],
)
def test_every_name_of_the_field(
    given: str | int, name: str, dtype: torch.dtype | None, scaled: bool
) -> None:
    precision = resolve_precision(given, CPU)
    assert precision.name == name
    assert precision.dtype is dtype
    assert precision.has_scaler is scaled
    assert (precision.autocast is None) is (name == "32-true")


@pytest.mark.parametrize("given", ["bf16-mix", 8, True, "half", None])
def test_other_names_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="'bf16-mixed'"):
        resolve_precision(given, CPU)


def test_the_nearest_name_is_given() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bf16-mixed'"):
        resolve_precision("bf16-mix", "cpu")


def test_mps_has_no_float64() -> None:
    with pytest.raises(ConfigError, match="mps"):
        resolve_precision(64, "mps")


def test_mixed_formats_compute_in_half_and_keep_float32() -> None:
    net = nn.Linear(4, 2)
    for name, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
        precision = resolve_precision(name, CPU)
        precision.convert_module(net)
        assert net.weight.dtype is torch.float32
        assert precision.autocast is not None
        for _ in range(2):  # one object, entered again
            with precision.autocast:
                assert net(torch.ones(1, 4)).dtype is dtype
        assert net(torch.ones(1, 4)).dtype is torch.float32


@pytest.mark.parametrize("name", ["bf16-true", "16-true", "64-true"])
def test_true_formats_convert_floats_only_and_make_new_tensors_fit(name: str) -> None:
    precision = resolve_precision(name, CPU)
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    net.register_buffer("rotation", torch.zeros(2, dtype=torch.complex64))
    precision.convert_module(net)
    assert net[0].weight.dtype is precision.dtype
    assert net[1].num_batches_tracked.dtype is torch.int64
    assert net.rotation.dtype is torch.complex64
    assert precision.autocast is not None
    with precision.autocast:
        assert torch.zeros(1).dtype is precision.dtype
    assert torch.zeros(1).dtype is torch.float32


def test_the_default_type_returns_after_an_error() -> None:
    precision = resolve_precision(64, CPU)
    assert precision.autocast is not None
    with pytest.raises(KeyError), precision.autocast:
        raise KeyError
    assert torch.get_default_dtype() is torch.float32


def test_without_a_scaler_a_step_is_the_optimizer_step() -> None:
    p = nn.Parameter(torch.ones(2))
    precision = resolve_precision(32, CPU)
    optimizer = SGD([p], lr=0.5)
    precision.backward(p.sum())
    precision.unscale(optimizer)
    assert precision.step(optimizer) is True
    assert p.tolist() == [0.5, 0.5]
    assert precision.step(optimizer, lambda: p.sum().backward()) is True
    assert p.tolist() == [-0.5, -0.5]
    assert precision.state_dict() == {}
    precision.load_state_dict({})


# --- the scaler ------------------------------------------------------------------------------------


def scaled() -> ScaledPrecision:
    precision = resolve_precision("16-mixed", CPU)
    assert isinstance(precision, ScaledPrecision)
    return precision


def optimizers(p: nn.Parameter) -> list[Optimizer]:
    """The same optimizer plain, fused by the user, and fused by lightkit."""
    chosen = Adam([p], lr=0.1)
    task = nn.Module()
    task.p = p
    assert FusedChoice([chosen], task, CPU, strict=True).chosen == [chosen]
    return [Adam([p], lr=0.1), Adam([p], lr=0.1, fused=True), chosen]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_step_is_made_with_true_gradients(which: int) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    precision, optimizer = scaled(), optimizers(p)[which]
    plain = Adam([q], lr=0.1)
    for factor in (1.0, -3.0, 0.5):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        assert p.grad is not None
        assert p.grad[0] == factor * 2.0**16
        precision.unscale(optimizer)
        precision.unscale(optimizer)
        assert p.grad[0] == factor
        assert precision.step(optimizer) is True
        plain.zero_grad()
        (q * factor).sum().backward()
        plain.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_overflow_skips_the_step_and_lowers_the_scale(which: int) -> None:
    p = nn.Parameter(torch.ones(3))
    precision, optimizer = scaled(), optimizers(p)[which]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    answers = []
    for factor in (float("inf"), 1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        before = p.detach().clone()
        answers.append(precision.step(optimizer))
        assert precision.moved is answers[-1]
        assert torch.equal(before, p) is not answers[-1]
        if answers[-1]:
            schedule.step()  # torch warns, and so fails here, if it saw no optimizer step
    assert answers == [False, True, False, True]
    assert schedule.last_epoch == 2
    assert precision.state_dict()["scaler"]["scale"] == 2.0**14


def test_momentum_survives_a_skipped_first_step() -> None:
    p, q = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    task = nn.Module()
    task.p = p
    optimizer, plain = (SGD([x], lr=0.1, momentum=0.9) for x in (p, q))
    assert FusedChoice([optimizer], task, CPU, strict=False).chosen == [optimizer]
    precision = scaled()
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        precision.backward((p * factor).sum())
        precision.step(optimizer)
    for _ in range(2):
        plain.zero_grad()
        q.sum().backward()
        plain.step()
    torch.testing.assert_close(p, q)


def test_the_scale_waits_until_every_optimizer_has_stepped() -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    precision = scaled()
    one, two = SGD([p], lr=1.0), SGD([q], lr=1.0)
    precision.backward((p * float("inf")).sum())
    precision.backward(q.sum())
    assert precision.step(one) is False
    assert precision.step(two) is True
    assert q.item() == 0.0
    precision.backward(p.sum())
    assert precision.scaler.get_scale() == 2.0**15


def test_a_closure_runs_before_the_step() -> None:
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=1.0)
    assert precision.step(optimizer, lambda: precision.backward(p.sum())) is True
    assert p.item() == 0.0
    with pytest.raises(OptimizerError, match="bf16-mixed"):
        precision.step(torch.optim.LBFGS([p]), lambda: None)


def test_the_state_goes_on_where_it_was() -> None:
    p = nn.Parameter(torch.ones(1))
    precision, optimizer = scaled(), SGD([p], lr=1.0)
    precision.backward((p * float("inf")).sum())
    precision.step(optimizer)
    state = copy.deepcopy(precision.state_dict())
    resumed = scaled()
    resumed.load_state_dict({})
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert state["scaler"]["scale"] == 2.0**15
    resolve_precision(32, CPU).load_state_dict(state)


def test_a_manual_step_unscales_before_hooks_and_clipping() -> None:
    p = nn.Parameter(torch.ones(2))
    precision = scaled()
    seen: list[float] = []

    def before(optimizer: Optimizer) -> None:
        assert p.grad is not None
        seen.append(p.grad[0].item())

    manual = ManualOptimizer(SGD([p], lr=1.0), precision, before)
    precision.backward((p * 2).sum())
    precision.unscale(manual)  # a task that clips by itself
    assert p.grad is not None
    assert p.grad.tolist() == [2.0, 2.0]
    manual.step()

    def closure() -> torch.Tensor:
        manual.zero_grad()
        loss = (p * 3).sum()
        precision.backward(loss)
        return loss

    loss = manual.step(closure)
    assert seen == [2.0, 3.0]
    assert loss.item() == -6.0
    assert p.tolist() == [-4.0, -4.0]


def test_a_flag_that_is_read_late_holds_the_schedules_back_once() -> None:
    # What a fused optimizer on CUDA does, with the flags given by hand.
    precision = scaled()
    skipped = [True, False, True, True, False, False]
    answers = []
    for flag in skipped:
        answers.append(not precision._read_late())
        precision._late = (torch.tensor(float(flag)), None)
    assert answers == [True, False, True, False, False, True]
    assert sum(answers) == skipped.count(False)


# --- in a fit --------------------------------------------------------------------------------------


class Net(TaskModule):
    """Its gradients are as large as the numbers of the batch."""

    def __init__(self, *, fused: bool | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.fused = fused
        self.rates: list[float] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return (self.net.weight * batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters(), lr=1.0, fused=self.fused)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": by_step, "interval": "step"}]


def train(tmp_path: Path, task: TaskModule, batches: list[float], **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, **{"max_epochs": 1, **quiet, **options})
    data: Any = torch.tensor(batches).reshape(-1, 1)
    trainer.fit(task, DataLoader(data, batch_size=1))
    return trainer


@pytest.mark.parametrize("fused", [None, False])
def test_a_fit_in_fp16_holds_its_schedule_at_a_skipped_step(
    tmp_path: Path, fused: bool | None
) -> None:
    task = Net(fused=fused)
    # Times the first scale of 65,536 the large ones leave the range of float32.
    train(tmp_path, task, [1e35, 1.0, 1e35, 1.0, 1.0], precision="16-mixed")
    assert task.rates == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed", "bf16-true", "64"])
def test_a_fit_runs_in_every_format(tmp_path: Path, name: str) -> None:
    class Dtypes(Net):
        def training_step(self, batch: Any) -> torch.Tensor:
            seen.append((batch.dtype, self.net(batch).dtype, torch.zeros(1).dtype))
            return self.net(batch).mean()

    seen: list[Any] = []
    train(tmp_path, Dtypes(), [1.0, 2.0], precision=name, gradient_clip_val=1.0)
    half, full = torch.bfloat16, torch.float32
    expected = {
        "16-mixed": (full, torch.float16, full),
        "bf16-mixed": (full, half, full),
        "bf16-true": (half, half, half),
        "64": (torch.float64,) * 3,
    }
    assert seen == [expected[name]] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_a_fused_step_never_waits_for_the_device() -> None:
    p = nn.Parameter(torch.ones(3, device="cuda"))
    precision: Precision = resolve_precision("16-mixed", "cuda")
    optimizer = Adam([p], lr=0.1, fused=True)
    answers = []
    for factor in (float("inf"), 1.0, 1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = (p * factor).sum()
        torch.cuda.set_sync_debug_mode("error")
        try:
            precision.backward(loss)
            precision.unscale(optimizer)
            answers.append(precision.step(optimizer))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert answers == [True, False, True, True, False]
    assert precision.state_dict()["skipped"] is False
