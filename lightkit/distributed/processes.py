"""Several processes over torch's process group. Imported only where a launcher started them."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.distributed import told
from lightkit.distributed.board import FOLLOWED, PATIENCE, Board, connect
from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.ranks import TIMEOUT, Ranks
from lightkit.distributed.watchdog import TICK, Watchdog
from lightkit.errors import LightkitError, PeerError, UsageError, ranks_named

T = TypeVar("T")
#: Heartbeats that a process may miss before it counts as gone.
_BEATS = 4
#: Seconds that a process which only follows another's end leaves to it.
_AFTER_OTHERS = 0.5
#: Seconds that connections may take to close after an error.
_CLOSING = 5.0
#: What torch's transports say when another process has gone.
_TRANSPORT = re.compile(r"gloo/|NCCL (error|comm)|Connection (closed|reset) by peer")
_LATE = re.compile(r"[Tt]imed? ?out")
#: Numbers that go along with the name of a collective.
_HEAD = 30
_NAME = 200  # bytes of a name that others are told
_PIECE = 64 * 2**20  # bytes that are copied together before they are sent


class ProcessRanks(Ranks):
    """Several processes, or one that a launcher started, over torch's process group.

    Args:
        env: This process among them.
        control: The process group for what lives in the memory of the CPU.
        board: Where it is read who is missing; None where there is no store for it.
        device: Where this process computes.
        timeout: How long a collective waits for one who does not come.
    """

    def __init__(
        self,
        env: LaunchEnv,
        control: Any,
        board: Board | None = None,
        device: torch.device | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        super().__init__(env)
        self._control, self._board, self._timeout = control, board, timeout
        self._count = 0
        self._inside: tuple[int, str] | None = None
        self._ended_by: BaseException | None = None
        self._pid = os.getpid()
        self._watchdog: Watchdog | None = None
        if board is not None:
            where = torch.device("cpu") if device is None else device
            self._watchdog = Watchdog(env.rank, board, lambda: self._inside, self._missing, where)

    def begin(self) -> None:
        """Forgets how an earlier run of this program ended."""
        self._ended_by = None
        if self._board is not None and self._watchdog is not None:
            self._board.recover()
            self._watchdog.begin()

    def share(self, value: T, what: str) -> T:
        """See `Ranks.share`."""
        packed = _packed(value) if self.is_zero else (b"", "")
        result: T = self._unpack(self._send(packed, what), 0, what)
        return result

    def gather(self, value: T, what: str) -> list[T]:
        """See `Ranks.gather`."""
        data, error = _packed(value)
        text = data or error.encode()
        heads = self._meet(what, [len(text), error != ""])
        sizes = [int(size) for size, _ in heads]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(text)] = _bytes(text)
        found = self._all(own, what)
        parts = [part[:size].numpy().tobytes() for part, size in zip(found, sizes, strict=True)]
        failed = [bool(head[1]) for head in heads]
        texts = [(b"", p.decode()) if f else (p, "") for p, f in zip(parts, failed, strict=True)]
        return [self._unpack(each, rank, what) for rank, each in enumerate(texts)]

    def decide(self, call: Callable[[], T], what: str) -> T:
        """See `Ranks.decide`."""
        result: T | None = None
        error: Exception | None = None
        if self.is_zero:
            try:
                result = call()
            except Exception as raised:  # noqa: BLE001  everybody raises it
                error = raised
        packed = _packed((result, None if error is None else _twin(error)))
        found = self._send(packed, what)
        if error is not None:
            raise error
        result, raised_there = self._unpack(found, 0, what)
        if raised_there is not None:
            raise told.mark(raised_there)
        return result

    def _send(self, packed: tuple[bytes, str], what: str) -> tuple[bytes, str]:
        """Returns what rank zero has packed, to all."""
        data, error = packed
        text = data or error.encode()
        size, failed = self._meet(what, [len(text), error != ""])[0]
        sent = _bytes(text) if self.is_zero else torch.empty(int(size), dtype=torch.uint8)
        with self._named(what):
            torch.distributed.broadcast(sent, src=0, group=self._control)
        text = sent.numpy().tobytes()
        return (b"", text.decode()) if failed else (text, "")

    def _unpack(self, packed: tuple[bytes, str], rank: int, what: str) -> Any:
        """Returns what a rank has packed; raises alike on all ranks where it could not."""
        data, error = packed
        if error:
            raise UsageError(
                f"{what}: rank {rank} holds what cannot be sent to other processes: {error}. "
                f"Plain types, tensors and objects that can be pickled can."
            )
        return pickle.loads(data)  # noqa: S301  another process of this very run packed it

    def exchange(self, numbers: Sequence[float], what: str) -> list[list[float]]:
        """See `Ranks.exchange`."""
        rows = self._meet(what, numbers)
        rest = list(numbers[_HEAD:])
        if not rest:
            return rows
        more = self._all(torch.tensor(rest, dtype=torch.float64), what)
        return [row + part.tolist() for row, part in zip(rows, more, strict=True)]

    def _meet(self, what: str, numbers: Sequence[float]) -> list[list[float]]:
        """Begins every collective: what is sent has one size, whatever a rank came for.

        Returns:
            The first of everybody's numbers, at most `_HEAD`.

        Raises:
            UsageError: On all ranks, where they came to different collectives. Messages of different
                sizes would have ended the processes without a word.
        """
        few = list(numbers[:_HEAD])
        head = [zlib.crc32(what.encode()), len(numbers), *few]
        own = torch.zeros(2 + _HEAD, dtype=torch.float64)
        own[: len(head)] = torch.tensor(head, dtype=torch.float64)
        rows = [row.tolist() for row in self._all(own, what)]
        if any(row[:2] != rows[0][:2] for row in rows):
            name = torch.zeros(_NAME, dtype=torch.uint8)
            text = what.encode()[:_NAME]
            name[: len(text)] = _bytes(text)
            found = self._all(name, what)
            names = [part.numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for part in found]
            raise self._parted(names)
        return [row[2 : 2 + len(few)] for row in rows]

    def _all(self, own: Tensor, what: str) -> list[Tensor]:
        """Returns everybody's tensor, all of one size."""
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        with self._named(what):
            torch.distributed.all_gather(found, own, group=self._control)
        return found

    def _parted(self, names: Sequence[str]) -> UsageError:
        """Returns the error for ranks that came to different collectives."""
        where = "; ".join(f"rank {rank} came to {name!r}" for rank, name in enumerate(names))
        return UsageError(
            f"The ranks went different ways: {where}. What all ranks do together, as "
            f"trainer.save_checkpoint, must not depend on the rank, nor on what one rank alone has."
        )

    def wait(self, what: str) -> None:
        """See `Ranks.wait`."""
        self._meet(what, ())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.average`."""
        for tensor in tensors:
            if tensor.is_sparse:  # gradients of an embedding; gloo adds them up
                with self._named("average of gradients", tells=False):
                    torch.distributed.all_reduce(tensor)
                tensor.div_(self.world_size)
        for group in _pieces([tensor for tensor in tensors if not tensor.is_sparse]):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self._named("average of gradients", tells=False):
                torch.distributed.all_reduce(flat)
            _fill(group, flat.div_(self.world_size))

    def total(self, tensor: Tensor) -> Tensor:
        """See `Ranks.total`."""
        summed = tensor.clone()
        with self._named("sum over ranks", tells=False):
            torch.distributed.all_reduce(summed)
        return summed

    def stack(self, tensor: Tensor, what: str) -> Tensor:
        """See `Ranks.stack`."""
        if self.world_size == 1:
            return tensor
        shapes = self.gather(tuple(tensor.shape), what)
        if len(set(shapes)) > 1:
            listed = "; ".join(f"rank {rank}: {shape}" for rank, shape in enumerate(shapes))
            raise UsageError(
                f"{what}: the tensors have different shapes ({listed}). Pad them to one, or return "
                f"them from predict_step, whose outputs come complete and in order."
            )
        stacked: Tensor = _Stack.apply(tensor.contiguous(), self)  # type: ignore[no-untyped-call]
        return stacked

    def copy_from_zero(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.copy_from_zero`."""
        for group in _pieces(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self._named("copy from rank 0"):
                torch.distributed.broadcast(flat, src=0)
            _fill(group, flat)

    def explain(self, error: BaseException) -> BaseException:
        """See `Ranks.explain`."""
        if not _is_transport(error):
            return error
        missing = self._missing(None, error)
        if not missing:
            return error
        return PeerError(f"rank {self.rank} waited in a collective of torch: {missing}")

    def failed(self, error: BaseException) -> None:
        """See `Ranks.failed`."""
        if error is self._ended_by:
            return
        self._ended_by, follows = error, told.follows(error)
        if self._board is not None:
            text = told.in_a_line(error)
            self._board.fail(FOLLOWED + text if follows else text)
        if follows:
            # The launcher names the first process that it sees end: let it be the guilty one.
            time.sleep(_AFTER_OTHERS)
        elif isinstance(error, Exception) and self.env.has_error_file:
            _record(error)

    def close(self, *, destroy: bool) -> None:
        """Lets go of everything with the program; never waits for long after an error.

        Args:
            destroy: Whether the process group ends as well.
        """
        if os.getpid() != self._pid:  # a forked child that ends
            return
        if self._board is not None and self._watchdog is not None:
            if self._ended_by is not None or self._board.another_failed():
                self._watchdog.closing(_CLOSING)
            else:
                self._board.leave("ended its program without an error")
        if destroy and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self._watchdog is not None:
            self._watchdog.stop()

    @contextlib.contextmanager
    def _named(self, what: str, *, tells: bool = True) -> Iterator[None]:
        """Says what a collective was for when it fails, and who did not come.

        Args:
            what: Its name.
            tells: Whether the others can read that this process has come to it.
        """
        self._count += 1
        self._inside = (self._count, what)
        if tells and self._board is not None:
            self._board.at(self._count, what)
        try:
            yield
        except RuntimeError as error:
            if not _is_transport(error):
                raise
            missing = self._missing(what, error) or error
            raise PeerError(f"rank {self.rank} waited in {what!r}: {missing}") from error
        finally:
            self._inside = None

    def _missing(self, what: str | None, error: BaseException | None = None) -> str:
        """Says who did not come to a collective, and why; "" where nothing is known.

        Args:
            what: Its name; None for one of torch's own.
            error: What it ended with, if it has.
        """
        if self._board is None:
            return ""
        before = self._board.look()
        ends = {rank: seen.end for rank, seen in before.items() if seen.end}
        guilty = {rank: end for rank, end in ends.items() if not end.startswith(FOLLOWED)}
        if guilty:
            return "; ".join(f"rank {rank} {_ending(end)}" for rank, end in guilty.items())
        time.sleep(_BEATS * TICK)
        after = self._board.look()
        silent = [r for r, seen in after.items() if seen.beat == before[r].beat and r not in ends]
        if silent:
            return f"{ranks_named(silent)} fell silent: killed, out of memory, or cut off?"
        late = _LATE.search(str(error)) is not None
        waited = f" within {self._timeout.total_seconds():.0f} s" if late else ""
        behind = [
            f"rank {rank} did not come{waited}; it was last in {seen.place!r}"
            for rank, seen in after.items()
            if seen.count < self._count or (what is not None and seen.place != what)
        ]
        return "; ".join(behind) or "; ".join(f"rank {r} {_ending(e)}" for r, e in ends.items())


class _Stack(torch.autograd.Function):
    """Everybody's tensor along a new dimension; each rank gets the sum of its gradients there."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: ProcessRanks) -> Tensor:
        ctx.ranks = ranks
        found = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
        with ranks._named("gathering of tensors", tells=False):
            torch.distributed.all_gather(found, tensor)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # a collective
        return ctx.ranks.total(grads[0])[ctx.ranks.rank], None


def _is_transport(error: BaseException) -> bool:
    """Tells whether an error is torch's, about the connections between processes."""
    mine = isinstance(error, RuntimeError) and not isinstance(error, LightkitError)
    return mine and _TRANSPORT.search(str(error)) is not None


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
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    shaped = [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


def _record(error: Exception) -> None:
    """Writes an error where torchrun reads what to show of it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    trace = error.__traceback__
    try:
        raise error  # torch takes down the exception that is under way
    except Exception:  # noqa: BLE001
        error.__traceback__ = trace
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            get_error_handler().record_exception(error)


def _packed(value: Any) -> tuple[bytes, str]:
    """Returns a value in bytes, or why that cannot be."""
    try:
        return pickle.dumps(value), ""
    except Exception as error:  # noqa: BLE001  whatever an object raises when it is pickled
        return b"", f"{type(error).__name__}: {error}"


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _twin(error: Exception) -> Exception:
    """Returns an error as other processes can raise it: itself, or a `PeerError` with its text."""
    try:
        twin = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
    except Exception:  # noqa: BLE001  a constructor that takes other arguments raises anything
        twin = None
    if type(twin) is type(error) and str(twin) == str(error):
        return error
    return PeerError(f"rank 0 ended with {type(error).__name__}: {error}")


def _ending(end: str) -> str:
    """Returns how a process ended, in words."""
    text = end.removeprefix(FOLLOWED)
    return text if text.startswith("ended ") else f"ended with {text}"


def open_processes(env: LaunchEnv, device: torch.device, timeout: timedelta) -> ProcessRanks:
    """Opens the process group, unless there is one, and a second one for what is on the CPU."""
    dist = torch.distributed
    board, ours, cuda = None, not dist.is_initialized(), device.type == "cuda"
    try:
        if ours:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=connect(env, timeout, server=env.rank == 0 and not env.agent_store),
                rank=env.rank,
                world_size=env.world_size,
                timeout=timeout,
                device_id=device if cuda else None,
            )
        control = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise PeerError(_unmet(env, timeout, error)) from error
    if env.world_size > 1:
        with contextlib.suppress(RuntimeError):  # a group that was opened by other means
            board = Board(env, timeout if ours else timedelta(seconds=PATIENCE))
    ranks = ProcessRanks(env, control, board, device, timeout)
    atexit.register(ranks.close, destroy=ours)
    if ours:
        told.install(env.rank, ranks.failed)
    ranks.wait("the start of all processes")  # from now on everybody's line can be read
    return ranks


def _unmet(env: LaunchEnv, timeout: timedelta, error: BaseException) -> str:
    """Says that the processes did not find each other, and what helps."""
    text = str(error)
    waited = f" within {timeout.total_seconds():.0f} s" if _LATE.search(text) else ""
    several = env.world_size > env.local_world_size
    hint = (
        "\nIf an address that begins with 127. stands above, set GLOO_SOCKET_IFNAME to the network "
        "between the machines, such as eth0."
    )
    return (
        f"rank {env.rank} did not meet all of the {env.world_size} processes at "
        f"{env.master_address}:{env.master_port}{waited}: {text}{hint if several else ''}"
    )
