"""``metrics.csv``: one table whose header grows when new names come."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from lightkit.loggers.base import Logger


class CSVLogger(Logger):
    """Writes ``metrics.csv`` (a column per name, a row per flush) and ``hparams.json``.

    The first columns are "step" and "epoch". A cell is empty where a row has no such value; nan
    and inf are written as words that pandas and numpy read. A row with a new name rewrites the
    file once with a longer header.

    Args:
        save_dir: Folder for ``save_dir/name/version_N``; None: the trainer's run folder.
        name: Folder below ``save_dir``; None or "" for none.
        version: A number N for ``version_N``, or the folder's name; None: the next free number.
    """

    FILE = "metrics.csv"
    _file: IO[str] | None = None
    _columns: list[str]

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`. An existing table is continued."""
        self.close()
        super().open(run_dir, purge_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns, rows = self._read()
        if purge_step is not None:
            rows = [row for row in rows if int(row["step"]) < purge_step]
        self._rewrite(rows)

    @property
    def path(self) -> Path:
        """The file; it exists once a run has begun."""
        return Path(self.log_dir or ".") / self.FILE

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one row."""
        if self._file is None:
            return
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self._columns]
        if new:
            self.close()
            rows = self._read()[1]
            self._columns += new
            self._rewrite(rows)
        csv.writer(self._file, lineterminator="\n").writerow(
            [row.get(name, "") for name in self._columns]
        )

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes ``hparams.json`` beside the table; what JSON does not know becomes text."""
        if self._file is not None:
            text = json.dumps(dict(params), indent=2, default=str)
            self.path.with_name("hparams.json").write_text(text + "\n", encoding="utf-8")

    def flush(self) -> None:
        """Writes what is buffered."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return ["step", "epoch"], []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
            return list(reader.fieldnames or ["step", "epoch"]), rows

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes header and rows beside the table and moves them over it: never half a table."""
        part = self.path.with_suffix(".csv.part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)
        # Line by line, so that a killed process leaves whole rows.
        self._file = self.path.open("a", buffering=1, newline="", encoding="utf-8")
