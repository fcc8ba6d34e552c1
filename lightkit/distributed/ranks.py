"""The processes of a run, and everything that they say to each other: the only collectives.

What is said between processes is small and lives in the memory of the CPU, so it goes over gloo
and waits for no device; gradients are averaged where they are. Every call has a name, which is what
an error says when somebody did not come. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.distributed.env import LaunchEnv
from lightkit.errors import PeerError

T = TypeVar("T")
#: Processes that wait for one that never comes end after so long.
TIMEOUT = timedelta(minutes=10)
_PIECE = 64 * 2**20  # bytes that are copied together before they are sent


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

    def copy_from_zero(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors the values that they have on rank zero, where they are. Collectives."""


class ProcessRanks(Ranks):
    """Several processes, or one that a launcher started, over torch's process group."""

    def __init__(self, env: LaunchEnv, control: Any, store: Any = None) -> None:
        super().__init__(env)
        self._control, self._store = control, store

    def share(self, value: T, what: str) -> T:
        """See `Ranks.share`."""
        held = [value if self.is_zero else None]
        with self._named(what):
            torch.distributed.broadcast_object_list(held, src=0, group=self._control)
        return held[0]  # type: ignore[return-value]

    def gather(self, value: T, what: str) -> list[T]:
        """See `Ranks.gather`."""
        found: list[Any] = [None] * self.world_size
        with self._named(what):
            torch.distributed.all_gather_object(found, value, group=self._control)
        return found

    def decide(self, call: Callable[[], T], what: str) -> T:
        """See `Ranks.decide`."""
        result: Any = None
        error: Exception | None = None
        if self.is_zero:
            try:
                result = call()
            except Exception as raised:  # noqa: BLE001  everybody raises it
                error = raised
        result, said = self.share((result, None if error is None else (type(error), error.args)), what)
        if error is not None:
            raise error
        if said is not None:
            kind, arguments = said
            raise kind(*arguments)
        return result  # type: ignore[no-any-return]

    def exchange(self, numbers: Sequence[float], what: str) -> list[list[float]]:
        """See `Ranks.exchange`."""
        own = torch.tensor(list(numbers), dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._named(what):
            torch.distributed.all_gather(found, own, group=self._control)
        return torch.stack(found).tolist()  # type: ignore[no-any-return]  # memory of the CPU

    def wait(self, what: str) -> None:
        """See `Ranks.wait`."""
        with self._named(what):
            torch.distributed.barrier(group=self._control)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.average`."""
        for group in _pieces(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self._named("average of gradients"):
                torch.distributed.all_reduce(flat)
            _fill(group, flat.div_(self.world_size))

    def total(self, tensor: Tensor) -> Tensor:
        """See `Ranks.total`."""
        summed = tensor.clone()
        with self._named("sum over ranks"):
            torch.distributed.all_reduce(summed)
        return summed

    def copy_from_zero(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.copy_from_zero`."""
        for group in _pieces(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self._named("copy from rank 0"):
                torch.distributed.broadcast(flat, src=0)
            _fill(group, flat)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Says what a collective was for when it fails."""
        try:
            yield
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank} waited in {what!r}: {error}") from error


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields tensors of one device and type together, so many as fit into one message."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        group = alike.setdefault((tensor.device, tensor.dtype), [])
        group.append(tensor)
        if sum(t.nbytes for t in group) > _PIECE:
            yield alike.pop((tensor.device, tensor.dtype))
    yield from alike.values()


def _fill(tensors: list[Tensor], flat: Tensor) -> None:
    """Copies the parts of a flat tensor into tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    shaped = [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


_joined: Ranks | None = None


def join(env: LaunchEnv, device: torch.device) -> Ranks:
    """Returns the processes that a launcher started together with this one.

    The process group is opened once and ends with the program. One that is there already is used,
    and left alone.
    """
    global _joined
    if _joined is None and env.launched:
        _joined = _open(env, device)
    return Ranks(env) if _joined is None else _joined


def _open(env: LaunchEnv, device: torch.device) -> Ranks:
    dist = torch.distributed
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        where = {"host_name": env.master_address, "port": env.master_port}
        server = env.rank == 0 and not env.agent_store
        store = dist.TCPStore(**where, world_size=env.world_size, is_master=server, timeout=TIMEOUT)
        # Named after the attempt: what the one before left in the agent's store is stale.
        store = dist.PrefixStore(f"lightkit/{env.restart}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=env.rank,
            world_size=env.world_size,
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
        atexit.register(_close)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return ProcessRanks(env, control)


def _close() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
