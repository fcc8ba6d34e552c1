"""The processes of a run, and everything that they say to each other: the only collectives.

What is said between processes is small and lives in the memory of the CPU, so it goes over gloo
and waits for no device; gradients are averaged where they are. Every call has a name, which is what
an error says when somebody did not come. All ranks make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lightkit.distributed.env import LaunchEnv

if TYPE_CHECKING:
    from lightkit.distributed.processes import ProcessRanks

T = TypeVar("T")
#: Processes that wait for one that never comes end after so long.
TIMEOUT = timedelta(minutes=10)


class Ranks:
    """The processes of a run; by itself one process alone, which has nobody to wait for.

    Attributes:
        env: This process among them.
    """

    def __init__(self, env: LaunchEnv | None = None) -> None:
        self.env = LaunchEnv() if env is None else env

    @property
    def rank(self) -> int:
        """The number of this process among all, from 0."""
        return self.env.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.env.world_size

    @property
    def is_zero(self) -> bool:
        """Whether this process is the first: the one that prints and writes."""
        return self.env.rank == 0

    def share(self, value: T, what: str) -> T:
        """Returns rank zero's value (plain types and CPU tensors). A collective."""
        return value

    def gather(self, value: T, what: str) -> list[T]:
        """Returns everybody's value in the order of ranks, to all. A collective."""
        return [value]

    def decide(self, call: Callable[[], T], what: str) -> T:
        """Lets rank zero alone make a call. Its result, or its error, is everybody's. A collective."""
        return call()

    def exchange(self, numbers: Sequence[float], what: str) -> list[list[float]]:
        """Returns everybody's numbers, as many from each, in the order of ranks. A collective."""
        return [list(numbers)]

    def wait(self, what: str) -> None:
        """Waits until all are here. A collective."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, the same on all ranks, by their means over ranks, where they are.

        One collective for each device and type. No host sync.
        """

    def total(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over ranks, on its device. A collective without a host sync."""
        return tensor

    def stack(self, tensor: Tensor, what: str) -> Tensor:
        """Returns everybody's tensor along a new first dimension; with one process the tensor.

        A collective, on the device of the tensor and without a host sync but for the shapes.
        Gradients flow back to the ranks that the parts come from.

        Raises:
            UsageError: The shapes differ; on all ranks.
        """
        return tensor

    def copy_from_zero(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors the values that they have on rank zero, where they are. Collectives."""

    def explain(self, error: BaseException) -> BaseException:
        """Returns a `PeerError` that says who is missing for an error that only follows from it.

        Torch raises a RuntimeError in the middle of a backward when another process has ended. Any
        other error is returned as it is. No collective.
        """
        return error

    def failed(self, error: BaseException) -> None:
        """Tells the others and the launcher what ended the run of this process. No collective."""


_joined: ProcessRanks | None = None


def join(env: LaunchEnv, device: torch.device, timeout: timedelta | None = None) -> Ranks:
    """Returns the processes that a launcher started together with this one.

    The process group is opened once and ends with the program. One that is there already is used,
    and left alone.

    Args:
        env: This process among those that were started.
        device: Where it computes.
        timeout: How long the others are waited for, here and in every collective; None for ten
            minutes. The first call of a program decides.

    Raises:
        PeerError: Some of them did not come.
    """
    global _joined
    if not env.launched:
        return Ranks(env)
    if _joined is None:
        from lightkit.distributed.processes import open_processes  # one process needs none of it

        _joined = open_processes(env, device, timeout or TIMEOUT)
    _joined.begin()
    return _joined


def report(error: BaseException) -> None:
    """Tells the other processes what ends this program, if it has met them. No collective."""
    if _joined is not None:
        _joined.failed(error)


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this rank has of a tensor, sharing its memory; all of it if it is not sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
