"""Reads logged values: as floats for rows, as tensors for callbacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightkit.recording import Recorder


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Returns scalars as floats: one host sync for each device they are on."""
    if set(map(type, values)) == {Tensor} and len({v.dtype for v in values}) == 1:  # type: ignore[union-attr]
        with contextlib.suppress(RuntimeError):  # on several devices
            numbers: list[float] = torch.stack(values).tolist()  # type: ignore[arg-type] # host sync
            return numbers
    out: list[float] = [0.0] * len(values)
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            indices, tensors = groups.setdefault((value.device, value.dtype), ([], []))
            indices.append(i)
            tensors.append(value)
        else:
            out[i] = value
    devices: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (device, _), (indices, tensors) in groups.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        places, parts = devices.setdefault(device, ([], []))
        places += indices
        parts.append(torch.stack(tensors).to(wide))
    for places, parts in devices.values():
        numbers = torch.cat(parts).tolist()  # host sync: the one of a flush
        for i, number in zip(places, numbers, strict=True):
            out[i] = number
    return out


class CallbackMetrics(Mapping[str, Tensor]):
    """``trainer.callback_metrics``: the last logged values, and the means of what has ended.

    Values are detached tensors without a dimension; one that did not change is the same object.
    Reading never flushes, synchronises or communicates.
    """

    def __init__(self) -> None:
        self._log: Recorder | None = None
        self.results: dict[str, Tensor] = {}

    def read_from(self, log: Recorder) -> None:
        """Lets it show what ``log`` is given from now on."""
        self._log = log

    def __getitem__(self, name: str) -> Tensor:
        column = self._log.column(name) if self._log is not None else None
        if column is None:
            return self.results[name]
        value = column.live
        if not isinstance(value, Tensor):
            assert value is not None
            value = column.live = torch.tensor(float(value))
        return value

    def __iter__(self) -> Iterator[str]:
        yield from self.results
        for name in self._log.live_names() if self._log is not None else ():
            if name not in self.results:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Tensor]:
        """Returns a dict of what it holds now."""
        return dict(self)

    def __repr__(self) -> str:
        return repr({name: self[name] for name in self})
