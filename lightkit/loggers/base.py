"""What every logger is: rows of numbers and the hyperparameters of a run, written somewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightkit.elsewhere import refuses_unknown

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("lightkit")


class NullExperiment:
    """Takes every call and does nothing: the writer where a run has no folder."""

    def __getattr__(self, name: str) -> NullExperiment:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullExperiment:
        """Takes any call."""
        return self

    def __getitem__(self, key: Any) -> NullExperiment:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@refuses_unknown
class Logger:
    """Writes the rows of a run. Subclass it for a destination of your own.

    The trainer calls `open` when a fit begins, the ``log_`` methods while it runs, `mark` for every
    checkpoint, and `close` at the end, also after an exception. Where a fit goes on in the folder of
    an interrupted run, `rewind` follows `open`. All of them are called on rank zero only; on the
    other ranks there is `follow` instead. Nothing is written for validate, test, predict and
    fast_dev_run.

    Args:
        save_dir: Folder of the user's choice. Rows then go to ``save_dir/name/version``, and the
            trainer keeps everything else of the run there too. None: the trainer's run folder.
        name: Folder below ``save_dir``; None or "" for none.
        version: A number N for ``version_N``, or the folder's name. None: the next free number.
    """

    # Class attributes, so that a subclass need not call super().__init__().
    _save_dir: Path | None = None
    _name: str | None = None
    _version: int | str | None = None
    _run_dir: Path | None = None
    _next_dir: Path | None = None
    _followed: Path | None = None
    _said_unopened: bool = False
    #: What it writes below the run folder; two loggers of one run must not write the same.
    _target: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuses_unknown(cls)

    def __init__(
        self,
        save_dir: str | Path | None = None,
        name: str | None = None,
        version: int | str | None = None,
    ) -> None:
        self._save_dir = None if save_dir is None else Path(save_dir)
        self._name = name
        self._version = version

    @property
    def save_dir(self) -> str | None:
        """The folder given by the user, or None."""
        return None if self._save_dir is None else str(self._save_dir)

    @property
    def name(self) -> str | None:
        """The name given, else that of the run folder's parent; None before a run has a folder."""
        folder = self._run_dir or self._followed
        if self._name is None and self._save_dir is None and folder is not None:
            return folder.parent.name
        return self._name

    @property
    def version(self) -> int | str | None:
        """N where the folder is called ``version_N``, else its name; None before there is one."""
        folder = self._run_dir or self._followed or self.next_dir()
        if folder is None or self._version is not None:
            return self._version
        number = version_of(folder)
        return folder.name if number is None else number

    @property
    def log_dir(self) -> str | None:
        """The folder of the run; before one begins, what the user chose, or None."""
        folder = self._run_dir or self._followed or self.next_dir()
        return None if folder is None else str(folder)

    def next_dir(self) -> Path | None:
        """Returns the folder that the user chose for the next run; None leaves it to the trainer.

        Without a given version each run gets the next free number.
        """
        if self._save_dir is not None and self._next_dir is None:
            parent = self._save_dir / self._name if self._name else self._save_dir
            version = last_version(parent) + 1 if self._version is None else self._version
            folder = f"version_{version}" if isinstance(version, int) else version
            self._next_dir = parent / folder
        return self._next_dir

    @property
    def experiment(self) -> Any:
        """The object that does the writing, for what rows cannot say (images, histograms).

        Where nothing is open (validate without a fit, fast_dev_run, other ranks) it is an object
        that takes every call and does nothing.
        """
        if not self._said_unopened and self._followed is None:
            self._said_unopened = True
            _log.info(
                "%s has no %s here: what is sent to .experiment is dropped",
                type(self).__name__,
                "run folder" if self._run_dir is None else "experiment",
            )
        return NullExperiment()

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """Called when a fit begins, before anything is logged.

        Args:
            run_dir: The folder of the run; it is made if it is missing.
            purge_step: Where a run is continued: the first step that it will make. Lightkit's own
                loggers do not need it, for `rewind` is exact; a service that knows steps only may.
        """
        self._run_dir, self._next_dir = Path(run_dir), None

    def follow(self, run_dir: str | Path) -> None:
        """Called instead of `open` on all ranks but zero: they know the folder and write nothing.

        Args:
            run_dir: The folder of the run, which rank zero has made.
        """
        self._run_dir, self._next_dir, self._followed = None, None, Path(run_dir)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes one row.

        Args:
            metrics: Names and plain numbers (never tensors); nan and inf may be among them.
            step: Optimizer steps completed, the x axis of every curve.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_metrics")

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Writes the hyperparameters, once per fit. Does nothing by default.

        Args:
            params: Names and values; nested mappings are possible.
            metrics: Accepted for ported code and needless: curves are found by themselves.
        """

    def log_graph(self, task: Any) -> None:
        """Writes the graph of the network, where asked for. Does nothing by default."""

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes how the elements of a tensor are distributed. Does nothing by default.

        Args:
            name: What they are.
            values: A floating-point tensor of any shape on the CPU; nan and inf may be in it.
            step: Optimizer steps completed.
        """

    def flush(self) -> None:
        """Hands everything logged so far to the operating system. May be called at any time."""

    def save(self) -> None:
        """The name of ported code for `flush`."""
        self.flush()

    def mark(self) -> dict[str, Any]:
        """Flushes, and returns where the rows stand now; a checkpoint holds it for `rewind`.

        A subclass may return anything that can be stored: numbers, text, tensors, and lists and
        dicts of them. Files named under "files" (relative to the run folder, with their size in
        bytes) are brought to the disk before the checkpoint counts.
        """
        self.flush()
        return {}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Takes back every row that was written after ``mark``; nothing by default.

        Called after `open` and before anything is logged, where a run goes on in its own folder
        from an earlier checkpoint: what the interrupted run wrote later will come again.

        Args:
            mark: What `mark` returned when the checkpoint was made; empty where it holds none.
                Then nothing can be taken back.
        """

    def close(self) -> None:
        """Flushes and releases files. May be called twice, and also after an exception."""
        self.finalize("success")

    def finalize(self, status: str) -> None:
        """Called by `close` with "success": the name of ported loggers for it. Does nothing."""


class FileLogger(Logger):
    """A logger with one file in the run folder, open while a run is; FILE is its name."""

    FILE: str
    _file: IO[Any] | None = None

    @property
    def path(self) -> Path:
        """The file; it exists once a run has begun."""
        return Path(self.log_dir or ".") / self.FILE

    def open(self, run_dir: str | Path, purge_step: int | None = None) -> None:
        """See `Logger.open`: makes the folder, and opens no file yet."""
        self.close()
        super().open(run_dir, purge_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def flush(self) -> None:
        """Hands what is buffered to the operating system."""
        if self._file is not None:
            self._file.flush()

    def mark(self) -> dict[str, Any]:
        """See `Logger.mark`: the length of the file."""
        self.flush()
        if self._file is None:
            return {}
        return {"files": {self.FILE: os.fstat(self._file.fileno()).st_size}}

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def cut(path: Path, size: int) -> None:
    """Cuts a file to ``size`` bytes; never makes it longer, but says that rows are missing."""
    there = path.stat().st_size if path.exists() else 0
    if there > size:
        os.truncate(path, size)
    elif there < size:
        _log.warning(
            "%s has %d bytes where the checkpoint counts on %d: rows of before it are missing",
            path,
            there,
            size,
        )


def warn_unmarked(path: Path) -> None:
    """Says that rows may come twice, for a checkpoint does not know how many there were."""
    _log.warning(
        "%s: the checkpoint does not say how many rows there were, so none is taken back; those "
        "that the interrupted run wrote after it will be there twice",
        path,
    )


def last_version(parent: Path) -> int:
    """Returns the highest N of the folders ``version_N`` in a folder; -1 where there is none."""
    taken = [version_of(folder) for folder in parent.glob("version_*")]
    return max((number for number in taken if number is not None), default=-1)


def version_of(folder: Path) -> int | None:
    """Returns N of a folder called ``version_N``."""
    word, _, number = folder.name.partition("_")
    return int(number) if word == "version" and number.isdigit() else None


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one level of names joined by "/"; other values are kept."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value
    return flat
