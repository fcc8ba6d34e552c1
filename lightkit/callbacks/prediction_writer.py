"""Writes predictions, on each rank its own: to files, or by code of the user's."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import SequentialSampler

from lightkit.checkpoint import read_any, save_file
from lightkit.errors import CheckpointError, ConfigError, one_of
from lightkit.hooks import Callback
from lightkit.predictions import batch_number, in_order, on_cpu
from lightkit.run import EvalRun

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
_NAME = re.compile(r"predictions_rank_(\d{5,})_part_(\d{5,})\.pt")


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns to files, so that no process has to hold all of it.

    Every rank writes its own batches, and `load` puts them together again::

        writer = PredictionWriter("predictions")
        trainer = Trainer(callbacks=[writer])
        trainer.predict(task, loader, return_predictions=False)
        predictions = PredictionWriter.load("predictions")

    With several machines the folder must be one that all of them see. Predictions of an earlier
    call in the same folder are replaced. Nothing is written with ``fast_dev_run``.

    Args:
        output_dir: The folder.
        batches_per_file: After so many batches a rank writes a file and forgets them.

    Raises:
        ConfigError: For arguments that cannot be.
        CheckpointError: During ``predict``, for outputs that cannot be stored (plain types, tensors
            and containers of them can), and where a file cannot be written.
    """

    def __init__(self, output_dir: str | Path, batches_per_file: int = 100) -> None:
        if type(batches_per_file) is not int or batches_per_file < 1:
            raise ConfigError(
                f"PredictionWriter(batches_per_file={batches_per_file!r}): it is a number of "
                f"batches, 1 or more."
            )
        self.output_dir = Path(output_dir)
        self.batches_per_file = batches_per_file
        self._held: list[tuple[int, int, Any]] = []  # loader, number of the batch, outputs
        self._part = 0

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Removes what an earlier prediction left in the folder. Collective."""
        self._held, self._part = [], 0
        if trainer.fast_dev_run:
            return
        if trainer.is_global_zero and self.output_dir.is_dir():
            for path in _files(self.output_dir).values():
                path.unlink()
        trainer.session.strategy.ranks.wait("the folder of predictions")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes in what ``predict_step`` returned, and writes it when there is enough."""
        run = trainer._run
        assert isinstance(run, EvalRun)
        if trainer.fast_dev_run or run.metrics.silent:
            return
        number = batch_number(run, dataloader_idx, batch_idx)
        self._held.append((dataloader_idx, number, on_cpu(outputs)))  # host sync: a copy to the CPU
        if len(self._held) >= self.batches_per_file:
            self._write(trainer, last=False)

    def on_predict_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Writes the rest, and waits until all ranks have done so. Collective."""
        if trainer.fast_dev_run:
            return
        self._write(trainer, last=True)
        trainer.session.strategy.ranks.wait("the files of predictions")
        _log.info("predictions: %s", self.output_dir)

    def _write(self, trainer: Trainer, *, last: bool) -> None:
        """Writes one file of this rank."""
        rank, part = trainer.global_rank, self._part
        content = {
            "rank": rank,
            "world_size": trainer.world_size,
            "part": part,
            "last": last,
            "loaders": len(trainer.num_predict_batches),
            "batches": self._held,
        }
        save_file(content, self.output_dir / f"predictions_rank_{rank:05d}_part_{part:05d}.pt")
        self._held, self._part = [], part + 1

    @staticmethod
    def load(output_dir: str | Path) -> list[Any]:
        """Returns all predictions of a folder, as ``trainer.predict`` would.

        Args:
            output_dir: The folder that a `PredictionWriter` has written to.

        Returns:
            The outputs of all batches in order, tensors on the CPU; for several loaders a list of
            such lists.

        Raises:
            CheckpointError: There are no predictions, some are missing, or a file is damaged.
        """
        folder = Path(output_dir)
        content = {key: read_any(path) for key, path in sorted(_files(folder).items())}
        if not content:
            raise CheckpointError(
                f"There are no predictions in {folder}. PredictionWriter({str(folder)!r}) among the "
                f"callbacks of a Trainer writes them, when trainer.predict runs."
            )
        first = next(iter(content.values()))
        _check_complete(folder, content, first["world_size"])
        found = []
        for loader in range(first["loaders"]):
            of_loader = [
                [(number, output) for one, number, output in part["batches"] if one == loader]
                for part in content.values()
            ]
            found.append(in_order(of_loader))
        return found[0] if len(found) == 1 else found


class BasePredictionWriter(Callback):
    """Hands predictions to code of your own, on each rank those of its batches.

    Override `write_on_batch_end`, `write_on_epoch_end` or both. What needs no code of its own, and
    is to be complete and in order over ranks, is written by `PredictionWriter`.

    Args:
        write_interval: "batch" calls `write_on_batch_end` after every batch, "epoch"
            `write_on_epoch_end` when all are done, "batch_and_epoch" both.

    Raises:
        ConfigError: For another interval.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        known = ("batch", "epoch", "batch_and_epoch")
        one_of("BasePredictionWriter: write_interval", write_interval, known)
        self.interval = write_interval
        self._predictions: list[list[Any]] = []
        self._indices: list[list[Sequence[int] | None]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: TaskModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Override it to write what ``predict_step`` returned for a batch.

        Args:
            trainer: The trainer.
            pl_module: The task.
            prediction: What it returned, on its device.
            batch_indices: The places of its samples in the data set, where the loader goes through
                that in order with batches of one size; else None.
            batch: The batch.
            batch_idx: Its number on this rank.
            dataloader_idx: The number of the loader.
        """

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: TaskModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Override it to write all that this rank has predicted.

        Args:
            trainer: The trainer.
            pl_module: The task.
            predictions: What ``predict_step`` returned for each batch; for several loaders a list
                of such lists.
            batch_indices: For each batch as for `write_on_batch_end`, likewise for each loader.
        """

    def on_predict_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins anew."""
        loaders = range(len(trainer.num_predict_batches))
        self._predictions, self._indices = [[] for _ in loaders], [[] for _ in loaders]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes a batch, or keeps it until the end."""
        run = trainer._run
        assert isinstance(run, EvalRun)
        if run.metrics.silent:  # another rank predicts the same
            return
        indices = _indices(run, dataloader_idx, batch_idx)
        if self.interval != "epoch":
            where = (batch, batch_idx, dataloader_idx)
            self.write_on_batch_end(trainer, task, outputs, indices, *where)
        if self.interval != "batch":
            self._predictions[dataloader_idx].append(outputs)
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Writes what was kept."""
        predictions, indices = self._predictions, self._indices
        self._predictions, self._indices = [], []
        if self.interval != "batch":
            one = len(predictions) == 1
            kept = (predictions[0], indices[0]) if one else (predictions, indices)
            self.write_on_epoch_end(trainer, task, *kept)


def _indices(run: EvalRun, loader: int, batch_idx: int) -> Sequence[int] | None:
    """Returns the places of a batch's samples in the data set; None where they are not known."""
    given, number = run.loaders[loader].loader, batch_number(run, loader, batch_idx)
    size, samples = getattr(given, "batch_size", None), run.metrics.now.size
    plain = isinstance(getattr(given, "sampler", None), SequentialSampler)
    if number < 0 or size is None or samples is None or not plain:
        return None
    return range(number * size, number * size + samples)


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """Returns the files of predictions in a folder by rank and part."""
    found = {}
    for path in folder.glob("predictions_rank_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1]), int(match[2])] = path
    return found


def _check_complete(
    folder: Path, content: dict[tuple[int, int], dict[str, Any]], world_size: int
) -> None:
    """Raises where a file of a rank is missing."""
    for rank in range(world_size):
        parts = [part for of_rank, part in content if of_rank == rank]
        if parts != list(range(len(parts))) or not parts or not content[rank, parts[-1]]["last"]:
            raise CheckpointError(
                f"The predictions in {folder} are not complete: files of rank {rank} of "
                f"{world_size} are missing. The prediction was broken off, is not over yet, or "
                f"the ranks wrote to folders of different machines: predict again, into a folder "
                f"that all of them see."
            )
