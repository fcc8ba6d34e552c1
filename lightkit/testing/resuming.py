"""Proof that a run that was stopped goes on as if it never was."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit import ledger, rng
from lightkit.differences import compare
from lightkit.errors import UsageError
from lightkit.hooks import Callback
from lightkit.task import TaskModule
from lightkit.testing.given import AGAIN, Given, patterns, quiet

if TYPE_CHECKING:
    from lightkit.trainer import Trainer

#: What two runs never have in common: times, and where their files are.
_OWN = (
    "lightkit",
    "loggers",
    "flow.stop_reason",
    "loop.seconds",
    "history.values.time",
    "callbacks.Timer*",
    "callbacks.ModelCheckpoint*",
)


def assert_resumes_exactly(
    task: TaskModule | Callable[[], TaskModule],
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: Any = None,
    max_epochs: int = 2,
    at: int | Iterable[int] | None = None,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    **options: Any,
) -> None:
    """Asserts that a run of this task, stopped anywhere, ends as if it had never been stopped.

    Trains a copy of the task and saves checkpoints on the way: in the first epoch, at its end, and
    in the middle of the second. Then resumes a fresh copy from each, with other random states, and
    compares bit for bit: batches, rows of the loggers, history, weights, buffers, the states of
    optimizers, schedulers, callbacks and metrics, random states.

    What is given stays as it is: each run gets a deep copy. Instead of an object a function that
    makes it may be given, for what cannot be copied. Files go to a temporary folder only, and the
    random states are put back.

    Args:
        task: The task, or a function that returns a new one.
        train_dataloaders: What ``fit`` takes, or a function that returns it.
        val_dataloaders: Likewise.
        datamodule: Likewise, instead of loaders.
        max_epochs: Epochs of the run.
        at: Stop after these optimizer steps instead.
        seed: Seeds the run that is never stopped.
        ignore: Names that may differ, as patterns of `fnmatch` ("callbacks.*.my_clock").
        options: Arguments of the Trainer; ``callbacks`` may be a function too. Folder, loggers,
            bar and summary are always those of the proof.

    Raises:
        AssertionError: Something differs; it says where, what, by how much, and the usual cause.
        UsageError: What was given cannot be tried like this.
    """
    given = Given(task, train_dataloaders, val_dataloaders, datamodule, max_epochs, options)
    with rng.preserved(), quiet(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole = _Life(folder / "whole", given.stops(at))
        whole.run(given, seed)
        whole.check_stops()
        _compare_rests(whole, given, seed, [*_OWN, *patterns(ignore)])


def _compare_rests(whole: _Life, given: Given, seed: int, ignore: list[str]) -> None:
    """Resumes at every place, and raises `AssertionError` at the first that is not exact."""
    for number, place in enumerate(whole.places):
        rest = _Life(whole.folder / f"rest_{number}")
        try:
            rest.run(given, (seed + 1) % (rng.MAX_SEED + 1), place.path)
        except Exception as error:
            raise AssertionError(
                f"Resuming at {place.name} failed: {type(error).__name__}: {error}"
            ) from error
        found = [*_differences(whole, rest, place, ignore)]
        if found:
            again = _Life(whole.folder / "again", whole.stops)
            again.run(given, seed)
            repeats = not any(_differences(whole, again, _START, ignore))
            raise AssertionError(_told(place, found, repeats, given.shared))


# --- runs ----------------------------------------------------------------------------------------


@dataclass
class _Place:
    """Where a checkpoint was taken, and what was seen before it."""

    name: str
    path: Path
    rows: int
    batches: int


_START = _Place("the start", Path(), 0, 0)


@dataclass
class _Life:
    """One run, and what was seen of it."""

    folder: Path
    stops: set[int] | None = None
    places: list[_Place] = field(default_factory=list)
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    batches: list[tuple[str, int]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    def run(self, given: Given, seed: int, ckpt_path: Path | None = None) -> None:
        """Trains until the end."""
        watch = _Watch(self, saves=ckpt_path is None)
        given.fit(watch, self.rows, seed, self.folder, saves=True, ckpt_path=ckpt_path)
        if not self.end:  # a notebook, where Ctrl-C ends fit without an exception
            raise KeyboardInterrupt

    def check_stops(self) -> None:
        """Raises `UsageError` if the run did not come to the places where it was to be stopped."""
        steps = self.end["loop"]["global_step"]
        late = sorted(n for n in self.stops or () if n >= steps)
        if late:
            raise UsageError(f"at={late}: the run ends at step {steps}; stop it before.")
        if not self.places:
            raise UsageError(
                f"The run ended at step {steps}, without a place to stop at before. Give more "
                f"data or a larger max_epochs."
            )


class _Watch(Callback):
    """Looks on after everybody else, and saves where the run shall be stopped."""

    order = 1000

    def __init__(self, life: _Life, saves: bool) -> None:
        self.life, self.saves = life, saves
        self.length: int | None = None
        self.taken: set[str] = set()

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:  # nothing is written elsewhere
            callback._given_dirpath = None

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        name = f"training batch {batch_idx} of epoch {trainer.current_epoch + 1}"
        self.life.batches.append((name, _digest(batch)))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        task: TaskModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:  # a resumed run has none
            name = f"validation batch {batch_idx} after step {trainer.global_step}"
            self.life.batches.append((name, _digest(batch)))

    def on_save_point(self, trainer: Trainer, task: TaskModule) -> None:
        if not (self.saves and self._is_wanted(trainer)):
            return
        epoch, batches = trainer.current_epoch, trainer.state.batch_idx
        where = f"epoch {epoch + 1}, after {batches} batches" if batches else f"epoch {epoch} over"
        assert trainer.run_dir is not None
        # A run folder as a kill would leave it, so that the run goes on in it.
        folder = self.life.folder / f"stopped_{len(self.life.places)}"
        folder.mkdir()
        shutil.copy(trainer.run_dir / ledger.FILE, folder)
        path = folder / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)  # the rows of before are written by it
        name = f"step {trainer.global_step} ({where})"
        self.life.places.append(_Place(name, path, len(self.life.rows), len(self.life.batches)))

    def _is_wanted(self, trainer: Trainer) -> bool:
        if trainer.run_ending:
            return False
        if self.life.stops is not None:
            return trainer.global_step in self.life.stops
        epoch, batches = trainer.current_epoch, trainer.state.batch_idx
        length = self.length or trainer.num_training_batches
        if trainer.epoch_ended:
            here = f"end {epoch}"
        else:
            self.length = max(length or 0, batches)  # where unknown: as long as it was so far
            share = 3 if epoch == 0 else 2
            here = f"within {epoch}" if share * batches >= (length or 0) else ""
        wanted = here in {"within 0", "end 1", "within 1"} - self.taken
        if wanted:
            self.taken.add(here)
        return wanted

    def on_fit_end(self, trainer: Trainer, task: TaskModule) -> None:
        from lightkit import checkpoint

        run: Any = trainer._run
        kept = task.state_dict()
        buffers = {name: b for name, b in task.named_buffers() if name not in kept}
        self.life.end = {
            **checkpoint.collect(run),
            "buffers (persistent=False)": buffers,
            "best scores": [c.best_model_score for c in trainer.checkpoint_callbacks],
        }


def _digest(batch: Any, start: int = 0) -> int:
    """Returns a number that tells batches apart. Objects it does not know count for nothing."""
    if isinstance(batch, Tensor):
        if batch.layout is not torch.strided:
            return start
        flat = batch.detach().cpu().contiguous()
        data = ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size())
        return zlib.crc32(data, start)
    if isinstance(batch, Mapping):
        batch = [*batch.items()]
    if isinstance(batch, (list, tuple)):
        for item in batch:
            start = _digest(item, start)
        return start
    if hasattr(batch, "tobytes"):
        return zlib.crc32(batch.tobytes(), start)
    if isinstance(batch, (str, bytes, int, float)):
        return zlib.crc32(repr(batch).encode(), start)
    return _digest(vars(batch), start) if hasattr(batch, "__dict__") else start


# --- comparison ----------------------------------------------------------------------------------


_NONE = ("no more batches", 0)


def _differences(
    whole: _Life, rest: _Life, place: _Place, ignore: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields what differs between a run and the rest of one, earliest first: a name, and how."""
    for one, two in zip_longest(whole.batches[place.batches :], rest.batches, fillvalue=_NONE):
        if one != two:
            same = one[0] == two[0]
            how = (
                "it holds other data in the resumed run" if same else f"{two[0]} in the resumed run"
            )
            yield one[0], how
            break  # all that come later differ as well
    none: tuple[Any, dict[str, float]] = ("no row", {})
    for (step, row), (other, again) in zip_longest(
        whole.rows[place.rows :], rest.rows, fillvalue=none
    ):
        if step != other:
            yield f"row of step {step}", f"in the resumed run it is that of step {other}"
        else:
            yield from compare(row, again, f"row of step {step}", ignore)
    for part in sorted(whole.end.keys() | rest.end.keys(), key=_rank):
        yield from compare(whole.end.get(part), rest.end.get(part), part, ignore)


def _rank(part: str) -> int:
    """Returns where a part of a checkpoint stands in the report: what people know comes first."""
    known = ("history", "model", "optimizers", "schedulers", "callbacks", "metrics")
    return known.index(part) if part in known else len(known) + (part == "rng")


# --- the report ----------------------------------------------------------------------------------
_DATA = (
    "The data differ before anything is computed from them. Look for a dataset, sampler or "
    "collate_fn with a random generator, counter or cache of its own: let it draw from torch, "
    "numpy.random or random instead, or give the loader state_dict and load_state_dict. Data that are "
    "made or split at random when the run begins need a seed of their own."
)
_TASK = (
    "The data up to there are the same. Look for something of the task that training changes and "
    "that a checkpoint does not hold: a plain Python attribute or tensor (register_buffer, or "
    "on_save_checkpoint and on_load_checkpoint), a generator of its own, a callback without "
    "state_dict."
)
_CALLBACK = (
    "Only callbacks differ. Look for an attribute that state_dict does not hold, or a time in it "
    "(ignore=[...] leaves names out)."
)
_BUFFER = "A buffer with persistent=False is not in a checkpoint: make it persistent if it matters."
_RANDOM = (
    "Only random states differ. Look for random numbers that are drawn once per run, for example "
    "in setup, on_fit_start or on_train_start, or after the training."
)


def _told(
    place: _Place, found: list[tuple[str, str]], repeats: bool, shared: Mapping[str, str]
) -> str:
    """Returns what the error says."""
    names = [name for name, _ in found]
    kinds = {_kind(name) for name in names}
    if not repeats:
        cause = AGAIN
    elif "batch" in kinds:
        cause = _DATA
    elif kinds == {"rng"}:
        cause = _RANDOM
    elif kinds <= {"callbacks", "rng"}:
        cause = _CALLBACK
    else:
        cause = _BUFFER if all("persistent" in kind for kind in kinds) else _TASK
    lines = [f"Stopped and resumed at {place.name}, the run does not end as the whole run does:"]
    first = {_kind(name): f"  {name}: {how}" for name, how in reversed(found)}  # one of each kind
    lines += [first.pop(kind) for kind in [*map(_kind, names)] if kind in first]
    lines += [f"  and {more} more"] if (more := len(found) - len(lines) + 1) else []
    lines.append(cause)
    for name, why in shared.items():
        lines.append(
            f"({name} could not be copied, so the runs shared it: {why}. A function that makes it "
            f"rules that out: {name}=lambda: ...)"
        )
    return "\n".join(lines)


def _kind(name: str) -> str:
    """Returns what sort of thing a name is, all batches being one and all rows being another."""
    return next((k for k in ("batch", "row") if f"{k} " in name[:17]), name.partition(".")[0])
