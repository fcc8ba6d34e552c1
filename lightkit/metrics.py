"""What ``self.log`` fills: window means and exact epoch means.

A logged value is put into a list and stays on its device. Every ``log_every_n_steps`` one flush
reads all lists at once (the only host sync of a training step) and makes a row for the loggers:
means over the window. At the end of an epoch or of an evaluation the means over all of it are
made, weighted by the number of samples, in 64 bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit import metric_objects
from lightkit.columns import Column
from lightkit.errors import NonFiniteError
from lightkit.hooks import Callback
from lightkit.readings import CallbackMetrics, read
from lightkit.recording import Recorder

if TYPE_CHECKING:
    from lightkit.history import History
    from lightkit.loggers.base import Logger
    from lightkit.state import TrainState
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
#: Batches after which an evaluation reads its values, so that they do not pile up.
_FOLD_EVERY = 1000


class MetricLog(Recorder, Callback):
    """All that is logged in one run. A listener after the user's callbacks: it makes the rows.

    Attributes:
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
        super().__init__(state)
        self.loggers, self.history, self.every = loggers, history, every
        self.stop_on_nan, self._scaled = stop_on_nan, scaled
        self.callback_metrics = CallbackMetrics() if results is None else results
        self.callback_metrics.read_from(self)
        self.row: dict[str, float] = {}
        self.bar: dict[str, float] = {}
        self.epoch_time: Callable[[], float] = lambda: 0.0
        self._next_flush = every
        self._epoch_row: dict[str, float] = {}
        self._eval_steps: dict[str, int] = {}
        self._eval_rows: list[tuple[dict[str, float], int]] = []

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Remembers the task, whose metric objects a checkpoint takes in."""
        self._task = task

    def begin_eval(
        self, rename: Callable[[str], str] | None = None, *, loader: int = -1, sanity: bool
    ) -> None:
        """Opens the columns of an evaluation (loader -1), or goes on to one of its loaders."""
        if loader > 0:
            self._end_loader()
        super().begin_eval(rename, loader=loader, sanity=sanity)

    # --- rows and means --------------------------------------------------------------------------

    def flush(self) -> None:
        """Reads the open window of training, checks it, and writes its row."""
        columns = [c for c in self.columns() if c.values]
        hidden = self.loss.values and self.loss not in columns  # the user logs train_loss
        self._fold([self.loss, *columns] if hidden else columns)
        self.bar.update({c.name: c.window for c in columns if c.prog_bar})
        self._next_flush = (self.state.global_step // self.every + 1) * self.every
        self._write({c.step_name: c.window for c in columns if c.on_step and c.logger})

    def _fold(self, columns: Sequence[Column]) -> None:
        """Reads the values of ``columns`` in one go and adds them to their sums."""
        flat: list[Tensor | float] = []
        for column in columns:
            column.check_unchanged()
            flat += column.values
            flat += [w for w in column.weights if isinstance(w, Tensor)]
        numbers = iter(read(flat))
        found: list[tuple[Column, list[float], list[float]]] = []
        for column in columns:
            values = [next(numbers) for _ in column.values]
            weights = [next(numbers) if isinstance(w, Tensor) else w for w in column.weights]
            if column is self.loss:
                self._check_finite(values)
                self.loss_steps = []
            elif self._scaled and column.name.startswith("grad_norm"):
                # The scaler skips a step whose gradients overflowed: its norm is that of no step.
                weights = [
                    w if math.isfinite(v) else 0 for v, w in zip(values, weights, strict=True)
                ]
            found.append((column, values, weights))
        for column, values, weights in found:
            column.fold(values, weights)

    def _fold_eval(self) -> None:
        """Reads the values of an evaluation, and writes those of its ``on_step=True`` names."""
        columns = [c for c in self._eval.values() if c.values]
        self._fold(columns)
        for column in columns:
            if column.on_step and column.logger and not self._discard:
                for value in column.folded:  # an evaluation has no steps: they count on their own
                    count = self._eval_steps[column.name] = self._eval_steps.get(column.name, 0) + 1
                    self._eval_rows.append(({column.step_name: value}, count))

    def _end_loader(self) -> None:
        """Computes the metric objects of a loader, which the next one may use again."""
        metrics = [
            c for c in self._eval.values() if c.metric is not None and c.loader == self._loader
        ]
        if metrics:
            self._fold_eval()
            metric_objects.compute(metrics)
            metric_objects.reset(metrics)
            for column in metrics:
                column.metric = None

    def _check_finite(self, values: list[float]) -> None:
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if not bad or (self._scaled and len(bad) < len(values)):
            return  # fp16 overflows now and then, and the scaler skips those steps
        text = (
            f"the training loss became {values[bad[0]]} at step {self.loss_steps[bad[0]] + 1} "
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
            self._check_finite(read(self.loss.values))  # host sync: a save reads everything anyway

    def reduce(self, *, training: bool) -> None:
        """Makes the means of the columns that are open; called before the epoch-end hooks."""
        if training:
            self.flush()
            columns = self.columns()
        else:
            self._fold_eval()
            columns = list(self._eval.values())
        metric_objects.compute(columns)
        self._store(columns)

    def _store(self, columns: Sequence[Column]) -> None:
        """Puts the means of columns where callbacks, the bar and the epoch's row find them."""
        results = self.callback_metrics.results
        for column in columns:
            value, column.live = column.total, None
            if value is None or (self._discard and column.name in self._eval):
                continue
            results[column.name] = tensor = torch.tensor(value)
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
            logger.log_metrics({"epoch": self.state.epoch, **row}, self.state.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Makes a row where ``log_every_n_steps`` ends."""
        if self.state.global_step >= self._next_flush:
            self.flush()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        task: TaskModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reads what has come now and then, so that a long evaluation does not fill the memory."""
        if (batch_idx + 1) % _FOLD_EVERY == 0:
            self._fold_eval()  # host sync: one in that many batches

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes in what the epoch-end hooks logged and writes the row of the evaluation."""
        self._end(list(self._eval.values()))

    def on_test_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """As after a validation."""
        self._end(list(self._eval.values()))

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Takes in what the epoch-end hooks logged, writes the epoch's row and the history."""
        self._end(self.columns())
        number = self.state.epoch + 1
        entry = {"epoch": number, "step": self.state.global_step, **self._epoch_row}
        entry["time"] = round(self.epoch_time(), 3)
        if self.history and self.history[-1].get("epoch") == number:
            self.history[-1] = entry  # an epoch that an earlier fit left in the middle
        else:
            self.history.append(entry)
        self.train.clear()
        self.loss = Column("train_loss", prog_bar=True)
        self.loss_steps, self._epoch_row = [], {}

    def _end(self, columns: Sequence[Column]) -> None:
        """Ends an epoch or an evaluation: takes in what came late, and writes the means."""
        late = [c for c in columns if c.values]
        self._fold(late)
        self._store(late)
        metric_objects.reset(columns)
        rows, self._eval_rows = self._eval_rows, []
        for row, count in rows:  # not earlier: rows of an evaluation that is broken off would stay
            for logger in self.loggers:
                logger.log_metrics(row, count)
        if not (self._discard and self._columns is self._eval):
            shown = [c for c in columns if c.logger and c.on_epoch]
            self._write({c.epoch_name: c.total for c in shown if c.total is not None})

    def eval_results(self, loaders: int) -> list[dict[str, float]]:
        """Returns the means of the last evaluation, one dict for each of its loaders.

        What belongs to no single loader, as what is logged in epoch hooks, is in all of them.
        """
        found: list[dict[str, float]] = [{} for _ in range(loaders)]
        for name, column in self._eval.items():
            for row in found if column.loader < 0 else [found[column.loader]]:
                if column.total is not None:
                    row[name] = column.total
        return found

    def eval_state(self) -> dict[str, Any]:
        """Returns what an evaluation changes, to be put back if it is broken off."""
        states = metric_objects.states(metric_objects.objects(self._task))
        return {"objects": metric_objects.copied(states), "eval_steps": dict(self._eval_steps)}

    def set_eval_state(self, state: dict[str, Any]) -> None:
        """Puts back what `eval_state` returned, and drops the evaluation that was broken off."""
        metric_objects.reset(list(self._eval.values()))  # also those that are no part of the task
        metric_objects.load_states(metric_objects.objects(self._task), state["objects"])
        self._eval_steps = state["eval_steps"]
        self._eval, self._eval_rows = {}, []

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns means, sums and the open window, without flushing (rows must not move)."""
        metrics = metric_objects.objects(self._task)
        names = {id(metric): name for name, metric in metrics.items()}
        known = [c for c in self.train.values() if c.metric is None or id(c.metric) in names]
        return {
            "results": dict(self.callback_metrics.results),
            "bar": dict(self.bar),
            "epoch_row": dict(self._epoch_row),
            "eval_steps": dict(self._eval_steps),
            "columns": [{**c.state_dict(), "metric": names.get(id(c.metric))} for c in known],
            "objects": metric_objects.states(metrics),
            "loss": self.loss.state_dict(),
            "loss_steps": list(self.loss_steps),
            "next_flush": self._next_flush,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        metrics = metric_objects.objects(self._task)
        metric_objects.load_states(metrics, state_dict["objects"])
        self.callback_metrics.results.update(state_dict["results"])
        self.bar.update(state_dict["bar"])
        self._epoch_row = dict(state_dict["epoch_row"])
        self._eval_steps = dict(state_dict["eval_steps"])
        self.train.clear()
        for saved in state_dict["columns"]:
            if saved["metric"] is None or saved["metric"] in metrics:
                column = self.train[saved["name"]] = Column.from_state(saved)
                column.metric = metrics.get(saved["metric"])
        self.loss = Column.from_state(state_dict["loss"])
        self.loss_steps = list(state_dict["loss_steps"])
        self._next_flush = state_dict["next_flush"]
