"""The sums of one logged name, against sums by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from lightkit.columns import Column, reduction, scalar
from lightkit.errors import LoggingError


def filled(*windows, **options):
    """Returns a column into which windows of (value, weight) were folded."""
    column = Column("x", **options)
    for window in windows:
        column.fold([v for v, _ in window], [w for _, w in window])
    return column


def test_means_are_weighted_over_the_window_and_over_all():
    column = filled([(1.0, 4), (2.0, 4)], [(8.0, 2), (4.0, 0)])
    assert column.window == 8.0
    assert column.total == (4 + 8 + 16) / 10
    assert column.folded == [8.0, 4.0]
    assert (column.values, column.weights) == ([], [])


def test_a_mean_without_weight_is_nan():
    assert math.isnan(filled([(1.0, 0)]).total)


def test_means_are_exact_over_many_windows():
    column = filled(*([(0.1, 3), (0.7, 1)] for _ in range(1000)))
    assert column.total == pytest.approx(0.25, rel=1e-14)


@pytest.mark.parametrize(("reduce", "total"), [("sum", 6.0), ("min", -1.0), ("max", 5.0)])
def test_other_reductions(reduce, total):
    column = filled([(2.0, 9), (5.0, 9)], [(-1.0, 9)], reduce=reduce)
    assert column.window == -1.0
    assert column.total == total


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max", "std", "running:9"])
def test_nan_is_never_lost(reduce, values):
    both = filled([(v, 1) for v in values], reduce=reduce)
    assert math.isnan(both.total)
    apart = filled(*([(v, 1)] for v in values), reduce=reduce)
    assert math.isnan(apart.total)


def test_sums_beyond_the_range_are_infinite():
    assert filled([(1e308, 1), (1e308, 1)], reduce="sum").total == math.inf
    assert math.isnan(filled([(math.inf, 1), (-math.inf, 1)]).total)


def test_names_of_curves():
    assert (Column("x").step_name, Column("x").epoch_name) == ("x", "x")
    both = Column("x", on_step=True, on_epoch=True)
    assert (both.step_name, both.epoch_name) == ("x_step", "x_epoch")


def test_a_value_changed_in_place_is_noticed():
    column = Column("x")
    column.values = [torch.ones(()), 1.0]
    column.check_unchanged()
    column.values[0].zero_()
    with pytest.raises(LoggingError, match="'x' was changed in place"):
        column.check_unchanged()


def test_the_state_is_plain_and_complete():
    column = filled([(1.0, 4)], prog_bar=True, on_epoch=True)
    column.returned = True
    column.values, column.weights = [torch.tensor(3.0), 5.0], [torch.tensor(2), 2]
    file = io.BytesIO()
    torch.save([column.state_dict(), column.window_state()], file)
    file.seek(0)
    state, window = torch.load(file, weights_only=True)
    copy = Column.from_state(state)
    copy.set_window(window)
    copy.check_unchanged()
    assert copy.live == 5.0
    assert copy.returned
    for one in (column, copy):
        one.fold([3.0, 5.0], [2.0, 2.0])
    assert copy.state_dict() == column.state_dict()
    assert copy.total == (4 + 6 + 10) / 8


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mean", "mean"), ("max", "max"), (max, "max"), (torch.amax, "max"), (torch.min, "min"),
        (np.mean, "mean"), (sum, "sum"), (torch.sum, "sum"), (torch.std, "std"), ("last", "last"),
        ("running:50", "running:50"),
    ],
)  # fmt: skip
def test_reductions_by_name_and_by_function(given, name):
    assert reduction("x", given) == name


@pytest.mark.parametrize("given", ["median", None, 3, "running", "running:0", "running:-2"])
def test_unknown_reductions(given):
    with pytest.raises(
        LoggingError, match="allowed are 'mean', 'sum', 'min', 'max', 'std', 'last'"
    ):
        reduction("x", given)


def test_a_running_mean_without_its_number():
    with pytest.raises(LoggingError, match="Did you mean 'running:50'"):
        reduction("x", "running")


def test_the_deviation_is_that_of_torch_over_window_and_epoch():
    """S1-07."""
    data = torch.randn(90, dtype=torch.float64) + 1e6  # far from 0: no cancellation
    values = data.tolist()
    column = filled(*([(v, 7) for v in values[i : i + 30]] for i in (0, 30, 60)), reduce="std")
    assert column.total == pytest.approx(float(data.std()), rel=1e-9)
    assert column.window == pytest.approx(float(data[60:].std()), rel=1e-9)
    assert math.isnan(filled([(2.0, 1)], reduce="std").total)  # as torch.std of one value


def test_the_deviation_beyond_the_range_is_infinite():
    assert filled([(1e200, 1), (3e200, 1)], reduce="std").total == math.inf
    assert filled([(1e200, 1)], [(3e200, 1)], reduce="std").total == math.inf


def test_the_last_value():
    column = filled([(2.0, 1), (3.0, 1)], [(0.1, 3), (9.0, 0)], reduce="last")
    assert column.total == column.window == 0.1  # what weighs nothing is no value


def test_a_running_mean_is_that_of_the_last_values_by_their_weights():
    """S1-07."""
    column = filled([(1.0, 1), (2.0, 1)], [(4.0, 3)], reduce="running:2")
    assert column.total == column.window == (2 + 4 * 3) / 4
    longer = filled([(1.0, 1), (2.0, 1)], [(4.0, 3)], reduce="running:50")
    assert longer.total == (1 + 2 + 12) / 5


@pytest.mark.parametrize("reduce", ["std", "last", "running:3"])
def test_the_state_of_other_reductions_is_plain_and_complete(reduce):
    column = filled([(1.0, 4), (5.0, 2)], [(2.5, 1)], reduce=reduce)
    file = io.BytesIO()
    torch.save(column.state_dict(), file)
    file.seek(0)
    copy = Column.from_state(torch.load(file, weights_only=True))
    for one in (column, copy):
        one.fold([3.0, 5.0], [2.0, 2.0])
    assert copy.state_dict() == column.state_dict()


def test_one_element_is_a_scalar():
    assert scalar("x", torch.ones(1, 1)).shape == ()
    with pytest.raises(LoggingError, match=r"shape \(2,\)"):
        scalar("x", torch.ones(2))
