"""TensorBoard event files: the only door to tensorboard."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightkit.freezing import at_rest
from lightkit.loggers.base import Logger, cut, flatten, warn_unmarked

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger("lightkit")

_FLUSH_SECS = 10  # a page that is open beside the run sees a row at most this much later
_TOGETHER_SECS = 0.5
_FILES = "events.out.tfevents.*"
_LONGEST_VALUE = 500  # characters of one hyperparameter


class TensorBoardLogger(Logger):
    """Scalars, hyperparameters, graph, images and histograms for TensorBoard.

    Scalars have the optimizer step as their x axis. Hyperparameters go once into the same event
    file; the HPARAMS tab finds every scalar of the run by itself, so there is no ``hp_metric``.

    Args:
        save_dir: Folder for ``save_dir/name/version_N``; None: the trainer's run folder.
        name: Folder below ``save_dir``; None or "" for none.
        version: A number N for ``version_N``, or the folder's name; None: the next free number.
        log_graph: Write the graph of the network too, traced on the task's
            ``example_input_array``. If that fails, a warning says so.
        default_hp_metric: Accepted and without effect: no placeholder metric is ever written.
        prefix: Put before every scalar's name, with a "-" between.
        sub_dir: Folder inside the run folder for the event files.

    Raises:
        ImportError: When a run begins and tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | Path | None = None,
        name: str | None = None,
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = False,
        prefix: str = "",
        sub_dir: str | Path | None = None,
    ) -> None:
        super().__init__(save_dir, name, version)
        self.graph_wanted = log_graph
        self._prefix = f"{prefix}-" if prefix else ""
        self._sub_dir = sub_dir
        # What our files' names end in: others may write their own beside them.
        self._suffix = ".lightkit" + (re.sub(r"\W", "_", f"_{prefix}") if prefix else "")
        self._target = os.path.join(sub_dir or "", f"events.out.tfevents.*{self._suffix}")
        self._root = self._folder = Path()
        self._folders: set[Path] = set()
        self._writer: Any = None
        self._purge_step: int | None = None
        self._event: Any = None
        self._summary: Any = None
        self._rows: list[tuple[float, int, Mapping[str, float]]] = []
        self._written = 0.0
        self._told = False

    @property
    def experiment(self) -> Any:
        """The ``torch.utils.tensorboard.SummaryWriter``; its file is made at the first use.

        After `close` a further use begins another event file in the same folder.
        """
        if self._writer is None and self._run_dir is None:
            return super().experiment
        self._write_rows()  # what comes before stays before
        if self._writer is None:
            self._writer = self._make_writer()
        return self._writer

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`."""
        self.close()
        super().open(run_dir, purge_step)
        # From the root: files are opened again by their names, also after a change of directory.
        self._root = Path(os.path.abspath(run_dir))
        self._folder = Path(os.path.abspath(self._root / (self._sub_dir or "")))
        self._folders, self._purge_step, self._told = {self._folder}, None, False
        _import_tensorboard()  # a missing package is said before the run, not in the middle of it

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes all scalars of the row as one event (an event per scalar costs ten times more).

        Rows that follow each other fast are kept for up to half a second, and then written
        together: a row by itself wakes the writer's thread, which then contends with the loop.
        """
        if self._run_dir is None:
            return
        now = time.time()
        self._rows.append((now, step, metrics))
        if now - self._written >= _TOGETHER_SECS:
            self._write_rows()

    def _write_rows(self) -> None:
        """Writes the rows that are kept; where that fails, they are kept for a new file."""
        try:
            self._add_rows()
        except OSError as error:
            self._drop_writer(error)

    def _add_rows(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = self._make_writer()
        events, done = self._writer._get_file_writer().event_writer, 0
        try:
            for wall_time, step, metrics in self._rows:
                summary = self._summary()
                for name, value in metrics.items():
                    summary.value.add(tag=self._prefix + name, simple_value=value)
                events.add_event(self._event(step=step, wall_time=wall_time, summary=summary))
                done += 1
        finally:
            del self._rows[:done]
        self._written = time.time()

    def _drop_writer(self, error: OSError) -> None:
        """Gives up a writer: its thread has ended at the first error and never writes again."""
        writer, self._writer = self._writer, None
        parts = {} if writer is None else writer.all_writers or {}
        self._folders.update(map(Path, parts))
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.close()
        self._written = time.time() + _FLUSH_SECS  # until the next try, unless asked to flush
        if not self._told:
            self._told = True
            _log.warning(
                "TensorBoard rows may be missing, for they could not be written (%s). Those to "
                "come go into a new event file in %s",
                error,
                self._folder,
            )

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes the hyperparameters for the HPARAMS tab into the run's own event file."""
        from torch.utils.tensorboard import summary

        make: Any = summary.hparams
        plain = {name: _plain(value) for name, value in flatten(params).items()}
        # Three summaries: what the experiment has, a session's start, its end. The first would fix
        # the tab's columns to what is known now; without it the tab takes every hyperparameter and
        # every scalar of all runs that it shows. The last would say that the run has succeeded.
        _, start, _ = make(plain, {})
        self.experiment._get_file_writer().add_summary(start, 0)

    def log_graph(self, task: nn.Module) -> None:
        """Writes the graph of ``task.forward`` if it was asked for; a failure is one warning.

        Args:
            task: The network, with an ``example_input_array`` to trace it on. Its modes, its
                buffers and the random state are left as they were.
        """
        if not self.graph_wanted:
            return
        inputs = getattr(task, "example_input_array", None)
        try:
            if inputs is None:
                raise ValueError("there is no input to trace it on")
            with at_rest(task), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer warns about every python number
                self.experiment.add_graph(task, inputs)
        except Exception as error:  # noqa: BLE001  whatever the tracer meets in the user's code
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning(
                "the graph of %s was not written: %s. Set example_input_array to an input of "
                "forward, or log_graph=False",
                type(task).__name__,
                reason[0],
            )

    def log_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """See `Logger.log_histogram`."""
        finite = values[values.isfinite()]
        if finite.numel() and self._run_dir is not None:
            self.experiment.add_histogram(self._prefix + name, finite, step)

    def flush(self) -> None:
        """Writes what is queued; what an error keeps out of a file goes into a new one."""
        try:
            self._flush()
        except OSError as error:
            self._drop_writer(error)
            self._flush()

    def _flush(self) -> None:
        self._add_rows()
        if self._writer is not None:
            self._writer.flush()

    def mark(self) -> dict[str, Any]:
        """See `Logger.mark`: the lengths of the event files of this logger."""
        self.flush()
        if self._run_dir is None:
            return {}
        if self._writer is not None:  # add_scalars of the experiment makes folders of its own
            self._folders.update(map(Path, self._writer.all_writers or ()))
        sizes = {path: path.stat().st_size for path in self._files()}
        return {"files": {os.path.relpath(p, self._root): n for p, n in sizes.items() if n}}

    def rewind(self, mark: dict[str, Any]) -> None:
        """See `Logger.rewind`: cuts event files, so that every reader finds each row once.

        A page that is open beside the run takes back what it has read of the lost rows when the
        first new one comes.
        """
        if "files" not in mark:
            if any(self._folder.glob(_FILES)):
                warn_unmarked(self._folder)
            return
        self.close()
        sizes = {
            Path(os.path.abspath(self._root / name)): size for name, size in mark["files"].items()
        }
        self._folders.update(path.parent for path in sizes)
        lost = [path for path in self._files() if path not in sizes]
        for path in lost:
            # A page may stand at the newest file, and where it is gone some pages read no more.
            if path.stat().st_size or path == lost[-1]:
                cut(path, 0)
            else:
                path.unlink()
        for path, size in sizes.items():
            cut(path, size)
        self._purge_step = 1 + max((_last_step(p) for p in sizes if p.exists()), default=-1)

    def _files(self) -> list[Path]:
        return sorted(p for f in self._folders for p in f.glob(_FILES + self._suffix))

    def close(self) -> None:
        """Writes what is queued and closes the event file."""
        try:
            self.flush()
            if self._writer is not None:
                self._writer.close()
        except OSError as error:  # must not hide the error that ended the run
            _log.warning("the last TensorBoard rows could not be written: %s", error)
        finally:
            self._writer, self._rows = None, []

    def _make_writer(self) -> Any:
        """Begins an event file whose name comes after those that are there: readers go by that."""
        make, self._event, self._summary = _import_tensorboard()
        before = {path.name for path in self._folder.glob(_FILES)}
        # A page takes rows back where a session starts, but not at the first start that it sees:
        # so the first file of a folder has one.
        purge = self._purge_step if before else 0
        tries = 0
        while True:
            writer: Any = make(
                str(self._folder),
                purge_step=purge,
                # A queue that is never full: a slow disk must not hold up the loop.
                max_queue=1000,
                flush_secs=_FLUSH_SECS,
                filename_suffix=self._suffix,
            )
            made = {path for path in self._folder.glob(_FILES) if path.name not in before}
            tries += 1
            if not before or tries > 40 or any(path.name > max(before) for path in made):
                self._purge_step = None
                return writer
            # Within a second names are in the order of processes and counters, as text.
            writer.close()
            for path in made:
                path.unlink()
            time.sleep(0.05)


def _last_step(path: Path) -> int:
    """Returns the highest step of an event file."""
    from tensorboard.compat.proto.event_pb2 import Event

    last = 0
    with path.open("rb") as file, contextlib.suppress(Exception):  # what is damaged ends there
        while len(head := file.read(12)) == 12:  # length, checksum, event, checksum
            last = max(last, Event.FromString(file.read(struct.unpack("<Q4x", head)[0])).step)
            file.seek(4, os.SEEK_CUR)
    return last


def _import_tensorboard() -> tuple[Any, Any, Any]:
    """Returns SummaryWriter, Event and Summary, or says how to install them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations among its dependencies are not the user's
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger needs the package tensorboard. Install it "
                "(pip install tensorboard), or choose Trainer(logger=CSVLogger()), "
                f"or logger=False for no files ({error})"
            ) from error
    return SummaryWriter, Event, Summary


def _plain(value: Any) -> int | float | str | None:
    if value is None or (isinstance(value, (int, float, str)) and not isinstance(value, bool)):
        return value  # (the summary would show True as 1)
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
