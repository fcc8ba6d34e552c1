"""Files of checkpoints: written so that a kill at any instant leaves a whole one, read with care.

The only place that calls ``torch.save`` and ``torch.load``. Files are loaded onto the CPU, with
``weights_only=True`` always: nothing in a file is ever executed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import pickle
import platform
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightkit.checkpoint.storable import storable
from lightkit.errors import CheckpointError, did_you_mean

_log = logging.getLogger("lightkit")

#: The version of the layout that this lightkit writes, and the newest that it reads.
FORMAT = 1
SUFFIX = ".ckpt"
#: Names (without suffix) of second names of files: the newest and the best.
POINTERS = ("last", "best")
_LIGHTNING = "pytorch-lightning_version"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "Choose another one with default_root_dir= of the Trainer or dirpath= of ModelCheckpoint."
_TEMPORARY = ".lightkit-tmp"
#: A temporary file of another machine that was not touched for so long has no writer any more.
_LEFTOVER_SECONDS = 3600.0
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
    temporary = _temporary(path)
    recorder: _Recorder | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # open() gives the mode of the umask, which tempfile does not.
        with open(temporary, "wb") as file:
            recorder = _Recorder(file)
            torch.save(obj, recorder)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        _sync_files(files)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:  # noqa: BLE001, Ctrl-C too must leave no temporary file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = recorder.error if recorder is not None and recorder.error else error
        if isinstance(cause, OSError):
            raise CheckpointError(_why(cause, path, _nbytes(obj))) from cause
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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of lightkit or of Lightning onto the CPU and checks that it is whole.

    Raises:
        CheckpointError: There is no such file, or it is a folder, truncated, damaged, from
            elsewhere, written by a newer lightkit, or holds objects that could run code.
    """
    settle()
    path = Path(path)
    _check_exists(path)
    if not _is_zip(path):
        raise CheckpointError(
            f"{path} is no whole checkpoint ({_size_of(path)}): it is truncated or "
            f"was not written by torch.save. Choose another one{_others(path)}"
        )
    checkpoint = _load(path)
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
    """Reads any file of ``torch.save`` onto the CPU, a bare state dict for example.

    Raises:
        CheckpointError: It cannot be read, or holds objects that could run code.
    """
    settle()
    path = Path(path)
    _check_exists(path)
    return _load(path)


def peek(path: Path) -> dict[str, Any]:
    """Returns a checkpoint of lightkit whose tensors stay on the disk until they are read.

    Raises:
        CheckpointError: The file is not whole or from elsewhere. Its bytes are not checked.
    """
    _check_exists(path)
    if not is_valid(path):
        raise CheckpointError(f"{path} is damaged or truncated.")
    checkpoint = _load(path, mmap=True)
    if not isinstance(checkpoint, dict) or "lightkit" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint of lightkit.")
    _check_format(checkpoint["lightkit"], path)
    return checkpoint


def is_valid(path: str | Path) -> bool:
    """Tells cheaply whether a file is a whole torch file: its end and its index are there."""
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


def point(pointer: Path, target: Path) -> None:
    """Makes ``pointer`` a second name of the file ``target``, in one instant.

    A hard link, or a copy where the file system has no links.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    if pointer.exists() and pointer.samefile(target):
        return
    temporary = _temporary(pointer)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(target, temporary)
        except OSError:
            with open(target, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, pointer)
        _sync_folder(pointer.parent)
    except OSError as error:
        raise CheckpointError(_why(error, pointer, target.stat().st_size)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Makes the folder of a run's checkpoints, before anything is trained.

    Temporary files that a killed process left there are removed.

    Raises:
        CheckpointError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The folder for checkpoints {folder} cannot be made: {error.strerror}. {_ADVICE}"
        ) from error
    if not os.access(folder, os.W_OK):
        raise CheckpointError(
            f"The folder for checkpoints {folder} is not writable for this user. {_ADVICE}"
        )
    for path in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            if _abandoned(path):
                path.unlink()


class _Recorder:
    """A file that remembers the first error: torch hides it behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _temporary(path: Path) -> Path:
    """Returns the name under which a file is written before it gets its own."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}{_TEMPORARY}")


def _abandoned(temporary: Path) -> bool:
    """Tells whether the writer of a temporary file is gone."""
    host, pid = temporary.name.removesuffix(_TEMPORARY).split(".")[-2:]
    if os.name == "posix" and host == _host() and pid.isdigit():
        try:
            os.kill(int(pid), 0)  # asks only whether there is such a process
        except ProcessLookupError:
            return True
        except OSError:
            pass
    return time.time() - temporary.stat().st_mtime > _LEFTOVER_SECONDS


def _host() -> str:
    """Returns the name of this machine as a part of a file name."""
    return re.sub(r"\W", "_", platform.node())[:40]


def _sync_files(files: Iterable[Path]) -> None:
    """Brings files to the disk that others hold open; one that is gone has nothing to bring."""
    for path in files:
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Brings a rename to the disk."""
    if os.name == "nt":  # folders cannot be opened there, and a rename is written through
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; the file itself is on the disk.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _why(error: OSError, path: Path, needed: int) -> str:
    """Returns what to say about a file that could not be written."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = _size(shutil.disk_usage(path.parent).free)
        return (
            f"{path} could not be written: {reason}. It needs about {_size(needed)}, free there: "
            f"{free} (a quota or a file size limit may allow less). Make room, or choose another "
            f"folder. Earlier checkpoints are untouched."
        )
    if error.errno in _FORBIDDEN:
        return (
            f"{path} could not be written: {reason}. The folder {path.parent} is not writable for "
            f"this user. {_ADVICE}"
        )
    return f"{path} could not be written: {type(error).__name__}: {reason}."


def _nbytes(obj: Any) -> int:
    """Returns the bytes of all tensors in an object, shared memory counted once."""
    storages: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, Tensor):
            if item.layout == torch.strided:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            for value in item.values():
                walk(value)
        elif isinstance(item, (list, tuple)):
            for value in item:
                walk(value)

    walk(obj)
    return sum(storages.values())


def _load(path: Path, mmap: bool = False) -> Any:
    """Calls ``torch.load`` and says in words what is wrong."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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
        f"{path} ({_size_of(path)}) cannot be read: it is damaged or no torch file "
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
    others = [p for p in path.parent.glob(f"*{SUFFIX}") if p != path and p.is_file()]
    if not others:
        return f" (there is no other {SUFFIX} file in {path.parent})."
    others.sort(key=_written_at, reverse=True)
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    return f": {', '.join(p.name for p in others[:8])}{more}."


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


def _written_at(path: Path) -> float:
    """Returns when a file was written last; 0 for one that another process has just removed."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size_of(path: Path) -> str:
    """Returns the size of a file as people read it."""
    with contextlib.suppress(OSError):
        return _size(path.stat().st_size)
    return "it is gone"


def _size(count: int) -> str:
    """Returns a number of bytes as people read it."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
