"""Arrays, tensors, frames and lists as tensors (S0-15, S4-05)."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lightkit.data import arrays
from lightkit.data.arrays import as_dataset, as_tensor, is_array
from lightkit.errors import DataError

X = np.arange(12.0, dtype="float32").reshape(4, 3)


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch):
    monkeypatch.setattr(arrays, "_said", False)


def test_S0_15_pairs_become_a_data_set_over_the_same_memory():
    y = np.array([0, 1, 0, 1])
    data = as_dataset(X, y)
    assert len(data) == 4
    assert torch.equal(data[1][0], torch.tensor([3.0, 4.0, 5.0]))
    assert data[1][1].dtype == torch.int64
    assert data.tensors[0].data_ptr() == X.ctypes.data
    assert len(as_dataset(X).tensors) == 1


def test_float64_becomes_float32_and_that_is_said_once(caplog):
    caplog.set_level(logging.INFO, "lightkit")
    one, two = as_dataset(X.astype("float64"), X.astype("float64")).tensors
    assert one.dtype == two.dtype == torch.float32
    assert as_tensor(torch.zeros(2, dtype=torch.float64), "X").dtype == torch.float32
    assert [r.message.split(",")[0] for r in caplog.records] == ["X is float64 and becomes float32"]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "float16", "float32"])
def test_other_numbers_keep_their_type(dtype):
    assert as_tensor(X.astype(dtype), "X").numpy().dtype == dtype


def test_what_torch_has_no_tensor_for_is_copied():
    read_only = X.copy()
    read_only.setflags(write=False)
    for array in (read_only, X[::-1], X.astype(">f4"), X.astype(np.longdouble)):
        assert np.array_equal(as_tensor(array, "X").numpy(), array)
    assert as_tensor(read_only, "X").data_ptr() != read_only.ctypes.data


def test_lists_of_numbers_and_tensors_that_learn():
    assert as_tensor([[1.0, 2], [3, 4]], "X").shape == (2, 2)
    assert not as_tensor(torch.ones(2, requires_grad=True), "X").requires_grad
    assert is_array([[1, 2]])
    assert is_array(X)
    assert not is_array([(X, X)])
    assert not is_array("abc")
    assert not is_array([])


def test_S4_05_frames_and_series():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["a", "b", "c"], index=[9, 7, 5, 3])
    whole = pandas.DataFrame({"a": [1, 2], "b": [True, False]})
    assert torch.equal(as_tensor(frame, "X"), torch.from_numpy(X))
    assert as_tensor(frame["b"], "y").tolist() == [1, 4, 7, 10]
    assert as_tensor(whole, "X").dtype == torch.int64
    assert as_tensor(whole.assign(c=0.5), "X").tolist() == [[1, 1, 0.5], [2, 0, 0.5]]
    nullable = pandas.DataFrame({"n": pandas.array([1, 2], dtype="Int64")})
    assert as_tensor(nullable, "X").dtype == torch.int64


@pytest.mark.parametrize(
    ("column", "seen"),
    [(["Bern", "Rome"], "'Bern'"), ("2020-01-01", "2020"), ([1, None], "None")],
)
def test_a_column_that_is_not_numeric_is_named(column, seen):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0], "city": column})
    if column == "2020-01-01":
        frame["city"] = pandas.Timestamp(column)
    elif None in column:
        frame["city"] = frame["city"].astype(object).where(frame["city"].notna(), None)
    with pytest.raises(DataError, match=f"Column 'city' of X is not numeric.*{seen}.*get_dummies"):
        as_tensor(frame, "X")


def test_rows_belong_together_by_their_places():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0, 3.0]})
    turned = pandas.Series([30, 10, 20], index=[2, 0, 1])
    with pytest.raises(DataError, match=r"different orders.*y.loc\[X.index\].*y.to_numpy"):
        as_dataset(frame, turned)
    assert as_dataset(frame, turned.loc[frame.index]).tensors[1].tolist() == [10, 20, 30]
    for y in (turned.to_numpy(), turned.to_list(), turned.reset_index(drop=True)):
        assert as_dataset(frame, y).tensors[1].tolist() == [30, 10, 20]
    as_dataset(frame.set_axis([7, 8, 9], axis=0), turned)  # a frame filtered, a series made anew


def test_columns_of_one_name_are_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="X has several columns of one name"):
        as_tensor(pandas.DataFrame([[1.0, 2.0]], columns=["a", "a"]), "X")


def test_missing_values_are_told_with_their_column(caplog):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": [np.nan, 1.0]})
    as_tensor(frame, "X")
    assert "X has 1 missing values (nan) in 'b'" in caplog.text
    as_tensor(np.array([np.nan, np.nan]), "y")
    assert "y has 2 missing values (nan), and" in caplog.text
    caplog.clear()
    as_tensor(np.array([np.inf, -np.inf]), "y")
    assert "missing" not in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["cat", "dog"]), "y is not numeric: it holds .*'cat'.*pandas.factorize"),
        ("abc", "y is of type str. Give an array"),
        ({"a": X}, "y is of type dict.*write a Dataset"),
        ((n for n in (1, 2)), "y is of type generator"),
        ([[1.0, 2.0], [1.0]], "rows of y have different lengths"),
        ([torch.zeros(2)], "list of tensors. Give torch.stack.*several inputs a Dataset"),
        (3.0, "y is a single number"),
        (np.array([1 + 2j]), "y is not numeric"),
    ],
)
def test_what_cannot_be_used_says_what_to_write(values, message):
    with pytest.raises(DataError, match=message):
        as_tensor(values, "y")


def test_numbers_of_samples_must_agree():
    with pytest.raises(DataError, match="X has 4 samples and y has 3"):
        as_dataset(X, [1, 2, 3])
    with pytest.raises(DataError, match="no samples"):
        as_dataset(X[:0], [])
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(DataError, match="sparse matrix.*toarray"):
        as_dataset(sparse.csr_matrix(X))
