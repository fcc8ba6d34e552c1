"""What the note on an error says: which submodule, what it was given, what it was made for."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightkit as lk
from lightkit.errors import DataError
from lightkit.explaining import explain, seen

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
LABELS = torch.zeros(4).long()


class Task(lk.TaskModule):
    def __init__(self, net: nn.Module, loss: Any = F.cross_entropy) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def validation_step(self, batch: Any) -> Tensor:
        return self.training_step(batch)

    def predict_step(self, batch: Any) -> Tensor:
        x, _ = batch
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> lk.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lk.Trainer(**{**quiet, **options})


def note_of(error: BaseException) -> str:
    (note,) = error.__notes__
    return note


def failing(task: lk.TaskModule, batch: Any) -> str:
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError, AssertionError)) as raised:
        trainer().fit(task, [batch])
    return note_of(raised.value)


def image_net() -> nn.Module:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(10, 2))
    return nn.Sequential(nn.Conv2d(3, 4, 3), flat)


FAULTS: dict[str, tuple[Callable[[], nn.Module], Any, Any, list[str]]] = {
    # name: the network, the loss, the batch, what the note says
    "Linear behind a flatten": (
        image_net,
        F.cross_entropy,
        (torch.rand(4, 3, 8, 8), LABELS),
        [
            "in net.1.1: Linear(in_features=10, out_features=2, bias=True), in training batch 0",
            "input   float32 (4, 144)",
            "weight  float32 (2, 10)",
            "test_explaining.py:",
            "in training_step: return self.loss(self.net(x), y)",
            "x       float32 (4, 3, 8, 8)",
            "batch   (float32 (4, 3, 8, 8), int64 (4,))",
            "hint    Linear(in_features=144), or flatten or pool differently before it",
        ],
    ),
    "Linear without a flatten": (
        lambda: nn.Linear(12, 2),
        F.cross_entropy,
        (torch.rand(4, 3, 4), LABELS),
        ["in net: Linear", "input.flatten(1) before it"],
    ),
    "channels last": (
        image_net,
        F.cross_entropy,
        (torch.rand(4, 8, 8, 3), LABELS),
        ["in net.0: Conv2d", "weight  float32 (4, 3, 3, 3)", "input.movedim(-1, 1)"],
    ),
    "channels of another number": (
        image_net,
        F.cross_entropy,
        (torch.rand(4, 1, 8, 8), LABELS),
        ["Conv2d(in_channels=1)"],
    ),
    "no channels": (
        lambda: nn.Conv2d(1, 4, 3),
        F.cross_entropy,
        (torch.rand(4, 8, 8), LABELS),
        ["input.unsqueeze(1)"],
    ),
    "norm of another size": (
        lambda: nn.BatchNorm1d(3),
        F.cross_entropy,
        (torch.rand(4, 5), LABELS),
        ["in net: BatchNorm1d", "weight  float32 (3,)\ntest", "BatchNorm1d(num_features=5)"],
    ),
    "norm of another dimension": (
        lambda: nn.BatchNorm1d(3),
        F.cross_entropy,
        (torch.rand(4, 3, 2, 2), LABELS),
        ["BatchNorm2d for an input of 4 dimensions"],
    ),
    "a batch of one for a norm": (
        lambda: nn.BatchNorm1d(3),
        F.cross_entropy,
        (torch.rand(1, 3), LABELS[:1]),
        ["input   float32 (1, 3)", "drop_last=True"],
    ),
    "recurrent": (
        lambda: nn.LSTM(4, 5),
        F.cross_entropy,
        (torch.rand(4, 2, 9), LABELS),
        ["in net: LSTM(4, 5)", "LSTM(input_size=9)"],
    ),
    "index beyond an embedding": (
        lambda: nn.Embedding(3, 2),
        F.cross_entropy,
        (torch.tensor([0, 1, 2, 3]), LABELS),
        ["input goes from 0 to 3, and allowed are 0 to 2 (num_embeddings=3)"],
    ),
    "floats for an embedding": (
        lambda: nn.Embedding(3, 2),
        F.cross_entropy,
        (torch.rand(4), LABELS),
        ["input   float32 (4,)", "hint    input.long()"],
    ),
    "float64": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.rand(4, 3).double(), LABELS),
        ["input   float64 (4, 3)", "input.to(torch.float32), or make it so in the data set"],
    ),
    "bytes": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.zeros(4, 3, dtype=torch.uint8), LABELS),
        ["input   uint8 (4, 3)", "hint    input.to(torch.float32)"],
    ),
    "the whole batch for the network": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        ([torch.rand(4, 3), LABELS], LABELS),
        ["input   [float32 (4, 3), int64 (4,)]", "input is a list: take it apart"],
    ),
    "targets in a column": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.rand(4, 3), LABELS[:, None]),
        [
            "in cross_entropy, in training batch 0",
            "input   float32 (4, 2)",
            "target  int64 (4, 1)",
            "hint    target.squeeze(1)",
        ],
    ),
    "targets as floats": (
        lambda: nn.Linear(3, 2),
        nn.CrossEntropyLoss(),
        (torch.rand(4, 3), torch.zeros(4)),
        ["in loss: CrossEntropyLoss()", "hint    target.long()"],
    ),
    "targets beyond the classes": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.rand(4, 3), torch.tensor([0, 1, 2, 0])),
        ["target goes from 0 to 2, and allowed are 0 to 1 (classes=2)"],
    ),
    "one-hot targets": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.rand(4, 3), F.one_hot(LABELS, 2)),
        ["target.argmax(1)"],
    ),
    "classes last": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        (torch.rand(4, 7, 3), torch.zeros(4, 7).long()),
        ["input.movedim(-1, 1): torch takes classes as the second dimension"],
    ),
    "an output in a column": (
        lambda: nn.Linear(3, 1),
        nn.BCEWithLogitsLoss(),
        (torch.rand(4, 3), torch.zeros(4)),
        ["input   float32 (4, 1)", "target  float32 (4,)", "input.squeeze(-1)"],
    ),
    "a target in a column": (
        nn.PReLU,
        nn.BCEWithLogitsLoss(),
        (torch.rand(4), torch.zeros(4, 1)),
        ["target.squeeze(-1)"],
    ),
    "whole numbers for a loss of floats": (
        nn.PReLU,
        F.binary_cross_entropy_with_logits,
        (torch.rand(4), LABELS),
        ["hint    target.float()"],
    ),
    "a batch of other parts": (
        lambda: nn.Linear(3, 2),
        F.cross_entropy,
        {"image": torch.rand(4, 3), "label": LABELS, "name": ["a", "b", "c", "d"]},
        ["batch  {image: float32 (4, 3), label: int64 (4,), name: [str, str, str, str]}"],
    ),
    "too many arguments": (
        lambda: nn.Bilinear(3, 3, 2),
        F.cross_entropy,
        (torch.rand(4, 3), LABELS),
        ["in net: Bilinear", "input1  float32 (4, 3)"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_S4_01_the_note_names_the_submodule_and_both_shapes(fault: str) -> None:
    net, loss, batch, parts = FAULTS[fault]
    note = failing(Task(net(), loss), batch)
    assert [part for part in parts if part not in note] == [], note


def test_a_call_with_too_few_arguments_gets_no_hint() -> None:
    assert "hint" not in failing(Task(nn.Bilinear(3, 3, 2)), (torch.rand(4, 9), LABELS))


class Masked(nn.Module):
    """Makes a tensor elsewhere, as on the CPU within a step on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(4, 2, device="meta")
        return (x @ self.weight) * mask


def test_a_tensor_that_is_made_on_another_device_is_named() -> None:
    note = failing(Task(Masked()), (torch.rand(4, 3), LABELS))
    assert "self.weight  float32 (3, 2)" in note
    assert "mask         float32 (4, 2) on meta" in note
    assert "mask must be on cpu, as the task is: make a tensor with device=self.device" in note


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.heads = [nn.Linear(3, 2, device="meta")]

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.first(x))


def test_a_module_that_is_no_submodule_is_told() -> None:
    note = failing(Task(Hidden()), (torch.rand(4, 3), LABELS))
    assert "Linear(in_features=3, out_features=2, bias=True) (no submodule of the task)" in note
    assert "weight  float32 (2, 3) on meta" in note
    assert "nn.ModuleList" in note


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_other_stages_have_the_note_too(stage: str) -> None:
    good, bad = (torch.rand(4, 3), LABELS), (torch.rand(4, 5), LABELS)
    with pytest.raises(RuntimeError) as raised:
        getattr(trainer(), stage)(Task(nn.Linear(3, 2)), [good, bad])
    middle = "validation" if stage == "validate" else stage
    assert f"in {middle} batch 1" in note_of(raised.value)
    assert "Linear(in_features=5)" in note_of(raised.value)


def test_the_validation_of_a_fit_has_it() -> None:
    good, bad = (torch.rand(4, 3), LABELS), (torch.rand(4, 5), LABELS)
    with pytest.raises(RuntimeError) as raised:
        trainer(num_sanity_val_steps=0).fit(Task(nn.Linear(3, 2)), [good], [bad])
    assert "in validation batch 0" in note_of(raised.value)


class Raising(Task):
    def training_step(self, batch: Any) -> Tensor:
        raise ValueError("no such label")


class Own(Task):
    """Makes an error of Python's own on a line of its step."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.Linear(3, 2))
        self.how = how

    def training_step(self, batch: Any) -> Any:
        if self.how == "table":
            return {1: 2}[7]
        if self.how == "number":
            return int("seven")
        if self.how == "deep":
            return self.training_step_of_itself()
        return batch["image"]

    def training_step_of_itself(self) -> Any:
        return self.training_step_of_itself()


@pytest.mark.parametrize("how", ["table", "number", "deep"])
def test_an_error_of_python_on_a_line_without_tensors_stays_as_it_is(how: str) -> None:
    with pytest.raises((KeyError, ValueError, RecursionError)) as raised:
        trainer().fit(Own(how), [(torch.rand(4, 3), LABELS)])
    assert not hasattr(raised.value, "__notes__")


def test_a_key_that_the_batch_does_not_have_shows_the_batch() -> None:
    with pytest.raises(KeyError) as raised:
        trainer().fit(Own("key"), [{"img": torch.rand(4, 3)}])
    assert "{img: float32 (4, 3)}" in note_of(raised.value)


class Inside(nn.Module):
    """Makes the loss itself, as networks of libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Any = None, quiet: bool = True) -> Tensor:
        return F.cross_entropy(self.net(x), labels.view(-1).t())


def test_a_loss_within_a_network_shows_what_the_loss_was_given() -> None:
    task = Task(nn.Linear(3, 2), lambda x, y: net(torch.rand(4, 3), labels=torch.zeros(4, 2)))
    task.inner = net = Inside()
    note = failing(task, (torch.rand(4, 3), LABELS))
    assert "in cross_entropy, in inner: Inside, in training batch 0" in note
    assert "target  float32 (8,)" in note


def test_what_says_nothing_is_left_out() -> None:
    query = torch.rand(4, 5, 8)
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    call = lambda x, y: net(query, query, query, key_padding_mask=mask.to(x.device))  # noqa: E731
    task = Task(nn.Linear(3, 2), call)
    task.inner = net
    note = failing(task, (torch.rand(4, 3), LABELS))
    assert "key_padding_mask  bool (4, 3)" in note
    assert "None" not in note
    assert "False" not in note
    assert note.count("\n  x  ") == 1  # named twice on the line, and a local


def test_a_weight_of_the_task_is_named_though_a_method_of_it_is_called() -> None:
    class Weighed(Task):
        def training_step(self, batch: Any) -> Tensor:
            return batch[0] @ self.net.weight.view(2, 3)

    assert "self.net.weight  float32 (2, 3)" in failing(
        Weighed(nn.Linear(3, 2)), (torch.rand(4, 3), LABELS)
    )


def test_inputs_that_the_signature_does_not_name_are_counted() -> None:
    class Any_(nn.Linear):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args)

    note = failing(Task(Any_(3, 2)), (torch.rand(4, 5), LABELS))
    assert "input 1  float32 (4, 5)" in note


def test_a_line_of_an_installed_package_is_not_the_users() -> None:
    code = compile("def call(net, x):\n    return net(x)\n", "/x/site-packages/zoo.py", "exec")
    zoo: dict[str, Any] = {"__name__": "zoo"}
    exec(code, zoo)
    net = nn.Linear(3, 2)
    task = Task(nn.Identity(), lambda x, y: zoo["call"](net, x))
    task.inner = net
    note = failing(task, (torch.rand(4, 5), LABELS))
    assert "in inner: Linear" in note
    assert "test_explaining.py:" in note
    assert "zoo.py" not in note


def test_a_batch_that_the_step_replaced_is_told_from_the_given_one() -> None:
    class Cuts(Task):
        def training_step(self, batch: Any) -> Tensor:
            batch = (batch[0][:, :2], batch[1])
            return self.net(batch[0])

    note = failing(Cuts(nn.Linear(3, 2)), (torch.rand(4, 3), LABELS))
    assert "  batch        (float32 (4, 2), int64 (4,))" in note
    assert "  given batch  (float32 (4, 3), int64 (4,))" in note


def test_a_huge_batch_is_cut() -> None:
    boxes = [{"boxes": torch.rand(i, 4), "labels": torch.zeros(i)} for i in range(30)]
    note = failing(Task(nn.Linear(3, 2)), (torch.rand(4, 5), [boxes] * 30))
    assert max(map(len, note.splitlines())) < 330


class Torn:
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        yield (torch.rand(4, 3), LABELS)
        yield torch.rand(2, 3) @ torch.rand(2, 3)


def test_errors_of_the_user_and_of_a_loader_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match="no such label") as raised:
        trainer().fit(Raising(nn.Linear(3, 2)), [(torch.rand(4, 3), LABELS)])
    assert not hasattr(raised.value, "__notes__")
    with pytest.raises(RuntimeError, match="cannot be multiplied") as torn:
        trainer().fit(Task(nn.Linear(3, 2)), Torn())
    assert not hasattr(torn.value, "__notes__")


def test_nothing_is_kept_when_the_error_is_gone() -> None:
    big = torch.rand(4, 5)
    gone = weakref.ref(big)
    assert "input   float32 (4, 5)" in failing(Task(nn.Linear(3, 2)), (big, LABELS))
    del big
    gc.collect()
    assert gone() is None


def test_what_cannot_be_described_hides_nothing() -> None:
    class Odd(nn.Linear):
        def __repr__(self) -> str:
            raise KeyError("no words")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer().fit(Task(Odd(3, 2)), [(torch.rand(4, 5), LABELS)])


def test_where_exceptions_have_no_notes_it_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Old(RuntimeError):
        @property
        def add_note(self) -> Any:
            raise AttributeError("add_note")

    def fails(*_: Any) -> Any:
        raise Old("sizes differ")

    of_torch = types.FunctionType(fails.__code__, {**globals(), "__name__": "torch.fake"}, "fails",
                                  None, fails.__closure__)  # fmt: skip
    with pytest.raises(Old), caplog.at_level("ERROR", "lightkit"):
        trainer().fit(Task(nn.Linear(3, 2), of_torch), [(torch.rand(4, 3), LABELS)])
    assert [r.getMessage() for r in caplog.records if "in training batch 0" in r.getMessage()]


def test_a_network_that_is_fitted_in_one_line_is_looked_into() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
    with pytest.raises(DataError, match="Sequential cannot take the inputs") as raised:
        trainer().fit(lk.SupervisedTask(net, loss="cross_entropy"), [(torch.rand(4, 3), LABELS)])
    assert "in net.1: Linear(in_features=5" in note_of(raised.value)


def test_only_one_note_is_added() -> None:
    task = Task(nn.Linear(3, 2))
    with pytest.raises(RuntimeError) as raised:
        trainer().fit(task, [(torch.rand(4, 5), LABELS)])
    explain(raised.value, task)
    assert len(raised.value.__notes__) == 1


def test_what_was_raised_elsewhere_gets_none() -> None:
    error = RuntimeError("size mismatch")
    explain(error, nn.Linear(1, 1))
    assert not hasattr(error, "__notes__")


def test_structures_in_words() -> None:
    pair = namedtuple("pair", "x y")
    assert seen(pair(torch.zeros(2), None)) == "pair(x: float32 (2,), y: None)"
    assert seen([1] * 10) == "[1, 1, 1, 1, 1, 1, 1, 1 and 2 more]"
    assert seen({"a": (True, "text")}) == "{a: (True, str)}"
    assert seen(nn.LazyLinear(2).weight) == "float32 without a shape yet"


def test_lazy_layers_are_described() -> None:
    net = nn.Sequential(nn.LazyLinear(5), nn.Linear(4, 2))
    assert "Linear(in_features=5)" in failing(Task(net), (torch.rand(4, 3), LABELS))
