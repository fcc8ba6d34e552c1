"""How two trees of plain things and tensors differ, bit for bit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def compare(one: Any, two: Any, name: str, ignore: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the names below ``name`` that differ, and how: "3 of 8 numbers differ, ...".

    Args:
        one: What the run has that was never stopped.
        two: What the resumed run has.
        name: What both are called.
        ignore: Names that may differ, as patterns of `fnmatch`.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
        return
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in {**one, **two}:
            if key in one and key in two:
                yield from compare(one[key], two[key], f"{name}.{key}", ignore)
            elif not any(fnmatch.fnmatchcase(f"{name}.{key}", p) for p in ignore):
                yield f"{name}.{key}", f"only in the {'resumed' if key in two else 'whole'} run"
    elif isinstance(one, Tensor) and isinstance(two, Tensor):
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            yield name, f"{_shape(one)} in the whole run, {_shape(two)} in the resumed one"
        elif not torch.equal(one.nan_to_num(), two.nan_to_num()) or not torch.equal(
            one.isnan(), two.isnan()
        ):
            yield name, _apart(one, two)
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        if len(one) != len(two):
            yield name, f"{len(one)} entries in the whole run, {len(two)} in the resumed one"
        for i, (a, b) in enumerate(zip(one, two, strict=False)):
            found = [*compare(a, b, f"{name}.{i}", ignore)]
            yield from found
            if found and isinstance(a, (int, float)):
                break  # of many numbers the first is enough
    elif one != two and not (one != one and two != two):
        numbers = isinstance(one, (int, float)) and isinstance(two, (int, float))
        apart = f" (apart by {abs(one - two):.3g})" if numbers else ""
        yield name, f"{_short(one)} in the whole run, {_short(two)} in the resumed one{apart}"


def _apart(one: Tensor, two: Tensor) -> str:
    """Says by how much two tensors of one shape differ."""
    different = one.ne(two) & ~(one.isnan() & two.isnan())
    count = int(different.sum())
    wide = torch.complex128 if one.is_complex() else torch.float64
    most = float((one.to(wide) - two.to(wide)).abs().nan_to_num().max())
    first = [_short(complex(t[different][0]).real) for t in (one, two)]
    return (
        f"{count} of {one.numel()} numbers differ, by up to {most:.3g} "
        f"(the first: {first[0]} in the whole run, {first[1]} in the resumed one)"
    )


def _short(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else f"{value!r:.60}"


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{[*tensor.shape]}"
