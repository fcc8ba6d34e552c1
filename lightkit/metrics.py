"""What ``self.log`` fills: window means and exact epoch means.

A logged value is put into a list and stays on its device. Every ``log_every_n_steps`` one flush
reads all lists at once (the only host sync of a training step) and makes a row for the loggers:
means over the window. At the end of an epoch or of an evaluation the means over all of it are
made, weighted by the number of samples, in 64 bit.

With several ranks values stay where they were logged until a flush or the end of an evaluation.
There one exchange makes sums those of all ranks, with the same bits on each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightkit import metric_merging, metric_objects
from lightkit.columns import Column
from lightkit.distributed import Ranks
from lightkit.errors import LoggingError, NonFiniteError
from lightkit.hooks import Callback
from lightkit.readings import CallbackMetrics, read
from lightkit.recording import Recorder
from lightkit.totals import Totals, in_turn
from lightkit.windows import EMPTY, merged, of_one_process

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

    The argument ``share`` is the number of this rank among those that get batches of their own, and
    how many these are. Where they are fewer than all, as in tensor parallelism, the first one of a
    group counts and the others, which see the same batches, are silent.
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
        ranks: Ranks | None = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(state, ranks)
        own, world = self.ranks.rank, self.ranks.world_size
        self._share = (own, world) if share is None else share
        self.silent = own % (world // self._share[1]) != 0
        # None in one process, where sums are those of all anyway.
        self._totals = None
        if world > 1:
            self._totals = Totals(self.ranks, silent=self.silent)
        self.loggers, self.history, self.every = loggers, history, every
        self.stop_on_nan, self._scaled = stop_on_nan, scaled
        self.callback_metrics = CallbackMetrics() if results is None else results
        self.callback_metrics.read_from(self)
        self.row: dict[str, float] = {}
        self.bar: dict[str, float] = {}
        self.epoch_time: Callable[[], float] = lambda: 0.0
        self.note: Callable[[], str] = str  # what the precision says about losses that overflow
        self._next_flush = every
        self._epoch_row: dict[str, float] = {}
        self._eval_steps: dict[str, int] = {}
        self._eval_rows: list[tuple[str, str, float]] = []  # name, name of the curve, value
        self.seen: set[int] = set()  # loaders of the evaluation of which this rank had a batch

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Remembers the task, whose metric objects a checkpoint takes in."""
        self._task = task

    def begin_eval(
        self, rename: Callable[[str], str] | None = None, *, loader: int = -1, sanity: bool
    ) -> None:
        """Opens the columns of an evaluation (loader -1), or goes on to one of its loaders."""
        if loader > 0:
            self._end_loader()
        elif loader < 0:
            self.seen.clear()
        super().begin_eval(rename, loader=loader, sanity=sanity)

    # --- rows and means --------------------------------------------------------------------------

    def flush(self) -> None:
        """Reads the open window of training, checks it, and writes its row."""
        columns = [c for c in self.columns() if c.values]
        hidden = self.loss.values and self.loss not in columns  # the user logs train_loss
        self._fold([self.loss, *columns] if hidden else columns)
        if self._totals is not None:
            columns = self._settle(self.columns(), columns, "training")
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
        numbers = iter(read(flat) if self.waiting is None else self.waiting(read, flat))
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
            if self._totals is None or column.alone:
                column.fold(values, weights)
            else:
                column.keep(values, weights)

    def _settle(
        self, columns: Sequence[Column], folded: Sequence[Column], what: str
    ) -> list[Column]:
        """Makes sums those of all ranks; returns the columns with new values. A collective.

        Args:
            columns: All that are open: also those without a value here, since others may have one.
            folded: Those with values on this rank.
            what: What they are, for messages.
        """
        assert self._totals is not None
        adopt = self._adopt if self._columns is self._eval else None
        names = self._metric_names
        shared = self._totals.settle(columns, what, adopt=adopt, seen=self.seen, names=names)
        return shared + [column for column in folded if column.alone]

    def _metric_names(self) -> dict[int, str]:
        """Returns the names of the metric objects that are modules of the task, by their id."""
        return {id(m): name for name, m in metric_objects.objects(self._task).items()}

    def _adopt(self, described: dict[str, Any]) -> Column:
        """Returns a column of an evaluation that other ranks have, and this one without a batch."""
        options = dict(described)
        loader, returned = options.pop("loader"), options.pop("returned")
        by_metric, name = options.pop("by_metric"), options.pop("metric")
        column = self._eval[options["name"]] = Column(**options)
        column.loader, column.returned, column.by_metric = loader, returned, by_metric
        column.metric = metric_objects.objects(self._task).get(name)
        column.stash = {} if by_metric else None  # what the object holds is of other loaders
        return column

    def _fold_eval(self) -> None:
        """Reads the values of an evaluation, and writes those of its ``on_step=True`` names."""
        columns = [c for c in self._eval.values() if c.values]
        self._fold(columns)
        for column in columns:
            if column.on_step and column.logger and not self._discard:
                rows = [(column.name, column.step_name, value) for value in column.folded]
                self._eval_rows += rows

    def _end_loader(self) -> None:
        """Computes the metric objects of a loader, which the next one may use again."""
        metrics = [
            c for c in self._eval.values() if c.metric is not None and c.loader == self._loader
        ]
        if metrics and self._totals is None:
            self._fold_eval()
            metric_objects.compute(metrics)
            metric_objects.reset(metrics)
            for column in metrics:
                column.metric = None
        elif metrics:  # a rank without a batch is not here, so they wait until all loaders are done
            for column in metrics:
                column.stash = metric_merging.stashed(column.metric)
            metric_objects.reset(metrics)

    def _check_finite(self, values: list[float]) -> None:
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if not bad or (self._scaled and len(bad) < len(values)):
            return  # fp16 overflows now and then, and the scaler skips those steps
        where = "" if self._totals is None else f" on rank {self.ranks.rank}"
        text = (
            f"the training loss became {values[bad[0]]}{where} at step "
            f"{self.loss_steps[bad[0]] + 1} "
            f"(epoch {self.state.epoch + 1}; {len(bad)} of the last {len(values)} batches)"
            f"{self.note()}"
        )
        if self.stop_on_nan:
            error = NonFiniteError(
                f"{text[0].upper()}{text[1:]}. Lower the learning rate, clip gradients "
                f"(gradient_clip_val=1.0), or look for the operation: lightkit replay takes the step "
                f"again, without a run folder detect_anomaly=True tells. "
                f"Trainer(terminate_on_nan=False) trains on."
            )
            error.step = self.loss_steps[bad[0]]
            raise error
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
            if self._totals is not None:
                self._settle(columns, (), "an evaluation")
                columns = list(self._eval.values())  # perhaps with those of other ranks
        if self._totals is None:
            metric_objects.compute(columns)
        else:
            what = "training" if training else "an evaluation"
            metric_merging.compute(columns, self.ranks, what, silent=self.silent)
        self._store(columns)

    def check_shared(self, name: str) -> None:
        """Raises `LoggingError` where a name is monitored that rank zero alone logs.

        On all ranks alike, before one of them misses the name and another does not.
        """
        if name in self.of_zero:
            raise LoggingError(
                f"{name!r} is monitored, but it was logged on rank 0 only. Log it on every rank, and "
                f"without rank_zero_only=True."
            )

    def reduced(self, name: str) -> Tensor | None:
        """Returns a value of ``callback_metrics`` that is the same on all ranks, for decisions.

        Between two flushes the last value of a name is this rank's own; here it is reduced over
        ranks, as the name says. In one process it is that of ``callback_metrics``.

        With several ranks a collective, so all of them must ask for the same name.

        Returns:
            A 0-dim tensor, or None where the name is not logged.

        Raises:
            LoggingError: On all ranks, if only some of them have logged the name.
        """
        self.check_shared(name)
        own = self.callback_metrics.get(name)
        if self._totals is None:
            return own
        column, last = self.column(name), (0.0, 1.0)
        if column is not None:
            weight = column.weights[-1] if column.weights else column.last_weight
            assert column.live is not None
            number, weight = read([column.live, weight])  # host sync: the value is compared
            last = (number, weight)
        here = 2 if column is not None else 0 if own is None else 1
        value = self._totals.reduced(column, last, here, name)
        return own if value is None else torch.tensor(value)

    def _store(self, columns: Sequence[Column]) -> None:
        """Puts the means of columns where callbacks, the bar and the epoch's row find them."""
        results = self.callback_metrics.results
        for column in columns:
            value, column.live = column.total, None
            if value is None:
                continue
            results[column.name] = tensor = torch.tensor(value)
            if column.on_step and column.on_epoch:
                results[column.epoch_name] = tensor
                results[column.step_name] = torch.tensor(column.window)
            if self._discard and column.name in self._eval:  # the sanity check takes them back
                continue
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
        self.tails |= {n: c.tail for n, c in self.train.items() if c.reduce.startswith("running")}
        self.train.clear()
        self.loss = Column("train_loss", prog_bar=True)
        self.loss_steps, self._epoch_row = [], {}

    def _end(self, columns: Sequence[Column]) -> None:
        """Ends an epoch or an evaluation: takes in what came late, and writes the means."""
        late = [c for c in columns if c.values]
        self._fold(late)
        if self._totals is not None:
            late = self._settle(columns, late, "hooks of the end")
            columns = [*columns, *(c for c in late if c not in columns)]  # those of other ranks
        self._store(late)
        metric_objects.reset(columns)
        self._write_eval_rows()
        if not (self._discard and self._columns is self._eval):
            shown = [c for c in columns if c.logger and c.on_epoch]
            self._write({c.epoch_name: c.total for c in shown if c.total is not None})

    def _write_eval_rows(self) -> None:
        """Writes the values of ``on_step=True`` names of an evaluation, in the order of batches.

        Not earlier: rows of an evaluation that is broken off would stay.
        """
        rows, self._eval_rows = self._eval_rows, []
        if self._totals is not None and self._columns is self._eval:
            if any(c.on_step and c.logger and not c.alone for c in self._eval.values()):
                # Collective, for those rare names only.
                own = [] if self.silent else rows
                rows = in_turn(self.ranks.gather(own, "values of steps of an evaluation"))
        for name, curve, value in rows:  # an evaluation has no steps: they count on their own
            count = self._eval_steps[name] = self._eval_steps.get(name, 0) + 1
            for logger in self.loggers:
                logger.log_metrics({curve: value}, count)

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
        """Returns means and sums, which are those of all ranks; nothing is flushed."""
        names = self._metric_names()
        known = [c for c in self.train.values() if c.metric is None or id(c.metric) in names]
        return {
            "results": dict(self.callback_metrics.results),
            "bar": dict(self.bar),
            "epoch_row": dict(self._epoch_row),
            "eval_steps": dict(self._eval_steps),
            "tails": dict(self.tails),
            "columns": [{**c.state_dict(), "metric": names.get(id(c.metric))} for c in known],
            "loss": self.loss.state_dict(),
            "next_flush": self._next_flush,
        }

    def local_state(self) -> dict[str, Any]:
        """Returns what this rank alone has: open windows (rows must not move), metric objects.

        The tensors are the live ones. A checkpoint holds those of all ranks, as "ranks" in the
        state that `load_state_dict` gets. Empty on a rank that repeats another.
        """
        if self.silent:
            return {}
        return {
            "windows": {name: c.window_state() for name, c in self.train.items() if c.values},
            "loss": self.loss.window_state(),
            "loss_steps": list(self.loss_steps),
            "objects": metric_objects.states(metric_objects.objects(self._task)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned, and this rank's share of all ranks' own parts.

        With as many ranks as before each takes its own; otherwise rank k of m takes those of the
        ranks k, k + m and so on, so that nothing is lost or counted twice.
        """
        metrics = metric_objects.objects(self._task)
        states = state_dict["ranks"] if "ranks" in state_dict else [of_one_process(state_dict)]
        first, step = self._share
        own = merged([state for state in states if state][first::step], metrics)
        metric_objects.load_states(metrics, own["objects"])
        self.callback_metrics.results.update(state_dict["results"])
        self.bar.update(state_dict["bar"])
        self._epoch_row = dict(state_dict["epoch_row"])
        self._eval_steps = dict(state_dict["eval_steps"])
        self.tails = dict(state_dict.get("tails", {}))
        self.train.clear()
        for saved in state_dict["columns"]:
            column, metric = Column.from_state(saved), saved["metric"]
            if (metric is None or metric in metrics) and (self.ranks.is_zero or not column.alone):
                self.train[column.name] = column
                column.metric, column.by_metric = metrics.get(metric), metric is not None
                column.set_window(own["windows"].get(column.name, EMPTY))
        self.loss = Column.from_state(state_dict["loss"])
        self.loss.set_window(own["loss"])
        self.loss_steps = list(own["loss_steps"])
        self._next_flush = state_dict["next_flush"]
