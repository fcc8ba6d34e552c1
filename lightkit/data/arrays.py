"""Arrays and data frames as a data set of tensors."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightkit.errors import DataError

_log = logging.getLogger("lightkit")
_said = False  # that numbers were shortened; once per process


def as_dataset(X: Any, y: Any = None) -> TensorDataset:  # noqa: N803  the field's name
    """Returns a data set of tensors on the CPU, or where the tensors are.

    Numbers of 64 bits become float32, which torch computes in, and that is said once. Whole numbers
    stay as they are. Memory of arrays and tensors is shared where the type stays. Rows belong
    together by their place, whatever a data frame has as its index.

    Args:
        X: The inputs, one row per sample: a NumPy array, a tensor, a data frame or series of pandas
            or anything else with ``to_numpy``, or a list of numbers.
        y: The targets, likewise, as many as there are samples; None for none.

    Returns:
        A data set whose samples are ``(x, y)``, or ``(x,)`` without targets.

    Raises:
        DataError: Something that is not numeric (the column is named), rows of different lengths,
            no samples, different numbers of them, or frames with one index in different orders.
    """
    _check_order(X, y)
    tensors = [as_tensor(X, "X")] if y is None else [as_tensor(X, "X"), as_tensor(y, "y")]
    sizes = [len(tensor) for tensor in tensors]
    if len({*sizes}) > 1:
        raise DataError(
            f"X has {sizes[0]} samples and y has {sizes[1]}: the first dimension must be the same."
        )
    if not sizes[0]:
        raise DataError("X has no samples: its first dimension is 0.")
    return TensorDataset(*tensors)


def _check_order(X: Any, y: Any) -> None:  # noqa: N803
    """Raises where an index tells that rows at the same place do not belong together."""
    here: Any = getattr(X, "index", None)
    there: Any = getattr(y, "index", None)
    if not hasattr(here, "equals") or not hasattr(there, "equals"):  # a list's is a function
        return
    if len(here) == len(there) and not here.equals(there) and {*here} == {*there}:
        raise DataError(
            "X and y have the same index in different orders, but row by row they must belong "
            "together. If they do so by the index: y.loc[X.index]; if by their places: y.to_numpy()."
        )


def as_tensor(values: Any, name: str) -> Tensor:
    """Returns numbers as a tensor whose first dimension is that of the samples.

    Args:
        values: As for `as_dataset`.
        name: What they are called in errors.

    Raises:
        DataError: As by `as_dataset`.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        tensor = _from_array(_as_array(values, name), name)
    if tensor.ndim == 0:
        raise DataError(f"{name} is a single number; one row per sample is needed.")
    # Their sum is nan first, without memory for a mask; both wait where they are on a device.
    if tensor.is_floating_point() and tensor.sum().isnan() and tensor.isnan().any():
        _warn_of_missing(tensor, values, name)
    return _shortened(tensor, name)


def _warn_of_missing(tensor: Tensor, values: Any, name: str) -> None:
    missing, columns = tensor.isnan(), list(getattr(values, "columns", ()))
    holes = [f"{column!r}" for i, column in enumerate(columns) if missing[:, i].any()]
    _log.warning(
        "%s has %d missing values (nan)%s, and one of them makes the loss nan. Fill them (fillna) "
        "or drop their rows (dropna), unless the network or the loss knows of them.",
        name,
        int(missing.sum()),
        f" in {', '.join(holes[:5])}{' and more' if holes[5:] else ''}" if holes else "",
    )


def is_array(values: Any) -> bool:
    """Tells whether `as_tensor` is meant for it: a tensor, an array, a data frame or a series."""
    return isinstance(values, Tensor) or hasattr(values, "__array__") or _is_numbers(values)


def _is_numbers(values: Any) -> bool:
    """Tells whether it is a list of numbers, or of such lists."""
    while isinstance(values, list) and values:
        values = values[0]
    return isinstance(values, (int, float))


def _as_array(values: Any, name: str) -> Any:
    """Returns a NumPy array of what is no tensor."""
    import numpy

    if hasattr(values, "columns") and hasattr(values, "to_numpy"):
        return _from_frame(values, name)
    if hasattr(values, "toarray") and hasattr(values, "nnz"):
        raise DataError(f"{name} is a sparse matrix ({type(values).__name__}). Give X.toarray().")
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
        raise DataError(
            f"{name} is a {type(values).__name__} of tensors. Give torch.stack({name}); for several "
            f"inputs a Dataset whose samples are ((a, b), y)."
        )
    if isinstance(values, (str, bytes, dict, set)) or callable(getattr(values, "__next__", None)):
        raise DataError(
            f"{name} is of type {type(values).__name__}. Give an array, a tensor, a data frame or "
            f"a list of numbers; for anything else write a Dataset and a DataLoader."
        )
    try:
        return numpy.asarray(values)
    except ValueError:
        raise DataError(
            f"The rows of {name} have different lengths, so they are no array. Pad them, or write "
            f"a Dataset and give the DataLoader a collate_fn."
        ) from None


def _from_frame(frame: Any, name: str) -> Any:
    """Returns the numbers of a data frame, whose columns may have several numeric types."""
    import numpy

    if len({*frame.columns}) < len(frame.columns):
        raise DataError(f"{name} has several columns of one name: {[*frame.columns]}. Rename them.")
    columns = {column: numpy.asarray(frame[column]) for column in frame.columns}
    wrong = [column for column, array in columns.items() if array.dtype.kind not in "biuf"]
    if wrong:
        column = wrong[0]
        others = f" (and {len(wrong) - 1} more: {wrong[1:4]})" if wrong[1:] else ""
        raise DataError(
            f"Column {column!r} of {name} is not numeric{others}: {_seen(columns[column])}. Drop it, "
            f"or make numbers of it: pandas.get_dummies({name}, columns=[{column!r}], dtype='float32')"
            f" for names, .astype('float32') or .fillna(...) for numbers kept as objects."
        )
    if not columns:
        raise DataError(f"{name} has no columns.")
    return numpy.stack([*columns.values()], axis=1)


def _from_array(array: Any, name: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        advice = (
            "Number the classes, for example with pandas.factorize(y)[0]"
            if name == "y"
            else "Make numbers of it, for example with pandas.get_dummies"
        )
        raise DataError(f"{name} is not numeric: {_seen(array)}. {advice}.")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # long doubles, unknown to torch
        array = array.astype("float64")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has no tensors that may only be read, nor any that run back
    return torch.from_numpy(array)


def _seen(array: Any) -> str:
    """Returns the type of an array and the first value that is no number."""
    for value in array.ravel()[:1000]:
        if not isinstance(value, (int, float)):
            return f"it holds {value!r:.40} ({array.dtype})"
    return f"it is of type {array.dtype}"


def _shortened(tensor: Tensor, name: str) -> Tensor:
    """Returns float32 for float64, and says so once."""
    global _said
    if tensor.dtype != torch.float64:
        return tensor
    if not _said:
        _said = True
        _log.info(
            "%s is float64 and becomes float32, as the weights of networks are; so does all that "
            "follows. A data set and loader of your own keep their types.",
            name,
        )
    return tensor.float()
