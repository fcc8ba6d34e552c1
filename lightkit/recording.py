"""What ``self.log`` does: puts values into columns, and knows where the loop is."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightkit import metric_merging, metric_objects
from lightkit.columns import Column, reduction, scalar
from lightkit.data import batch_size_of
from lightkit.distributed import Ranks
from lightkit.errors import LoggingError

if TYPE_CHECKING:
    from lightkit.state import TrainState
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")


#: Names that rows and the history have anyway, and what they are.
_TAKEN = {"step": "optimizer steps", "epoch": "the epoch's number", "time": "seconds of the epoch"}


class Now:
    """The batch that the loop is at.

    Attributes:
        batch: The batch, to ask for its size where the loader does not tell.
        size: Samples in it where the loader tells, else None.
    """

    __slots__ = ("batch", "size")

    def __init__(self) -> None:
        self.batch: Any = None
        self.size: int | None = None


class Recorder:
    """Takes in what is logged and what steps return, unread.

    Attributes:
        train: Columns of the current training epoch, by name.
        loss: Column of the loss that ``training_step`` returned, in every step, logged or not.
        tails: Of names logged as running means in training: their last values in epochs before.
        loss_steps: ``global_step`` at each of its values.
        now: The batch that is under way; the loop writes it.
        in_step: Whether values belong to the batches of the loop.
        ranks: The processes of the run. What is logged stays with its rank until it is read.
        silent: Whether another rank sees the same batches, so that this one does not count.
        of_zero: The names that rank zero alone logs, of several; known to all ranks.
        waiting: Calls a function that waits for the device, with its time taken; None to call it.
    """

    def __init__(self, state: TrainState, ranks: Ranks | None = None) -> None:
        self.state = state
        self.ranks = Ranks() if ranks is None else ranks
        self.silent = False
        self.of_zero: set[str] = set()
        self.waiting: Callable[..., list[float]] | None = None
        self.train: dict[str, Column] = {}
        self.loss = Column("train_loss", prog_bar=True)
        self.loss_steps: list[int] = []
        self.tails: dict[str, list[tuple[float, float]]] = {}
        self.now = Now()
        self.in_step = False
        self._task: TaskModule | None = None
        self._own: set[int] | None = None  # where its parameters and buffers lie; None: not known
        self._eval: dict[str, Column] = {}
        self._columns: dict[str, Column] | None = None  # where self.log writes now
        self._rename: Callable[[str], str] | None = None
        self._place = "before the first epoch"
        self._loader = -1
        self._discard = self._alone = False
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
        batch_size: Any = None,
        returned: bool = False,
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
        if column is None or column.returned is not returned:
            column = self._new(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx)
            column.returned = returned
            column.loader = self._loader if add_dataloader_idx else -1
        elif not self.in_step and column.total is not None and column.metric is None:
            raise LoggingError(
                f"self.log({name!r}) was already logged in the steps or before them, and one mean "
                f"cannot hold both. Give one of them another name."
            )
        if type(value) is Tensor and column.metric is None:
            if value.ndim:
                value = scalar(name, value)
            try:  # what was changed in place before, or is part of another, may change again
                keep = value._version == 0 and not value._is_view()
            except RuntimeError:  # made under inference_mode, where versions are not counted
                keep = False
            if value.requires_grad:
                value = value.detach()
            if not keep or column.aliases:
                value = value + 0  # a clone of what inference_mode made would count as changed
        elif column.metric is not None or not isinstance(value, (float, int)):
            value = self._unusual(column, name, value)
            if value is None:
                return
        column.values.append(value)
        weight = batch_size if batch_size is not None else self.now.size
        column.weights.append(weight if weight is not None else self._weight(column))
        column.live = value

    def log_alone(self, name: str, value: Any, *arguments: Any) -> None:
        """Puts a value of rank zero alone into its column; the other ranks log nothing."""
        if self.ranks.world_size > 1:
            renamed = name if self._rename is None else self._rename(name)
            self.of_zero |= {name, renamed}
        if self.ranks.is_zero:
            self._alone = True
            try:
                self.log(name, value, *arguments)
            finally:
                self._alone = False

    members = staticmethod(metric_objects.members)

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
        assert self._columns is not None
        if not isinstance(name, str) or not name:
            raise LoggingError(f"self.log: the name must be a text, got {name!r}.")
        if name in _TAKEN:
            raise LoggingError(
                f"self.log({name!r}): every row has a {name!r} of its own ({_TAKEN[name]}), which "
                f"this one would replace. Give it another name."
            )
        training = self._columns is self.train
        step_wise = self.in_step and training
        metric = value if metric_objects.is_metric(value) else None
        if metric is not None:
            self._check_metric(name, metric, on_step, reduce_fx)
            step_wise = step_wise and metric_objects.last_value(name, metric) is not None
        on_step = step_wise if on_step is None else on_step and self.in_step
        column = self._columns[name] = Column(
            name,
            prog_bar=prog_bar or name == "train_loss",
            logger=logger,
            on_step=on_step,
            on_epoch=(not on_step or not training) if on_epoch is None else on_epoch,
            reduce=reduction(name, reduce_fx),
            metric=metric,
        )
        column.aliases = type(value) is Tensor and self._aliases(value)
        column.alone = self._alone
        if training and column.reduce.startswith("running"):  # it goes on over epochs
            column.tail = self.tails.get(name, [])[-column.length :]
        self._check_clash(column)
        return column

    def _check_clash(self, column: Column) -> None:
        """Raises where two names would be written as one, as "a" in both ways and "a_step"."""
        assert self._columns is not None
        pairs = [(column, name) for name in {column.step_name, column.epoch_name} - {column.name}]
        for end in ("_step", "_epoch"):
            other = self._columns.get(column.name.removesuffix(end))
            if other is not None and column.name in (other.step_name, other.epoch_name):
                pairs.append((other, column.name))
        for both, name in pairs:
            if name in self._columns and both.name != name:
                raise LoggingError(
                    f"self.log({name!r}) and self.log({both.name!r}, on_step=True, on_epoch=True), "
                    f"which is written as {both.step_name!r} and {both.epoch_name!r}, would be one "
                    f"curve. Give one of them another name."
                )

    def _aliases(self, value: Tensor) -> bool:
        """Tells whether a value is the memory of a parameter or buffer, which steps overwrite.

        Fused optimizers do so without counting a version, so it could not be seen afterwards.
        """
        if self._task is None:
            return False
        if self._own is None:
            parts = itertools.chain(self._task.parameters(), self._task.buffers())
            self._own = {_memory(part) for part in parts} - {0}
        return _memory(value) in self._own

    def _check_metric(self, name: str, metric: Any, on_step: bool | None, reduce_fx: Any) -> None:
        """Raises for a metric object that cannot be logged so."""
        if reduction(name, reduce_fx) != "mean":
            raise LoggingError(
                f"self.log({name!r}, reduce_fx={reduce_fx!r}): a metric object makes one number of "
                f"all that it has seen by itself. Leave reduce_fx out, or log the metric's value of "
                f"the batch, metric(preds, target)."
            )
        if metric_objects.is_collection(metric):
            raise LoggingError(f"self.log({name!r}): log a MetricCollection with self.log_dict.")
        others = self.train if self._columns is self._eval else self._eval
        if any(column.metric is metric for column in others.values()):
            raise LoggingError(
                f"self.log({name!r}): the same metric object is logged in training and in "
                f"validation, so each would count the batches of the other. Make two in __init__ "
                f"(metric.clone() copies one)."
            )
        if on_step and self.in_step and metric_objects.last_value(name, metric) is None:
            raise LoggingError(
                f"self.log({name!r}, on_step=True): the metric has no value of this batch, since "
                f"it was updated only. Call it, metric(preds, target), instead of update()."
            )

    def _unusual(self, column: Column, name: str, value: Any) -> Tensor | float | None:
        """Returns what to store for a value that is no plain number; None for nothing."""
        if metric_objects.is_metric(value) != (column.metric is not None):
            raise LoggingError(
                f"self.log({name!r}) was given a metric object and a number under one name. Give "
                f"one of them another name."
            )
        if column.metric is not None:
            if column.metric is not value:
                raise LoggingError(
                    f"self.log({name!r}) was given two metric objects under one name. Keep one in "
                    f"__init__, or give the other another name."
                )
            if self.in_step:  # the value over the whole epoch is computed at its end
                return metric_objects.last_value(name, value) if column.on_step else None
            # an epoch-end hook logs it: those that come after it may ask for its value
            return self._compute_now(column) if column.total is None else None
        if isinstance(value, Tensor):  # a subclass: a Parameter
            return scalar(name, value).detach().clone()
        if isinstance(value, Real):  # numpy's numbers
            return float(value)
        raise LoggingError(
            f"self.log({name!r}): got {type(value).__name__}, allowed are a number, a tensor with "
            f"one element, or a torchmetrics Metric. For images and texts use "
            f"self.logger.experiment; for several numbers self.log_dict."
        )

    def _compute_now(self, column: Column) -> Tensor | float | None:
        """Returns the value of a metric object that a hook logs; a collective over ranks."""
        if self.ranks.world_size == 1:
            return metric_objects.compute_now(column.name, column.metric)
        return metric_merging.values([column], self.ranks, column.name, silent=self.silent)[0]

    def add_returned(self, prefix: str, name: Any, value: Any, weight: Any = None) -> None:
        """Logs a scalar that a step returned, unless the step logged that name itself.

        Anything else, predictions for example, is passed over.
        """
        columns = self._columns
        if columns is None or not (
            value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, (float, int))
        ):
            return
        name = str(name)
        name = name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
        column = columns.get(name if self._rename is None else self._rename(name))
        if column is None or column.returned:
            bar = name == "val_loss"
            if isinstance(weight, Tensor):
                weight = scalar("weight", weight.detach())
            self.log(name, value, prog_bar=bar, batch_size=weight, returned=True)

    def column(self, name: str) -> Column | None:
        """Returns the column of ``name`` if it has a last value that is not reduced yet."""
        for columns in ({} if self._discard else self._eval, self.train):
            column = columns.get(name)
            if column is not None and column.live is not None:
                return column
        own = "train_loss" in self.train
        return (
            self.loss if name == "train_loss" and not own and self.loss.live is not None else None
        )

    def live_names(self) -> list[str]:
        """Returns the names that have a last value that is not reduced yet."""
        names = {"train_loss": None, **self.train, **self._eval}
        return [name for name in names if self.column(name) is not None]

    def columns(self) -> list[Column]:
        """Returns the training columns, the loss that ``training_step`` returned first."""
        named = list(self.train.values())
        return named if "train_loss" in self.train else [self.loss, *named]

    def add_loss(self, loss: Tensor, weight: Tensor | float | None) -> None:
        """Puts the loss of a batch into its column; called by the loop after every batch."""
        column = self.loss
        if loss._version:  # put together in place, as by loss += penalty
            loss = loss.clone()
        column.values.append(loss)
        if weight is None:
            weight = self.now.size if self.now.size is not None else self._weight(column)
        elif isinstance(weight, Tensor):
            weight = scalar("weight", weight.detach())
        column.weights.append(weight)
        column.live = loss
        self.loss_steps.append(self.state.global_step)

    def samples(self) -> int:
        """Returns the samples in the batch under way; 1 where nothing tells."""
        return self.now.size if self.now.size is not None else self._weight(self.loss)

    def _weight(self, column: Column) -> int:
        """Returns the number of samples in the batch, or 1 with a warning if nothing tells it."""
        if self.now.batch is None or not column.weighed:
            return 1
        size = batch_size_of(self.now.batch)
        if size is None and not self._warned_size:
            self._warned_size = True
            _log.warning(
                "The number of samples in a batch cannot be told: its tensors differ in their "
                "first dimension and the loader does not say. Means count every batch once; give "
                "self.log(..., batch_size=n) for %r and the other names.",
                column.name,
            )
        size = self.now.size = 1 if size is None else size  # known now for the next name as well
        return size

    # --- where we are: called by the loop --------------------------------------------------------

    def begin_epoch(self) -> None:
        """Opens the columns of a training epoch."""
        self._columns, self._rename, self._loader = self.train, None, -1
        self._own = None
        self.end_steps()

    def begin_eval(
        self, rename: Callable[[str], str] | None = None, *, loader: int = -1, sanity: bool
    ) -> None:
        """Opens the columns of an evaluation (loader -1), or goes on to one of its loaders."""
        if loader < 0:
            self._eval, self._own = {}, None
        self._columns, self._rename, self._discard = self._eval, rename, sanity
        self._loader = loader
        self.end_steps()

    def begin_eval_hooks(self) -> None:
        """From here on names are logged as they are: the epoch-end hooks of an evaluation."""
        self._rename, self._loader = None, -1
        self.end_steps()

    def begin_steps(self) -> None:
        """From here on values belong to the batches of the loop."""
        self.in_step = True

    def end_steps(self) -> None:
        """From here on values belong to the epoch."""
        self.in_step, self.now.batch, self.now.size = False, None, None

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


def _memory(tensor: Tensor) -> int:
    """Returns where the storage of a tensor lies; 0 for one that has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse tensors, parameters that have no shape yet
        return 0
