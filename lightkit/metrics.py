"""What ``self.log`` fills: window means, exact epoch means, torchmetrics objects.

A logged value is put into a list and stays on its device. Every ``log_every_n_steps`` one flush
reads all lists at once (the only host sync of a training step) and makes a row for the loggers:
means over the window. At the end of an epoch or of an evaluation the means over all of it are
made, weighted by the number of samples, in 64 bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit.columns import Column, reduction
from lightkit.data import batch_size_of
from lightkit.errors import LoggingError, NonFiniteError
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from lightkit.history import History
    from lightkit.loggers.base import Logger
    from lightkit.state import TrainState
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Returns scalars as floats: one host sync for each device they are on."""
    out: list[float] = [0.0] * len(values)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append(i)
        else:
            out[i] = value
    devices: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for (device, _), where in groups.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        indices, parts = devices.setdefault(device, ([], []))
        indices += where
        parts.append(torch.stack([values[i] for i in where]).to(wide))  # type: ignore[misc]
    for indices, parts in devices.values():
        numbers = torch.cat(parts).tolist()  # host sync: the one of a flush
        for i, number in zip(indices, numbers, strict=True):
            out[i] = number
    return out


class CallbackMetrics(Mapping[str, Tensor]):
    """``trainer.callback_metrics``: the last logged values, and the means of what has ended.

    Reading never flushes, synchronises or communicates.
    """

    def __init__(self) -> None:
        self._log: MetricLog | None = None
        self.results: dict[str, Tensor] = {}

    def read_from(self, log: MetricLog) -> None:
        """Lets it show what ``log`` is given from now on."""
        self._log = log

    def __getitem__(self, name: str) -> Tensor:
        column = self._log.column(name) if self._log is not None else None
        if column is not None and column.live is not None:
            value = column.live
            if not isinstance(value, Tensor):
                value = column.live = torch.tensor(float(value))
            return value
        return self.results[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.results
        for column in self._log.columns() if self._log is not None else ():
            if column.name not in self.results and column.live is not None:
                yield column.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr({name: self[name] for name in self})


class MetricLog(Callback):
    """All that is logged in one run. A listener after the user's callbacks: it makes the rows.

    Attributes:
        train: Columns of the current training epoch, by name.
        loss: Column of the loss that ``training_step`` returned, in every step, logged or not.
        size: Samples in the current batch where the loader tells, else None.
        batch: The current batch, to ask for its size where the loader does not tell.
        row: The floats of the last row, as written to the loggers.
    """

    order = 40

    def __init__(
        self,
        state: TrainState,
        loggers: Sequence[Logger],
        history: History,
        *,
        every: int,
        stop_on_nan: bool = True,
        scaled: bool = False,
        results: CallbackMetrics | None = None,
    ) -> None:
        self.state, self.loggers, self.history, self.every = state, loggers, history, every
        self.stop_on_nan, self._scaled = stop_on_nan, scaled
        self.train: dict[str, Column] = {}
        self.loss = Column("train_loss", prog_bar=True)
        self.loss_steps: list[int] = []
        self.callback_metrics = CallbackMetrics() if results is None else results
        self.callback_metrics.read_from(self)
        self.row: dict[str, float] = {}
        self.bar: dict[str, float] = {}
        self.batch: Any = None
        self.size: int | None = None
        self.in_step = False
        self.epoch_time: Callable[[], float] = lambda: 0.0
        self._eval: dict[str, Column] = {}
        self._columns: dict[str, Column] | None = None  # where self.log writes now
        self._rename: Callable[[str], str] | None = None
        self._place = "before training"
        self._next_flush = every
        self._epoch_row: dict[str, float] = {}
        self._loader = -1
        self._loader_of: dict[str, int] = {}
        self._eval_steps: dict[str, int] = {}
        self._discard = False
        self._warned_size = False

    # --- what self.log does --------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
    ) -> None:
        """Puts one value into its column; see `TaskModule.log`."""
        columns = self._columns
        if columns is None:
            raise LoggingError(
                f"self.log({name!r}) was called {self._place}, where no epoch is under way that "
                f"the value could belong to. Log in the steps, in the batch hooks, or in "
                f"on_train_epoch_end, on_validation_epoch_end and on_test_epoch_end."
            )
        if self._rename is not None and add_dataloader_idx:
            name = self._rename(name)
        column = columns.get(name)
        if column is None:
            column = self._new(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx)
        if type(value) is Tensor and column.metric is None:
            if value.ndim:
                value = _scalar(name, value)
            if value.requires_grad:
                value = value.detach()
            if value._version:  # changed in place before, so perhaps again: keep what it is now
                value = value.clone()
        elif column.metric is not None or not isinstance(value, (float, int)):
            value = self._unusual(column, name, value)
            if value is None:
                return
        column.values.append(value)
        weight = batch_size if batch_size is not None else self.size
        column.weights.append(weight if weight is not None else self._weight(column))
        column.live = value

    def _new(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
    ) -> Column:
        """Makes the column of a name that was not logged before in this epoch."""
        if not isinstance(name, str) or not name:
            raise LoggingError(f"self.log: the name must be a text, got {name!r}.")
        step_wise = self.in_step and self._columns is self.train
        metric = value if _is_metric(value) else None
        if metric is not None and not hasattr(metric, "items"):
            step_wise = step_wise and getattr(metric, "_forward_cache", None) is not None
        elif metric is not None:
            raise LoggingError(f"self.log({name!r}): log a MetricCollection with self.log_dict.")
        on_step = step_wise if on_step is None else on_step and self.in_step
        column = Column(
            name,
            prog_bar=prog_bar,
            logger=logger,
            on_step=on_step,
            on_epoch=(not on_step) if on_epoch is None else on_epoch,
            reduce=reduction(name, reduce_fx),
            metric=metric,
        )
        assert self._columns is not None
        self._columns[name] = column
        self._loader_of[name] = self._loader
        return column

    def _unusual(self, column: Column, name: str, value: Any) -> Tensor | float | None:
        """Returns what to store for a metric object or a tensor subclass, or None for nothing."""
        if _is_metric(value) != (column.metric is not None):
            raise LoggingError(
                f"self.log({name!r}) was given a metric object and a number under one name. Give "
                f"one of them another name."
            )
        if column.metric is not None:
            column.metric = value
            cache = getattr(value, "_forward_cache", None)
            if not column.on_step or not isinstance(cache, Tensor):
                return None  # only its value over the whole epoch is asked for
            return _scalar(name, cache).detach()
        if isinstance(value, Tensor):
            return _scalar(name, value).detach().clone()
        raise LoggingError(
            f"self.log({name!r}): got {type(value).__name__}, allowed are a number, a tensor with "
            f"one element, or a torchmetrics Metric. For images and texts use "
            f"self.logger.experiment; for several numbers self.log_dict."
        )

    def log_collection(self, collection: Any, **options: Any) -> None:
        """Logs every member of a torchmetrics ``MetricCollection`` under its own name."""
        for name, metric in collection.items(copy_state=False):
            self.log(name, metric, **options)
            assert self._columns is not None
            key = self._rename(name) if self._rename is not None else name
            self._columns[key].owner = collection

    def add_returned(self, prefix: str, name: str, value: Any) -> None:
        """Logs a scalar that a step returned, unless the step logged that name itself."""
        columns, name = self._columns, f"{prefix}_{name}"
        if not isinstance(value, Tensor) or value.numel() != 1 or columns is None:
            return
        column = columns.get(name if self._rename is None else self._rename(name))
        if column is None or column.returned:
            self.log(name, value, prog_bar=name == "val_loss")
            columns[name if self._rename is None else self._rename(name)].returned = True

    def column(self, name: str) -> Column | None:
        """Returns the training column of ``name``; the returned loss where nobody logged it."""
        found = self.train.get(name)
        return self.loss if found is None and name == "train_loss" else found

    def columns(self) -> list[Column]:
        """Returns the training columns, the loss that ``training_step`` returned first."""
        named = list(self.train.values())
        return named if "train_loss" in self.train else [self.loss, *named]

    def add_loss(self, loss: Tensor, weight: Tensor | float | None) -> None:
        """Puts the loss of a batch into its column; called by the loop after every batch."""
        column = self.loss
        column.values.append(loss)
        if weight is None:
            weight = self.size if self.size is not None else self._weight(column)
        column.weights.append(weight)
        column.live = loss
        self.loss_steps.append(self.state.global_step)

    def _weight(self, column: Column) -> int:
        """Returns the number of samples in the batch, or 1 with a warning if nothing tells it."""
        if self.batch is None or column.reduce != "mean":
            return 1
        size = batch_size_of(self.batch)
        if size is None and not self._warned_size:
            self._warned_size = True
            _log.warning(
                "The number of samples in a batch cannot be told: its tensors differ in their "
                "first dimension and the loader does not say. Means count every batch once; give "
                "self.log(..., batch_size=n) for %r and the other names.",
                column.name,
            )
        return 1 if size is None else size

    # --- where we are: called by the loop --------------------------------------------------------

    def begin_epoch(self) -> None:
        """Opens the columns of a training epoch."""
        self._columns, self._rename, self.in_step = self.train, None, False
        self.batch, self.size = None, None

    def begin_eval(
        self, rename: Callable[[str], str] | None = None, *, loader: int = -1, sanity: bool
    ) -> None:
        """Opens the columns of an evaluation (loader -1), or goes on to one of its loaders."""
        if loader < 0:
            self._eval, self._loader_of = {}, {}
        self._loader = loader
        self._columns, self._rename, self._discard = self._eval, rename, sanity
        self.batch, self.size = None, None

    def begin_eval_hooks(self) -> None:
        """From here on names are logged as they are: the epoch-end hooks of an evaluation."""
        self._rename, self._loader, self.in_step = None, -1, False
        self.batch, self.size = None, None

    def close(self, place: str) -> None:
        """From here on logging is an error that names ``place``."""
        self._columns, self._place, self.in_step = None, place, False

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Drops what is logged within: a step that is computed again says nothing new."""
        columns, self._columns = self._columns, {}
        try:
            yield
        finally:
            self._columns = columns

    # --- rows and means --------------------------------------------------------------------------

    def flush(self) -> None:
        """Reads the open window of training, checks it, and writes its row."""
        columns = [c for c in self.columns() if c.values]
        self._fold(columns if self.loss in columns or not self.loss.values else [self.loss, *columns])
        row = {c.step_name: c.window for c in columns if c.on_step and c.logger}
        self.bar.update({c.name: c.window for c in columns if c.prog_bar})
        self._next_flush = (self.state.global_step // self.every + 1) * self.every
        self._write(row)

    def _fold(self, columns: Sequence[Column]) -> None:
        """Reads the values of ``columns`` in one go and adds them to their sums."""
        flat: list[Tensor | float] = []
        for column in columns:
            column.check_unchanged()
            flat += column.values
            flat += [w for w in column.weights if isinstance(w, Tensor)]
        numbers = iter(read(flat))
        for column in columns:
            values = [next(numbers) for _ in column.values]
            weights = [next(numbers) if isinstance(w, Tensor) else w for w in column.weights]
            if column is self.loss:
                self._check_finite(values)
            column.fold(values, weights)

    def _check_finite(self, values: list[float]) -> None:
        steps, self.loss_steps = self.loss_steps, []
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if not bad or (self._scaled and len(bad) < len(values)):
            return  # fp16 overflows now and then, and the scaler skips those steps
        text = (
            f"the training loss became {values[bad[0]]} at step {steps[bad[0]] + 1} "
            f"(epoch {self.state.epoch + 1}; {len(bad)} of the last {len(values)} batches)"
        )
        if self.stop_on_nan:
            raise NonFiniteError(
                f"{text[0].upper()}{text[1:]}. Lower the learning rate, clip gradients "
                f"(gradient_clip_val=1.0), or look for the operation with detect_anomaly=True. "
                f"Trainer(terminate_on_nan=False) trains on."
            )
        _log.warning("%s", text)

    def check_window(self) -> None:
        """Raises where a loss that was not read yet is not finite; before every save."""
        if self.loss.values:
            values = read(self.loss.values)  # host sync: a save reads everything anyway
            kept = self.loss_steps
            try:
                self._check_finite(values)
            finally:
                self.loss_steps = kept

    def reduce(self, *, training: bool) -> None:
        """Makes the means of the columns that are open; called before the epoch-end hooks."""
        if training:
            self.flush()
            columns = self.columns()
        else:
            columns = list(self._eval.values())
            self._fold([c for c in columns if c.values])
        self._compute_metrics(columns)
        for column in columns:
            if column.total is not None and not (self._discard and not training):
                self._store(column)

    def _compute_metrics(self, columns: Sequence[Column]) -> None:
        """Computes the metric objects of an epoch, once each, and reads them in one go."""
        found: list[tuple[Column, Tensor]] = []
        for column in columns:
            metric = column.metric
            if metric is None or not getattr(metric, "update_called", True):
                continue
            value = metric.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise LoggingError(
                    f"self.log({column.name!r}): {type(metric).__name__}.compute() gives no single "
                    f"number. Log its parts in on_validation_epoch_end or on_train_epoch_end."
                )
            found.append((column, value.detach().reshape(())))
        for (column, _), number in zip(found, read([v for _, v in found]), strict=True):
            column.total = number

    def _store(self, column: Column) -> None:
        """Puts the mean of a column where callbacks, the bar and the epoch's row find it."""
        value, results = column.total, self.callback_metrics.results
        assert value is not None
        tensor = torch.tensor(value)
        column.live = None
        results[column.name] = tensor
        if column.on_step and column.on_epoch:
            results[column.epoch_name] = tensor
            results[column.step_name] = torch.tensor(column.window)
        if column.prog_bar:
            self.bar[column.name] = value
        self._epoch_row[column.name] = value

    def _write(self, row: Mapping[str, float]) -> None:
        if not row:
            return
        self.row = dict(row)
        for logger in self.loggers:
            logger.log_metrics({**row, "epoch": self.state.epoch}, self.state.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Makes a row where ``log_every_n_steps`` ends."""
        if self.state.global_step >= self._next_flush:
            self.flush()

    def on_validation_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes in what the epoch-end hooks logged and writes the row of the evaluation."""
        self._end_eval()

    def on_test_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As after a validation."""
        self._end_eval()

    def _end_eval(self) -> None:
        columns = list(self._eval.values())
        late = [c for c in columns if c.values]
        self._fold(late)
        for column in columns:
            if column.total is not None and not self._discard and column in late:
                self._store(column)
        _reset(columns)
        if not self._discard:
            self._write_eval_steps(columns)
            self._write({c.epoch_name: c.total for c in columns if c.logger and c.total is not None})
        self._epoch_row = self._epoch_row if not self._discard else {}

    def _write_eval_steps(self, columns: Sequence[Column]) -> None:
        """Writes each value of ``on_step=True`` names in an evaluation, against its own count."""
        for column in columns:
            if column.on_step and column.logger:
                for value in column.folded:
                    count = self._eval_steps[column.name] = self._eval_steps.get(column.name, 0) + 1
                    for logger in self.loggers:
                        logger.log_metrics({f"{column.name}_step": value}, count)

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes in what the epoch-end hooks logged, writes the epoch's row and the history."""
        columns = self.columns()
        late = [c for c in columns if c.values]
        self._fold(late)
        for column in late:
            self._store(column)
        _reset(columns)
        self._write({
            c.epoch_name: c.total
            for c in columns
            if c.logger and c.on_epoch and c.total is not None
        })  # fmt: skip
        number = self.state.epoch + 1
        entry = {"epoch": number, "step": self.state.global_step, **self._epoch_row}
        entry["time"] = round(self.epoch_time(), 3)
        if self.history and self.history[-1].get("epoch") == number:
            self.history[-1] = entry  # an epoch that an earlier fit left in the middle
        else:
            self.history.append(entry)
        self.clear_epoch()

    def clear_epoch(self) -> None:
        """Forgets the columns of the epoch; their means stay in ``callback_metrics``."""
        self.train.clear()
        self.loss = Column("train_loss", prog_bar=True)
        self.loss_steps, self._epoch_row = [], {}

    def eval_results(self, loaders: int) -> list[dict[str, float]]:
        """Returns the means of the last evaluation, one dict for each of its loaders.

        What was logged in its epoch hooks belongs to no single loader and is in all of them.
        """
        found: list[dict[str, float]] = [{} for _ in range(loaders)]
        for name, column in self._eval.items():
            place = self._loader_of[name]
            for row in found if place < 0 else [found[place]]:
                if column.total is not None:
                    row[name] = column.total
        return found

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns means, sums and the open window, without flushing (rows must not move)."""
        return {
            "results": dict(self.callback_metrics.results),
            "bar": dict(self.bar),
            "epoch_row": dict(self._epoch_row),
            "eval_steps": dict(self._eval_steps),
            "columns": [c.state_dict() for c in self.train.values()],
            "loss": self.loss.state_dict(),
            "loss_steps": list(self.loss_steps),
            "next_flush": self._next_flush,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; metric objects keep their own states."""
        self.callback_metrics.results.update(state_dict["results"])
        self.bar.update(state_dict["bar"])
        self._epoch_row, self._eval_steps = state_dict["epoch_row"], state_dict["eval_steps"]
        self.train.clear()
        for saved in state_dict["columns"]:
            self.train[saved["name"]] = Column.from_state(saved)
        self.loss = Column.from_state(state_dict["loss"])
        self.loss_steps = list(state_dict["loss_steps"])
        self._next_flush = state_dict["next_flush"]


def _reset(columns: Sequence[Column]) -> None:
    for owner in {id(c.owner): c.owner for c in columns if c.owner is not None}.values():
        owner.reset()
    for column in columns:
        if column.metric is not None and column.owner is None:
            column.metric.reset()


def _is_metric(value: Any) -> bool:
    """Tells whether ``value`` is a torchmetrics object, without importing torchmetrics."""
    module = sys.modules.get("torchmetrics")
    return module is not None and isinstance(value, (module.Metric, module.MetricCollection))


def _scalar(name: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise LoggingError(
            f"self.log({name!r}): the value has the shape {tuple(value.shape)}, but one number is "
            f"needed. Take its mean, or log its elements under several names with self.log_dict."
        )
    return value.reshape(())

