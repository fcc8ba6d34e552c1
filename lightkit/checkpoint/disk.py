"""What lies on the disk: temporary names, names in one instant, second names, and what went wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightkit.errors import CheckpointError

TEMPORARY = ".lightkit-tmp"
#: A temporary file of another machine that was not touched for so long has no writer any more.
_LEFTOVER_SECONDS = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = "Choose another one with default_root_dir= of the Trainer or dirpath= of ModelCheckpoint."
#: In the folder of a sharded run: everything but the parts, and what says that all is there.
REST = "rest.ckpt"
MARK = ".metadata"


def point(pointer: Path, target: Path) -> None:
    """Makes ``pointer`` a second name of the file ``target``, in one instant.

    A hard link, or a copy where the file system has no links. Of a folder the files are linked.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    if target.is_dir():
        from lightkit.checkpoint import sharded

        sharded.point(pointer, target)
        return
    if pointer.exists() and pointer.samefile(target):
        return
    temporary = temporary_name(pointer)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(target, temporary)
        except OSError:
            with open(target, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        give_name(temporary, pointer)
    except OSError as error:
        raise CheckpointError(why(error, pointer, target.stat().st_size)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def give_name(temporary: Path, path: Path) -> None:
    """Gives a file or folder its name; a checkpoint that had the name before goes.

    In one instant, but for folders: they cannot take each other's place, so the old one gets a
    temporary name for the moment.
    """
    old = None
    if is_sharded(path) or (temporary.is_dir() and path.is_file()):
        old = temporary_name(path.with_name(f"{path.name}.old"))
        os.replace(path, old)
    os.replace(temporary, path)
    sync_folder(path.parent)
    if old is not None:
        remove(old)


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
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if _abandoned(path):
                remove(path)


def remove(path: Path) -> None:
    """Removes a checkpoint, be it a file or a folder. One that is gone is no error."""
    if path.is_dir() and not path.is_symlink():
        (path / MARK).unlink(missing_ok=True)  # first, so that no half of it counts
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def same(one: Path, other: Path) -> bool:
    """Tells whether two paths name one checkpoint, be it a file or a folder."""
    with contextlib.suppress(OSError):
        return identity(one) == identity(other)
    return False


def identity(path: Path) -> tuple[int, int]:
    """Returns what all names of one checkpoint have in common."""
    stat = (path / MARK if path.is_dir() else path).stat()
    return stat.st_dev, stat.st_ino


def is_sharded(path: Path) -> bool:
    """Tells whether a path is the checkpoint of a sharded run, a folder, whole or not."""
    return path.is_dir() and ((path / REST).exists() or (path / MARK).exists())


def temporary_name(path: Path) -> Path:
    """Returns the name under which a file is written before it gets its own."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}{TEMPORARY}")


def _abandoned(temporary: Path) -> bool:
    """Tells whether the writer of a temporary file is gone."""
    host, pid = temporary.name.removesuffix(TEMPORARY).split(".")[-2:]
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


def sync_files(files: Iterable[Path]) -> None:
    """Brings files to the disk that others hold open; one that is gone has nothing to bring."""
    for path in files:
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
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


def why(error: OSError, path: Path, needed: int) -> str:
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


def nbytes(obj: Any) -> int:
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


def written_at(path: Path) -> float:
    """Returns when a file was written last; 0 for one that another process has just removed."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def size_of(path: Path) -> str:
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
