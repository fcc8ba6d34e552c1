"""Files of checkpoints: written so that a kill at any instant leaves a whole one, read with care.

The only place that calls ``torch.save`` and ``torch.load``. Files are loaded onto the CPU, with
``weights_only=True`` always: nothing in a file is ever executed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightkit.checkpoint.disk import (
    REST,
    give_name,
    is_sharded,
    nbytes,
    size_of,
    sync_files,
    temporary_name,
    why,
    written_at,
)
from lightkit.checkpoint.storable import storable
from lightkit.errors import CheckpointError, did_you_mean, some

_log = logging.getLogger("lightkit")

#: The version of the layout that this lightkit writes, and the newest that it reads.
FORMAT = 1
SUFFIX = ".ckpt"
#: Names (without suffix) of second names of files: the newest and the best.
POINTERS = ("last", "best")
_LIGHTNING = "pytorch-lightning_version"
#: The threads that write a file at the moment, each with what it sets when it is done. Whoever
#: reads files waits for them first.
in_flight: dict[threading.Thread, threading.Event] = {}


def write_checkpoint(obj: dict[str, Any], path: str | Path) -> None:
    """Writes a checkpoint. The file of that name is the old one or the new one, never a torn one.

    What cannot be stored is converted or refused first (`storable`). The data goes to a temporary
    name in the same folder, to the disk (fsync), then to its name, and the folder is synced.

    Args:
        obj: The checkpoint.
        path: Where to; missing folders are made.

    Raises:
        CheckpointError: Something cannot be stored or the file cannot be written. What was there
            under this name is untouched.
    """
    write_stored(storable(obj, "checkpoint"), Path(path))


def save_file(obj: Any, path: str | Path) -> None:
    """Writes any storable object in the way of `write_checkpoint` (predictions, for example).

    ``torch.load(path, weights_only=True)`` reads it.
    """
    write_stored(storable(obj), Path(path))


def write_stored(obj: Any, path: Path, files: Iterable[Path] = ()) -> None:
    """Writes what is storable already, in the way of `write_checkpoint`.

    Args:
        obj: What `storable` returned.
        path: Where to.
        files: Files that must be on the disk before this one counts.

    Raises:
        CheckpointError: It cannot be written.
    """
    begin_file(obj, path, files)(False)


def begin_file(obj: Any, path: Path, files: Iterable[Path] = ()) -> Callable[[bool], None]:
    """Does the first half of `write_stored`: the data goes to a file of a temporary name.

    Returns:
        The second half, which waits for the disk and gives the file its name, by any thread;
        ``obj`` may have changed by then. Called with whether it will be tried again if it fails.
    """
    temporary, size = temporary_name(path), nbytes(obj)
    with _or_no_file(temporary, path, size) as recorder:
        path.parent.mkdir(parents=True, exist_ok=True)
        # open() gives the mode of the umask, which tempfile does not.
        with open(temporary, "wb") as recorder._file:
            torch.save(obj, recorder)  # type: ignore[arg-type]

    failed = False

    def finish(again: bool) -> None:
        nonlocal failed
        with _or_no_file(temporary, path, size, keep=again):
            if failed:
                _write_over(temporary, path)
            failed = True
            sync_files((temporary, *files))
            give_name(temporary, path)

    return finish


def _write_over(temporary: Path, path: Path) -> None:
    """Writes a file over itself, if its bytes are those that were written.

    After an fsync that failed, the next one succeeds without what could not be written: the system
    takes it for written, and may or may not have it still.
    """
    with open(temporary, "r+b") as file:
        if not is_valid(temporary):
            raise CheckpointError(f"{path} could not be written: the disk lost a part of it.")
        check_bytes(temporary)
        while data := file.read(1 << 20):
            file.seek(-len(data), os.SEEK_CUR)
            file.write(data)


@contextlib.contextmanager
def _or_no_file(
    temporary: Path, path: Path, size: int, *, keep: bool = False
) -> Iterator[_Recorder]:
    """Removes the temporary file where something goes wrong, and says what it was."""
    recorder = _Recorder()
    try:
        yield recorder
    except BaseException as error:  # noqa: BLE001, Ctrl-C too must leave no temporary file
        if not (keep and isinstance(error, OSError)):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        cause = recorder.error or error
        if isinstance(cause, OSError):
            raise CheckpointError(why(cause, path, size)) from cause
        # The error itself, or the Ctrl-C that torch turned into an error of its own.
        raise cause from cause.__cause__


def settle() -> None:
    """Waits until no file is being written in the background of this process."""
    for thread, done in list(in_flight.items()):
        if thread is not threading.current_thread():
            done.wait()  # a join that Ctrl-C interrupts takes the thread for ended ever after
            thread.join()


# Python waits for threads itself before this, but a Ctrl-C breaks that off.
atexit.register(settle)
if hasattr(os, "register_at_fork"):  # the threads of a process are not in its children
    os.register_at_fork(after_in_child=in_flight.clear)


def read_checkpoint(path: str | Path, *, lazy: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of lightkit or of Lightning onto the CPU and checks that it is whole.

    Args:
        path: A file, or the folder of a sharded run.
        lazy: Leave the tensors of a folder where they are, as `sharded.Piece`.
        mmap: Leave the tensors of a file on the disk until they are read.

    Raises:
        CheckpointError: There is no such file, or it is another folder, truncated, damaged, from
            elsewhere, written by a newer lightkit, or holds objects that could run code.
    """
    settle()
    path = Path(path)
    if is_sharded(path):
        return _read_folder(path, lazy=lazy)
    _check_exists(path)
    if not _is_zip(path):
        raise CheckpointError(
            f"{path} is no whole checkpoint ({size_of(path)}): it is truncated or "
            f"was not written by torch.save. Choose another one{_others(path)}"
        )
    checkpoint = _load(path, mmap=mmap)
    if not isinstance(checkpoint, dict) or not (
        "lightkit" in checkpoint or ("state_dict" in checkpoint and _LIGHTNING in checkpoint)
    ):
        raise CheckpointError(
            f"{path} is no checkpoint of lightkit or Lightning: {_contents(checkpoint)}. If it "
            f"holds weights only, load them with task.load_weights({str(path)!r})."
        )
    if "lightkit" in checkpoint:
        _check_format(checkpoint["lightkit"], path)
        check_bytes(path)
    return checkpoint


def read_any(path: str | Path) -> Any:
    """Reads any file of ``torch.save`` or safetensors onto the CPU, a state dict for example.

    The tensors of the folder of a sharded run stay where they are, as `sharded.Piece`.

    Raises:
        CheckpointError: It cannot be read, holds objects that could run code, or is a checkpoint of
            a later format.
    """
    settle()
    path = Path(path)
    if is_sharded(path):
        return _read_folder(path, lazy=True)
    _check_exists(path)
    found = read_safetensors(path) if path.suffix == ".safetensors" else _load(path)
    if isinstance(found, dict) and isinstance(found.get("lightkit"), dict):
        _check_format(found["lightkit"], path)
    return found


def save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes named tensors of the CPU as safetensors, in one go; each name has bytes of its own.

    Raises:
        ImportError: safetensors is not installed.
    """
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        held[name] = tensor.clone() if place in seen else tensor  # it refuses shared memory
        seen.add(place)
    _safetensors().save_file(held, path, metadata={"format": "pt"})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of safetensors onto the CPU.

    Raises:
        CheckpointError: It is damaged, or no such file.
        ImportError: safetensors is not installed.
    """
    library = _safetensors()
    try:
        return library.load_file(path)  # type: ignore[no-any-return]
    except Exception as error:  # an error of its own, that of Rust
        raise CheckpointError(_damaged(path, error)) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this needs safetensors: pip install 'lightkit[export]'") from error
    return safetensors.torch


def peek(path: Path) -> dict[str, Any]:
    """Returns a checkpoint of lightkit whose tensors stay on the disk until they are read.

    Those of a sharded run are not in it.

    Raises:
        CheckpointError: The file is not whole or from elsewhere. Its bytes are not checked.
    """
    folder = is_sharded(path)
    if not folder:
        _check_exists(path)
    if not is_valid(path):
        raise CheckpointError(f"{path} is damaged or truncated.")
    checkpoint = _load(path / REST if folder else path, mmap=True)
    if not isinstance(checkpoint, dict) or "lightkit" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint of lightkit.")
    _check_format(checkpoint["lightkit"], path)
    return checkpoint


def is_valid(path: str | Path) -> bool:
    """Tells cheaply whether a file is a whole torch file: its end and its index are there.

    Or whether the folder of a sharded run has all its files, as long as they must be.
    """
    if is_sharded(Path(path)):
        from lightkit.checkpoint import sharded

        try:
            sharded.check_whole(Path(path))
        except CheckpointError:
            return False
        return True
    try:
        with zipfile.ZipFile(path) as file:
            index = [name for name in file.namelist() if name.endswith("/data.pkl")]
            return len(index) == 1 and bool(file.read(index[0]))
    except Exception:  # noqa: BLE001  zipfile raises nearly anything for an index with a wrong bit
        return False


def _is_zip(path: Path) -> bool:
    """Tells whether a file has the end of a zip file."""
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # noqa: BLE001  likewise
        return False


def _read_folder(path: Path, *, lazy: bool) -> dict[str, Any]:
    """Returns the checkpoint of a sharded run; see `read_checkpoint`."""
    from lightkit.checkpoint import sharded

    try:
        sharded.check_whole(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Choose another one{_others(path)}") from None
    rest = read_checkpoint(path / REST)
    contents: dict[str, Any] = sharded.pieces(path, rest)
    if not lazy:
        return sharded.whole(contents)  # type: ignore[no-any-return]
    contents["lightkit"]["pieces"] = True  # for whoever puts it back
    return contents


class _Recorder:
    """A file that remembers the first error: torch hides it behind one of its own."""

    _file: BinaryIO

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _load(path: Path, mmap: bool = False) -> Any:
    """Calls ``torch.load`` and says in words what is wrong."""
    return load_bytes(path, path, mmap=mmap)


def load_bytes(given: Path | BinaryIO, path: Path, *, mmap: bool = False) -> Any:
    """Returns what ``torch.load`` reads, or says in words what is wrong.

    Args:
        given: The file.
        path: What it is called in an error message.
        mmap: Leave tensors on the disk until they are read.
    """
    try:
        return torch.load(given, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except pickle.UnpicklingError as error:
        blocked = re.search(r"(?:GLOBAL|global:?|type)\s+([\w.]+\.[\w.]+)", str(error))
        if blocked is None:
            raise CheckpointError(_damaged(path, error)) from error
        raise CheckpointError(
            f"{path} holds an object of type {blocked[1]}. Loading such objects can run code, so "
            f"lightkit never does; nothing was executed. If you trust the file, load it once with "
            f"torch.load(..., weights_only=False) elsewhere and save only its tensors."
        ) from None
    except Exception as error:  # torch raises nearly anything for bytes that are not its own
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    """Returns what to say about a file that torch cannot read."""
    first = (str(error).splitlines() or [""])[0]
    return (
        f"{path} ({size_of(path)}) cannot be read: it is damaged or no torch file "
        f"({type(error).__name__}: {first[:120]}). Choose another one{_others(path)}"
    )


def _check_exists(path: Path) -> None:
    """Raises unless ``path`` is a file, and lists what there is instead."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Name a file in it{_others(path / '-')}")
    if path.exists():
        return
    if not path.parent.is_dir():
        raise CheckpointError(f"{path} does not exist, nor does the folder {path.parent}.")
    hint = did_you_mean(path.name, (p.name for p in path.parent.iterdir()))
    raise CheckpointError(f"{path} does not exist.{hint} Choose another one{_others(path)}")


def _others(path: Path) -> str:
    """Returns ``": a.ckpt, b.ckpt."`` for the other checkpoints of the folder, newest first."""
    others = [p for p in path.parent.glob(f"*{SUFFIX}") if p != path]
    if not others:
        return f" (there is no other {SUFFIX} file in {path.parent})."
    others.sort(key=written_at, reverse=True)
    return f": {some((p.name for p in others), most=8)}."


def _check_format(header: Any, path: Path) -> None:
    """Raises when the layout of a file is newer than this lightkit, or is none."""
    number = header.get("format") if isinstance(header, dict) else None
    if not isinstance(number, int):
        raise CheckpointError(f"{path} names no format version, so it was not made by lightkit.")
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, written by lightkit {header.get('version', '?')}; this "
            f"lightkit reads up to format {FORMAT}. Upgrade lightkit."
        )


def check_bytes(path: Path) -> None:
    """Raises when bytes of a file changed after it was written; torch itself does not look."""
    if is_sharded(path):
        from lightkit.checkpoint import sharded

        sharded.check_bytes(path)
        return
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except Exception as error:  # likewise
        raise CheckpointError(_damaged(path, error)) from error
    if bad is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {bad} is wrong. Choose another one{_others(path)}"
        )


def _contents(obj: Any) -> str:
    """Returns what a loaded object is, for an error message."""
    if not isinstance(obj, dict):
        return f"it holds a {type(obj).__name__}"
    names = ", ".join(map(str, list(obj)[:6]))
    return f"it holds a dict with the keys {names}{', ...' if len(obj) > 6 else ''}"
