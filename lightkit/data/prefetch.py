"""The next batch on its way to the device while a step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lightkit import rng
from lightkit.data.loaders import generators
from lightkit.data.move import with_members


class Lane(Protocol):
    """Brings batches to the device beside the work of the steps."""

    def send(self, batch: Any) -> Any:
        """Returns the batch as it will be on the device; its copies are only begun."""

    def arrive(self) -> None:
        """Lets what is given to the device from now on wait for the copies; waits for nothing."""


def lane_of(device: torch.device) -> Lane | None:
    """Returns what brings batches to a device beside its work; None where nothing can."""
    return SideStream(device) if device.type == "cuda" else None


class SideStream:
    """A stream of a CUDA device for copies out of pinned memory.

    The memory of a copy is that of the stream of the steps, as if the steps had asked for it. The
    copy begins behind all that was given to that stream before, so nobody uses the memory any
    more, and the steps wait for the copy before they use it. What is dropped may be given to
    others at once then, and no more memory is held than for one batch ahead.

    Args:
        device: The device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, batch: Any) -> Any:
        """Returns the batch with what lay in pinned memory on the device, once it has arrived."""
        copies: list[tuple[Tensor, Tensor]] = []

        def begun(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu" or not tensor.is_pinned():
                return tensor  # a copy would wait for the device
            copy = torch.empty_like(tensor, device=self._device)
            copies.append((copy, tensor))
            return copy

        sent = with_tensors(batch, begun)
        if copies:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for copy, tensor in copies:
                    copy.copy_(tensor, non_blocking=True)
        return sent

    def arrive(self) -> None:
        """Lets the stream of the steps wait for all copies that were begun."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def with_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a batch with other tensors, in any nesting; objects that move by themselves stay."""
    if type(batch) is Tensor:
        return change(batch)
    if isinstance(batch, Tensor) or callable(getattr(batch, "to", None)):
        return batch
    return with_members(batch, lambda member: with_tensors(member, change))


class Ahead:
    """Iterates over a pass one batch ahead: while one is used, the next one is on its way.

    What goes wrong with a batch, and the end, comes when that batch is asked for.

    Args:
        iterator: The pass.
        lane: What brings batches to the device.
        most: Batches that are read at most; None for all.
        drawing: The loader, where reading draws from random states; None where it does not.

    Attributes:
        before: The random states in which the batch ahead was read; None where it does not matter.
    """

    _persistent_workers = False  # so that whoever leaves the pass calls `_shutdown_workers`

    def __init__(
        self, iterator: Any, lane: Lane, most: int | None = None, drawing: Any = None
    ) -> None:
        self._iterator, self._lane, self._left, self._drawing = iterator, lane, most, drawing
        self._batch: Any = None
        self._error: Exception | None = None
        self._loaded = False
        self.before: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._loaded:
            self._load()
        batch, error = self._batch, self._error
        self._batch = self._error = None
        self._loaded = False
        if error is not None:
            raise error
        self._lane.arrive()
        self._load()
        return batch

    def begin(self, before: dict[str, Any] | None) -> None:
        """Reads the first batch of a pass that goes on, as it was read when that was left.

        Args:
            before: What `before` was then.
        """
        if before is not None:
            rng.set_rng_state(before["rng"])
            for generator, state in zip(
                generators(self._drawing), before["generators"], strict=False
            ):
                generator.set_state(state)
        self._load()

    def _load(self) -> None:
        """Reads the next batch and sends it on its way, unless the last one was read."""
        self._loaded, self.before = True, None
        if self._left == 0:
            self._error = StopIteration()
            return
        if self._left is not None:
            self._left -= 1
        if self._drawing is not None:
            own = [generator.get_state() for generator in generators(self._drawing)]
            self.before = {"rng": rng.rng_state(), "generators": own}
        try:
            self._batch = self._lane.send(next(self._iterator))
        except Exception as error:  # noqa: BLE001  raised where this batch is asked for
            self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)  # its workers

    def _shutdown_workers(self) -> None:
        """Lets go of the batch ahead, once it has arrived, and ends workers that do not stay."""
        self._lane.arrive()
        self._batch = self._error = None
        end = getattr(self._iterator, "_shutdown_workers", None)
        if end is not None and not getattr(self._iterator, "_persistent_workers", False):
            end()
