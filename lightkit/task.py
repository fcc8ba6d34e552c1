"""`TaskModule`: what the user writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightkit import freezing
from lightkit.data import move_to_device
from lightkit.errors import NotRunningError, UsageError
from lightkit.export import export_onnx, export_task, refuse_torchscript
from lightkit.hook_names import TASK_NAMES, check_hook_names
from lightkit.hparams import HParams, capture, save_hyperparameters
from lightkit.losses import added
from lightkit.task_hooks import ShardingHooks, TaskHooks
from lightkit.task_view import TaskView

if TYPE_CHECKING:
    from lightkit.metrics import MetricLog
    from lightkit.precision import Precision
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class Link:
    """What ties a task to a run. A copy or a pickle of the task is tied to nothing."""

    __slots__ = ("after_backward", "manual", "metrics", "precision", "toggled", "trainer")

    def __init__(self) -> None:
        self.hold()
        self.toggled: list[nn.Parameter] = []

    def hold(
        self,
        trainer: Trainer | None = None,
        metrics: MetricLog | None = None,
        precision: Precision | None = None,
        manual: list[Any] | None = None,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        """Ties the task to these alone. It is in the middle of a call where ``metrics`` is set."""
        self.trainer, self.metrics = trainer, metrics
        self.precision, self.manual = precision, manual
        self.after_backward = after_backward

    def held(self) -> tuple[Any, ...]:
        """Returns what `hold` takes to come back to the present state."""
        return self.trainer, self.metrics, self.precision, self.manual, self.after_backward

    def __deepcopy__(self, memo: Any) -> Link:
        return Link()

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()


@capture
class TaskModule(TaskHooks, ShardingHooks, TaskView):
    """A network together with how it is trained and evaluated. Subclass it.

    Write at least `training_step` and `configure_optimizers`. It stays an ordinary
    ``torch.nn.Module``: outside a run its steps can be called, and what they log goes nowhere.
    Every hook of `lightkit.Callback` can be defined here too, without the arguments trainer and
    task. A method whose name is close to a hook's but is none raises an error when the class is
    made.

    Attributes:
        hparams: The constructor's arguments, captured without further ado; a dict that can also be
            read by attribute.
        automatic_optimization: Set it to False in ``__init__`` to call `manual_backward` and step
            the optimizers of `optimizers` in ``training_step`` yourself.
        example_input_array: An input of ``forward``, for the graph and the model summary.
    """

    hparams: HParams
    automatic_optimization: bool = True
    example_input_array: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_hook_names(cls, TASK_NAMES)

    def __init__(self) -> None:
        super().__init__()
        self._link = Link()

    # --- what the user writes --------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the loss of a batch: called on every rank for each training batch.

        Not needed where all of the loss is what ``on_loss`` adds: by default it is 0.

        Args:
            batch: What the loader gave, on the device; None in a fit without data. May be left out
                of the signature there.
            batch_idx: Its number within the epoch, from 0. May be left out of the signature.

        Returns:
            The loss (a tensor with one element), a mapping with ``"loss"`` and optionally
            ``"weight"`` (the samples or tokens that the loss is the mean of; other scalars in it
            are logged as ``train_<name>``), or None to skip the batch.
        """
        return torch.zeros((), device=self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Called for each validation batch, in eval mode and without gradients.

        A scalar that is returned is logged as ``val_loss``; the scalars of a mapping as
        ``val_<name>``. The signature may have ``dataloader_idx`` as third argument.
        """
        raise NotImplementedError(f"{type(self).__name__} must define validation_step")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Called for each test batch. By default `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Called for each batch of ``predict``. By default ``forward`` of the batch.

        The first element is taken where the batch is a tuple or list, as loaders with targets give.
        """
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, and the schedulers if there are any; see docs/concepts.md."""
        raise NotImplementedError(f"{type(self).__name__} must define configure_optimizers")

    def configure_model(self) -> None:
        """Called once, before the task is moved to its device: build large layers here."""

    def configure_callbacks(self) -> Any:
        """Returns callbacks that this task needs, one or a list; called when a fit begins."""
        return []

    def prepare_data(self) -> None:
        """Called once, on the first process of each machine, before ``setup``: download."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch as it is to be moved; called where the loader gave it."""
        return batch

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Returns the batch on ``device``. By default `lightkit.data.move_to_device`."""
        return move_to_device(batch, device, non_blocking=device.type == "cuda")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Returns the batch as the step gets it; called on the device: augment here."""
        return batch

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any],
    ) -> None:
        """Takes the step; override it to change how. Called with gradients clipped and unscaled.

        ``optimizer_closure`` returns the loss that is there already when first called; on further
        calls it computes the group's loss and gradients again.
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients; override it to change how."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Moves a schedule; override it for one with another signature."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates a loss, scaled already under 16-mixed; override it to change how."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients before a step; override it to change how."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- what the user calls ---------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        *,
        batch_size: int | None = None,
        add_dataloader_idx: bool = True,
        sync_dist: bool = True,
        rank_zero_only: bool = False,
        metric_attribute: str | None = None,
        enable_graph: bool = False,
        sync_dist_group: Any = None,
    ) -> None:
        """Logs a number; outside a run it does nothing.

        The value stays on its device; nothing waits for it. The history and the epoch's line hold
        the exact mean over the epoch of every name, weighted by samples.

        Args:
            name: Its name in curves, bar, history and ``trainer.callback_metrics``.
            value: A number, a tensor with one element, or a torchmetrics ``Metric``, which is
                computed once at the end of the epoch and then reset.
            prog_bar: Whether the progress bar shows it.
            logger: Whether the loggers write it.
            on_step: Whether the loggers write a curve over steps (means over
                ``log_every_n_steps``). Default: in training steps.
            on_epoch: Whether they write a curve over epochs. Default: in evaluations, and where
                ``on_step`` is False. With both, the curves are called ``<name>_step`` and
                ``<name>_epoch``.
            reduce_fx: "mean", "sum", "min", "max", "std" (of the values, each counts once), "last",
                or "running:50": the mean of the last 50 values, which goes on over epochs. A metric
                object reduces by itself.
            batch_size: The samples that the value is the mean of. Default: as the loader's sampler
                says, else the first dimension of the batch's tensors.
            add_dataloader_idx: Whether the loader's name is added where there are several.
            sync_dist: Accepted and needless, like the three last: values are exact over batches and
                ranks, and always detached.
            rank_zero_only: Rank zero alone logs it; it cannot be monitored.
            metric_attribute: See ``sync_dist``.
            enable_graph: See ``sync_dist``.
            sync_dist_group: See ``sync_dist``.

        Raises:
            LoggingError: In a place where it means nothing, or for a value that is no number.
        """
        metrics, add = self._link.metrics, add_dataloader_idx
        if metrics is None:
            return
        if rank_zero_only:
            how = (on_step, on_epoch, reduce_fx, add, batch_size)
            metrics.log_alone(name, value, prog_bar, logger, *how)
            return
        metrics.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add, batch_size)

    def log_dict(self, dictionary: Any, *arguments: Any, **options: Any) -> None:
        """Logs several values at once.

        Args:
            dictionary: Names and values, or a torchmetrics ``MetricCollection``.
            arguments: As for `log`, after the value.
            options: As for `log`.

        Raises:
            LoggingError: As by `log`; it names the value.
        """
        if self._link.metrics is not None:
            for name, value in self._link.metrics.members(dictionary):
                self.log(name, value, *arguments, **options)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates a loss in manual optimization, scaled where the precision asks for it."""
        precision = self._link.precision
        hooks = None if precision is None else self.trainer.session.hooks
        for hook in () if hooks is None else hooks.on_loss:
            loss = added(loss, hook(loss))
        self.backward(loss if precision is None else precision.scaled(loss), *args, **kwargs)
        if self._link.after_backward is not None:
            self._link.after_backward()  # over ranks a collective: averages what it has made

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Returns the optimizer, or the list of them, to step in manual optimization."""
        found = self._link.manual
        if found is None:
            raise NotRunningError("self.optimizers() exists only while fit runs.")
        return found[0] if len(found) == 1 else found

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Lets only this optimizer's parameters learn, until `untoggle_optimizer`.

        The other optimizers' parameters get ``requires_grad=False``, so that a backward in between
        makes no gradients for them.
        """
        self.untoggle_optimizer(optimizer)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = (p for o in self.trainer.optimizers for g in o.param_groups for p in g["params"])
        self._link.toggled = [p for p in others if p.requires_grad and id(p) not in own]
        for parameter in self._link.toggled:
            parameter.requires_grad_(False)

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Lets the parameters learn again that `toggle_optimizer` stopped."""
        for parameter in self._link.toggled:
            parameter.requires_grad_(True)
        self._link.toggled = []

    def lr_schedulers(self) -> Any:
        """Returns the scheduler, the list of them, or None; in manual optimization step them."""
        found = [entry.scheduler for entry in self.trainer.lr_schedulers]
        if not found:
            return None
        return found[0] if len(found) == 1 else found

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients of an optimizer's parameters.

        Args:
            optimizer: Whose parameters are meant.
            gradient_clip_val: The largest norm or value; None: the Trainer's, else nothing.
            gradient_clip_algorithm: "norm" or "value"; None: the Trainer's.
        """
        options, strategy = self.trainer.options, self.trainer.session.strategy
        most = options.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        how = gradient_clip_algorithm or options.gradient_clip_algorithm
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if most is None:
            return
        if self._link.precision is not None:
            self._link.precision.unscale(optimizer)
        if how == "value":
            strategy.clip_grad_value(parameters, most)
        else:
            strategy.clip_grad_norm(parameters, most)

    def save_hyperparameters(
        self, *names: Any, ignore: str | Iterable[str] = (), logger: bool = True, frame: Any = None
    ) -> None:
        """Chooses which constructor arguments stay in ``self.hparams``; all are captured anyway.

        Args:
            names: Names to keep (default: all), or one mapping or Namespace to take instead.
            ignore: Names to drop, one or several.
            logger: Whether loggers shall get them.
            frame: Accepted and needless.

        Raises:
            ConfigError: A name that is no argument of the constructor.
        """
        save_hyperparameters(self, *names, ignore=ignore, logger=logger)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = "cpu",
        strict: bool = True,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Builds the task with the stored arguments and loads its weights.

        Args:
            checkpoint_path: A checkpoint of lightkit or Lightning.
            map_location: The device to put the task on.
            strict: Whether all names and shapes must agree.
            weights_only: Accepted and needless: no file can run code.
            overrides: Arguments that replace stored ones, and those that could not be stored.

        Raises:
            CheckpointError: The file cannot be read, lacks an argument, or does not fit.
        """
        from lightkit import checkpoint

        return checkpoint.load_task(
            cls, checkpoint_path, strict=strict, map_location=map_location, **overrides
        )

    def load_weights(self, path: str | Path, *, strict: bool = True, prefix: str = "") -> None:
        """Loads weights alone, from a checkpoint of lightkit or Lightning or a bare state dict.

        Args:
            path: The file.
            strict: Whether all names and shapes must agree.
            prefix: Take only the names that begin so, without it: "net." for an inner module.

        Raises:
            CheckpointError: The file cannot be read or does not fit; the names are listed.
        """
        from lightkit import checkpoint

        checkpoint.load_weights(self, path, strict=strict, prefix=prefix)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on rank zero, above the progress bar."""
        if self._link.trainer is None or self._link.trainer.is_global_zero:
            _log.info("%s", kwargs.get("sep", " ").join(map(str, args)))

    def freeze(self) -> None:
        """Stops all parameters from learning and goes to eval mode."""
        self.requires_grad_(False)
        self.eval()

    def unfreeze(self) -> None:
        """Lets all parameters learn and goes to train mode."""
        freezing.unfreeze(self)
        self.train()

    export, to_onnx, to_torchscript = export_task, export_onnx, refuse_torchscript


def overrides(task: TaskModule, name: str) -> bool:
    """Tells whether a task defines ``name`` itself."""
    return getattr(type(task), name, None) is not getattr(TaskModule, name, None)


def require_steps(task: object, names: Mapping[str, str]) -> None:
    """Raises where the task lacks a method that the call needs.

    Args:
        task: The task.
        names: Method names, and why each is needed.
    """
    if not isinstance(task, TaskModule):
        hint = " Its steps go into a subclass of lightkit.TaskModule."
        raise UsageError(f"a TaskModule is needed, got {type(task).__name__}.{hint}")
    for name, why in names.items():
        if not overrides(task, name):
            raise UsageError(f"{type(task).__name__} defines no {name}, which {why}.")
