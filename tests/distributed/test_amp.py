"""16-mixed over ranks: what overflows on one of them is skipped by all, without a word."""

from __future__ import annotations

import pytest

from tests.distributed.harness import torchrun
from tests.distributed.scenes_amp import everything

# Optimizer steps, and how many of them overflow.
STEPS = {"accumulated": (3, 2), "bf16": (6, 0)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return torchrun("tests.distributed.scenes_amp:everything", 2, tmp_path_factory.mktemp("amp"))


@pytest.fixture(scope="module")
def alone():
    return everything(world=2)


@pytest.mark.parametrize(
    "kind",
    ["plain", "clipped", "unfused", "accumulated", "weighted", "manual", "bf16", "late"],
)
def test_all_ranks_skip_the_same_steps_as_one_process(found, alone, kind):
    zero, one = (rank[kind] for rank in found)
    assert zero == one
    expected = alone[kind]
    steps, skipped = STEPS.get(kind, (6, 2))
    assert zero["steps"] == expected["steps"] == steps
    assert zero["rates"] == expected["rates"]
    if kind != "bf16":
        assert zero["scale"] == expected["scale"] == 2.0 ** (16 - skipped)
    if kind != "manual":
        assert zero["moves"] == expected["moves"] == steps - skipped
    assert zero["weights"] == pytest.approx(expected["weights"], rel=1e-6)
    if expected["norm"] is not None:
        assert zero["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def test_the_schedule_of_the_late_one_is_that_of_the_others(found):
    for rank in found:
        assert rank["late"] == rank["plain"]
