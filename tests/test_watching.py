"""Which operation made the first nan or inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightkit.errors import NonFiniteError
from lightkit.watching import Values, unusual

NET = nn.Linear(2, 2)


def found(call: Any, **options: Any) -> dict[str, str]:
    values = Values(NET, **options)
    with values:
        call()
    return values.found


def test_what_tensors_hold() -> None:
    assert unusual() == ""
    assert unusual(torch.ones(2), torch.zeros(2).long()) == ""
    assert unusual(torch.tensor([1.0, float("inf")])) == "inf"
    assert unusual(torch.tensor([float("-inf")]), torch.tensor(float("nan"))) == "nan"
    assert unusual(torch.empty(2, device="meta"), nn.LazyLinear(1).weight) == ""


def test_the_first_of_each_is_named_with_what_went_in() -> None:
    def steps() -> None:
        x = torch.tensor([0.0, 4.0])
        y = x.log()  # -inf
        (y - y).sum()  # nan

    told = found(steps)
    assert list(told) == ["inf", "nan"]
    assert told["inf"].splitlines()[0] == "log made the first inf"
    assert "test_watching.py:" in told["inf"]
    assert "y = x.log()  # -inf" in told["inf"]
    assert told["inf"].splitlines()[-1] == "  input 1  float32 (2,) from 0 to 4"
    assert told["nan"].startswith("sub made the first nan")


def test_a_module_of_the_task_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Divides()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    class Divides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x

    task = Root()
    with (values := Values(task)):
        task(torch.zeros(2))
    assert values.found["nan"].startswith("div made the first nan, in norm: Divides()")


def test_what_is_meant_so_is_not_blamed() -> None:
    def masked() -> None:
        scores = torch.rand(2, 2).masked_fill(torch.eye(2).bool(), float("-inf"))
        scores.softmax(1)
        torch.full((2,), float("inf"))
        torch.empty(1000).fill_(float("nan"))
        torch.where(torch.eye(2).bool(), torch.rand(2, 2), float("-inf"))

    assert found(masked) == {}


def test_an_operation_in_place_is_described_by_what_went_in() -> None:
    told = found(lambda: torch.tensor([-1.0, 1.0]).log_())
    assert "  input 1  float32 (2,) from -1 to 1" in told["nan"]


def test_values_that_are_bad_before_are_not_blamed_on_what_follows() -> None:
    bad = torch.tensor([float("nan")])
    assert found(lambda: bad + 1) == {}


def test_for_the_debugger_it_raises_where_it_happens() -> None:
    with pytest.raises(NonFiniteError, match="log made the first nan") as raised:
        found(lambda: torch.tensor(-1.0).log(), raising=True)
    names = [entry.name for entry in raised.traceback]
    assert "<lambda>" in names
