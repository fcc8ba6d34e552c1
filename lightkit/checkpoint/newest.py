"""Which checkpoint of a folder is the newest that a fit can continue."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from lightkit.checkpoint.disk import identity
from lightkit.checkpoint.files import POINTERS, SUFFIX, check_bytes, peek, settle
from lightkit.errors import CheckpointError

_log = logging.getLogger("lightkit")


def latest(directory: str | Path, run: str | None = None) -> Path | None:
    """Returns the newest whole checkpoint of a folder that a fit can continue, or None.

    The newest is the one with the most steps, then the one written last; of two states of one step
    an exact one goes before one that was saved after an exception. Damaged and foreign files are
    skipped with a warning that names them; files that hold weights only, and those that another
    process removes at this moment, are passed over.

    Args:
        directory: The folder.
        run: Take only files of the run of this id, and those that name no run.
    """
    settle()
    files: dict[tuple[int, int], Path] = {}
    paths = Path(directory).glob(f"*{SUFFIX}")
    for path in sorted(paths, key=lambda p: (p.stem not in POINTERS, p.name)):
        with contextlib.suppress(OSError):  # gone in the meantime, or a link to nowhere
            files[identity(path)] = path  # of several names the file's own comes last
    found = []
    for path in files.values():
        try:
            position = _position(path, run)
            if position is not None:
                found.append((position, path.stat().st_mtime_ns, path))
        except (CheckpointError, OSError) as error:
            _say_skipped(path, error)
    for _, _, path in sorted(found, reverse=True):
        try:
            check_bytes(path)
            return path
        except CheckpointError as error:
            _say_skipped(path, error)
    return None


def is_resumable(directory: Path, run: str) -> bool:
    """Tells whether a folder seems to hold what `latest` would find: no bytes are checked."""
    for path in directory.glob(f"*{SUFFIX}"):
        with contextlib.suppress(CheckpointError, OSError):
            if _position(path, run) is not None:
                return True
    return False


def _say_skipped(path: Path, error: Exception) -> None:
    """Names a file that cannot be used, unless it was only removed in the meantime."""
    if path.exists():
        _log.warning("Skipped a file among the checkpoints: %s", error)


def _position(path: Path, run: str | None) -> tuple[int, int, bool] | None:
    """Returns what orders checkpoints, without reading tensors; None for one that is not meant."""
    checkpoint = peek(path)
    header, loop = checkpoint["lightkit"], checkpoint.get("loop")
    if loop is None or (run and header.get("run") and header["run"] != run):
        return None
    try:
        return int(loop["global_step"]), int(loop.get("epoch", 0)), bool(header.get("exact", True))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} does not say where its run stood.") from None


def orphans(folder: Path, run: str, step: int) -> list[str]:
    """Returns the files that a run wrote after a step which it now continues from.

    It forgot them when it was killed or its newest file damaged, and will make those steps again.
    Only files that carry the name of their step and the id of the run: those are its own.
    """
    found = []
    for path in folder.glob(f"step_*{SUFFIX}"):
        with contextlib.suppress(CheckpointError, OSError):
            header = peek(path)["lightkit"]
            at = header.get("global_step", 0)
            if header.get("run") == run and at > step and path.stem == f"step_{at:06d}":
                found.append(str(path))
    return found
