"""``metrics.jsonl``: one line per row, appended; the file that everything can read."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from lightkit.loggers.base import Logger

_TOGETHER_SECS = 0.5


class JSONLLogger(Logger):
    """Appends one JSON object per row to ``metrics.jsonl`` in the run folder.

    A line is ``{"step": 50, "epoch": 0, "train_loss": 0.69}``. JSON has no nan and no infinity:
    both are written as null. Lines that come faster than two a second reach the operating system
    together, and all of them before a checkpoint is written: the file can be followed while the run
    goes on, and a process that is killed loses no row that its checkpoint counts on.

    Args:
        save_dir: See `Logger`.
        name: See `Logger`.
        version: See `Logger`.
    """

    FILE = "metrics.jsonl"
    _file: IO[bytes] | None = None
    _flushed: float = 0.0

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`. An unfinished last line (a full disk) is cut off.

        With ``purge_step`` the file is cut before the first row of that step or a later one; see
        `truncate` for a cut that is exact to the row.
        """
        self.close()
        super().open(run_dir, purge_step)
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, _kept_bytes(path, purge_step))
        self._file = path.open("ab")

    @property
    def path(self) -> Path:
        """The file; it exists once a run has begun."""
        return Path(self.log_dir or ".") / self.FILE

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one line."""
        if self._file is None:
            return
        row = {"step": step, **metrics}
        if "epoch" in metrics:  # where a line is and then what it holds
            row = {"step": step, "epoch": metrics["epoch"], **metrics}
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:
            line = json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()})
        self._file.write(line.encode() + b"\n")
        now = time.monotonic()
        if now - self._flushed >= _TOGETHER_SECS:
            self._file.flush()
            self._flushed = now

    def offset(self) -> int:
        """Returns the length of the file in bytes: what a checkpoint keeps for `truncate`."""
        self.flush()
        return 0 if self._file is None else self._file.tell()

    def truncate(self, offset: int) -> None:
        """Cuts the file to ``offset`` bytes, so that a continued run repeats no row."""
        if self._file is not None:
            self._file.flush()
            # Never longer than it is: that would fill it up with zero bytes.
            self._file.truncate(min(offset, os.path.getsize(self.path)))
            self._file.seek(0, os.SEEK_END)

    def flush(self) -> None:
        """Hands the last lines to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _kept_bytes(path: Path, purge_step: int | None) -> int:
    """Returns the length of the whole lines before the first row of ``purge_step`` or later."""
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if purge_step is not None and json.loads(line)["step"] >= purge_step:
                break
            kept += len(line)
    return kept
