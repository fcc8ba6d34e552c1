"""``metrics.csv``: one table whose header grows when new names come."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightkit.loggers.base import FileLogger, warn_unmarked

_log = logging.getLogger("lightkit")
_FIRST = ["step", "epoch"]


class CSVLogger(FileLogger):
    """Writes ``metrics.csv`` (a column per name, a row per flush) and ``hparams.json``.

    The first columns are "step" and "epoch". A cell is empty where a row has no such value; nan
    and inf are written as words that pandas and numpy read. A row with a new name rewrites the
    file once with a longer header.

    Args:
        save_dir: Folder for ``save_dir/name/version_N``; None: the trainer's run folder.
        name: Folder below ``save_dir``; None or "" for none.
        version: A number N for ``version_N``, or the folder's name; None: the next free number.
    """

    FILE = _target = "metrics.csv"
    _columns: list[str]
    _rows = 0

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`. An existing table is continued; an unfinished last row is cut off."""
        super().open(run_dir, purge_step)
        self._rewrite(*self._read())

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one row."""
        if self._file is None:
            return
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self._columns]
        if new:
            self.close()
            self._rewrite([*self._columns, *new], self._read()[1])
        csv.writer(self._file, lineterminator="\n").writerow(
            [row.get(name, "") for name in self._columns]
        )
        self._rows += 1

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes ``hparams.json`` beside the table; what JSON does not know becomes text."""
        if self._file is not None:
            text = json.dumps(dict(params), indent=2, default=str)
            self.path.with_name("hparams.json").write_text(text + "\n", encoding="utf-8")

    def mark(self) -> dict[str, Any]:
        """See `Logger.mark`: the size, the number of rows, and the header, which may grow."""
        if self._file is None:
            return {}
        return {**super().mark(), "rows": self._rows, "columns": list(self._columns)}

    def rewind(self, mark: dict[str, Any]) -> None:
        """See `Logger.rewind`: the table gets the rows and the header that it had."""
        if "rows" not in mark:
            if self._rows:
                warn_unmarked(self.path)
            return
        self.close()
        rows = self._read()[1]
        if len(rows) < mark["rows"]:
            _log.warning(
                "%s has %d rows where the checkpoint counts on %d: rows of before it are missing",
                self.path,
                len(rows),
                mark["rows"],
            )
        self._rewrite(mark["columns"], rows[: mark["rows"]])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Returns the columns and the whole rows of the table."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), restval="")
        return list(reader.fieldnames or _FIRST), list(reader)

    def _rewrite(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes header and rows beside the table and moves them over it: never half a table."""
        self._columns, self._rows = list(columns), len(rows)
        part = self.path.with_suffix(".csv.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, self._columns, restval="", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)
        # Line by line, so that a killed process leaves whole rows.
        self._file = self.path.open("a", buffering=1, newline="", encoding="utf-8")
