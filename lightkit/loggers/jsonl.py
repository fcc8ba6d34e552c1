"""``metrics.jsonl``: one line per row, appended; the file that everything can read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightkit.loggers.base import FileLogger, cut, warn_unmarked

_TOGETHER_SECS = 0.5


class JSONLLogger(FileLogger):
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

    FILE = _target = "metrics.jsonl"
    _flushed: float = 0.0

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`. An unfinished last line (a full disk, a kill) is cut off."""
        super().open(run_dir, purge_step)
        self._file = self.path.open("ab")
        with self.path.open("rb") as file:
            self._file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))

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

    def rewind(self, mark: dict[str, Any]) -> None:
        """See `Logger.rewind`: cuts the file to the length that it had."""
        self.flush()
        if "files" in mark:
            cut(self.path, mark["files"][self.FILE])
        elif self.path.stat().st_size:
            warn_unmarked(self.path)
