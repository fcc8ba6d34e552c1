from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.utils.data import DataLoader

from lightkit.errors import ConfigError
from lightkit.fused import FusedChoice
from lightkit.precision import full_float32, hints, resolve_precision
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
    precision.step(optimizer)
    assert p.tolist() == [0.5, 0.5]
    precision.step(optimizer, lambda: p.sum().backward())
    assert p.tolist() == [-0.5, -0.5]
    moved = []
    precision.end_step(lambda: moved.append(1))
    precision.end_step()
    precision.settle()
    assert moved == [1]
    assert precision.note() == ""
    assert precision.state_dict() == {}
    precision.load_state_dict({})


# --- in a fit --------------------------------------------------------------------------------------


class Net(TaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=1.0)


def train(tmp_path: Path, task: TaskModule, batches: list[float], **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, **{"max_epochs": 1, **quiet, **options})
    data: Any = torch.tensor(batches).reshape(-1, 1)
    trainer.fit(task, DataLoader(data, batch_size=1))
    return trainer


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


# --- hints -----------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch say that there is a card which can do so much."""

    def make(capability: tuple[int, int], chosen: str | None = "none") -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        switches = type("Switches", (), {} if chosen is None else {"fp32_precision": chosen})
        monkeypatch.setattr(torch.backends.cuda, "matmul", switches())
        return torch.device("cuda", 0)

    return make


def test_full_float32_on_a_card_with_tf32_is_told(card: Any) -> None:
    (line,) = hints(resolve_precision(32, CPU), card((8, 0)), [])
    assert 'torch.set_float32_matmul_precision("high")' in line
    assert hints(resolve_precision(32, CPU), card((7, 5)), []) == []
    assert hints(resolve_precision(32, CPU), CPU, []) == []
    for other in ("bf16-mixed", "bf16-true", 64):
        assert hints(resolve_precision(other, CPU), card((9, 0)), []) == []


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
def test_who_has_chosen_is_told_nothing(card: Any, chosen: str) -> None:
    assert hints(resolve_precision(32, CPU), card((8, 0), chosen), []) == []


def test_versions_of_torch_without_the_new_switch_are_asked_the_old_way(
    card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = card((8, 0), None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert len(hints(resolve_precision(32, CPU), device, [])) == 1
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hints(resolve_precision(32, CPU), device, []) == []


def test_torch_itself_says_whether_it_was_chosen() -> None:
    switches: Any = torch.backends.cuda.matmul
    before = switches.fp32_precision
    try:
        assert full_float32()
        torch.set_float32_matmul_precision("high")
        assert not full_float32()
        torch.set_float32_matmul_precision("highest")
        assert not full_float32()
    finally:
        switches.fp32_precision = before
    assert full_float32()


def test_an_optimizer_that_waits_for_the_device_under_16_mixed_is_told(card: Any) -> None:
    task, precision, device = nn.Linear(1, 1), resolve_precision("16-mixed", CPU), card((8, 0))
    fused, plain = AdamW(task.parameters()), RMSprop(task.parameters())
    FusedChoice([fused], task, CPU, strict=True)
    assert hints(precision, device, [fused]) == []
    (line,) = hints(precision, device, [fused, plain])
    assert line.startswith("RMSprop does not run fused")
    assert hints(precision, CPU, [plain]) == []


def test_the_hint_is_one_line_at_the_start_of_a_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Plain(Net):
        def training_step(self, batch: Any) -> torch.Tensor:
            return self.net(batch).mean()

    monkeypatch.setattr("lightkit.announce.hints", lambda *arguments: ["a line"])
    with caplog.at_level("INFO", "lightkit"):
        train(tmp_path, Plain(), [1.0, 2.0], max_epochs=3)
    found = [r for r in caplog.records if "a line" in r.getMessage()]
    assert [(r.levelname, r.getMessage()) for r in found] == [
        ("INFO", "hint:     a line [precision]")
    ]
