"""Writes the checkpoints of one fit, at once or behind the back of the loop."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from lightkit.checkpoint.files import begin_file, in_flight, settle, write_stored
from lightkit.checkpoint.storable import storable
from lightkit.errors import CheckpointError

if TYPE_CHECKING:
    from lightkit.checkpoint.sharded import Shards
    from lightkit.distributed import Strategy

_log = logging.getLogger("lightkit")
_T = TypeVar("_T")
#: How long to wait before a file that could not be written is tried once more.
RETRY_SECONDS = 1.0


class Writer:
    """Writes files one after the other. What was there before stays until the new one is complete.

    In the background a file is written from a copy in memory, which is kept for the next one. At
    most one is under way: whoever writes or reads checkpoints in this process waits for it.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._buffers = Buffers()
        self._parts: dict[str, Tensor] = {}

    def write(
        self,
        contents: dict[str, Any],
        path: Path,
        *,
        files: Iterable[Path] = (),
        background: bool | Literal["disk"] = False,
        then: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        """Writes a checkpoint, once more after a second if that fails.

        Of a sharded run every rank writes its part, so that all of them come here alike.

        Args:
            contents: The checkpoint. What cannot be stored is converted or refused here and now.
            path: Where to.
            files: Files that must be on the disk before this one counts.
            background: True to copy the tensors and return, while a thread does the rest. "disk" to
                write the file and return, while a thread waits until it is on the disk, and gives
                it its name; of a sharded run that is not possible, and it is as False.
            then: Called when the file is complete, in the background by that thread.
            failed: Gets the error of a background save. Without it the next `write` that names
                nobody either, `wait` or `close` raises the error, whichever comes first.
            strategy: The strategy of the run.

        Raises:
            CheckpointError: Something cannot be stored, or a file could not be written.
        """
        if failed is None:
            self.wait()
        else:  # what went wrong with the file of another one is not theirs
            settle()
        shards = _shards(contents, path, strategy)
        stored = storable(contents, "checkpoint") if shards is None else shards.stored
        if background == "disk":
            if shards is None:
                finish = _twice(lambda _: begin_file(stored, path, files))
                self._start(lambda: (_twice(finish), then and then()), failed or self._keep)
                return
            background = False

        def work() -> None:
            if shards is None:
                _twice(lambda _: write_stored(stored, path, files))
            else:
                _twice(lambda _: shards.write(stored, files))
            if then is not None:
                then()

        if background:
            stored = self._buffers.copy(stored)
            if shards is not None:
                shards.copy(self._parts)
            self._start(work, failed or self._keep)
        else:
            work()

    def _keep(self, error: Exception) -> None:
        """Keeps an error that nobody takes until it can be raised, and says it now."""
        self._error = error
        _log.warning("%s", error)

    def _start(self, work: Callable[[], object], failed: Callable[[Exception], None]) -> None:
        """Lets a thread do the work."""
        done = threading.Event()

        def behind() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  # it surfaces in the thread of the loop
                failed(error)
            finally:
                in_flight.pop(thread, None)
                done.set()

        # Not a daemon: a program that ends right now still writes its last file.
        thread = threading.Thread(target=behind, name="lightkit-writer")
        in_flight[thread] = done
        try:
            thread.start()
        except BaseException:
            if thread.ident is None:  # else a Ctrl-C came when it was at work already
                in_flight.pop(thread, None)
            raise

    def wait(self) -> None:
        """Waits for the file under way.

        Raises:
            CheckpointError: It could not be written, and nobody took the error.
        """
        settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, failed: bool) -> None:
        """Waits for the file under way and lets go of the memory.

        Args:
            failed: Whether an error is under way already, which must stay the one that is seen.
        """
        try:
            self.wait()
        except Exception as error:
            if not failed:
                raise
            _log.error("and in saving before the error: %s", error)
        finally:
            self._buffers, self._parts = Buffers(), {}


def _shards(contents: dict[str, Any], path: Path, strategy: Strategy | None) -> Shards | None:
    """Returns what writes this rank's part of a sharded run; None for a whole checkpoint."""
    if strategy is None or not strategy.sharded:
        return None
    from lightkit.checkpoint.sharded import Shards

    return Shards(contents, path, strategy)


def _twice(write: Callable[[bool], _T]) -> _T:
    """Writes a file, once more after a while: a network or a full disk may have recovered.

    Args:
        write: Does it; called with whether it will be called again if it fails.
    """
    try:
        return write(True)
    except CheckpointError as error:
        _log.warning("%s Trying once more in %g s.", error, RETRY_SECONDS)
    # Not while that is handled, else what fails again is shown with all of the first time.
    time.sleep(RETRY_SECONDS)
    return write(False)


class Buffers:
    """Memory of this process for a copy of all tensors, kept from one copy to the next."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], list[Tensor]] = {}

    def copy(self, stored: Any) -> Any:
        """Returns ``stored`` with all tensors copied to the CPU, those that share memory together.

        What an earlier call returned is overwritten.
        """
        kept: dict[tuple[int, bool], list[Tensor]] = {}
        free = {key: list(buffers) for key, buffers in self._kept.items()}
        copies: dict[tuple[Any, ...], Tensor] = {}
        cards: set[torch.device] = set()

        def copied(tensor: Tensor) -> Tensor:
            nonlocal cards
            if not _is_plain(tensor):
                return tensor.to("cpu", copy=True)
            storage = tensor.untyped_storage()
            place = (tensor.device, storage.data_ptr(), storage.nbytes(), tensor.dtype)
            copy = copies.get(place)
            if copy is None:
                size, pinned = storage.nbytes(), tensor.device.type == "cuda"
                buffer = free[size, pinned].pop() if free.get((size, pinned)) else None
                buffer = _empty(size, pinned) if buffer is None else buffer
                kept.setdefault((size, pinned), []).append(buffer)
                memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                buffer.copy_(memory.set_(storage, 0, (size,), (1,)), non_blocking=pinned)
                copy = copies[place] = buffer.view(tensor.dtype)
                cards |= {tensor.device} if pinned else set()
            return torch.as_strided(copy, tensor.size(), tensor.stride(), tensor.storage_offset())

        def walk(item: Any) -> Any:
            if isinstance(item, Tensor):
                return copied(item)
            if isinstance(item, bytearray):
                return bytearray(item)
            if type(item) in (list, tuple):
                return type(item)(map(walk, item))
            if not isinstance(item, dict):
                return item
            made = {key: walk(value) for key, value in item.items()}
            if type(item) is not dict:
                notes = vars(item) if isinstance(item, OrderedDict) else {}
                made = type(item)(made)
                vars(made).update(notes)
            return made

        result = walk(stored)
        for device in cards:
            torch.cuda.synchronize(device)  # host sync: the copies must be there, once per save
        self._kept = kept
        return result


def _is_plain(tensor: Tensor) -> bool:
    """Tells whether a tensor is a view of one block of memory, as it stands."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.untyped_storage().nbytes() % tensor.element_size() == 0
        and tensor.numel() > 0
    )


def _empty(size: int, pinned: bool) -> Tensor:
    """Returns memory for one storage."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # no more memory can be pinned: the copy takes a little longer
            pass
    return torch.empty(size, dtype=torch.uint8)
