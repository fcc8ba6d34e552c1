"""`SupervisedTask`: a network with a loss, an optimizer and metrics, given by object or by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightkit import metric_objects, targets
from lightkit.errors import ConfigError, DataError, UsageError
from lightkit.named import (
    check_order,
    kind_of_loss,
    loss_of,
    metric_class,
    optimizer_of,
    scheduler_of,
    snake,
)
from lightkit.task import TaskModule


class SupervisedTask(TaskModule):
    """Trains a network on pairs of inputs and targets.

    An ordinary `TaskModule`: subclass it to change a part, for example `prepare_batch`. It logs
    ``train_loss`` and ``val_loss``, and ``train_<metric>`` and ``val_<metric>`` over each epoch.
    A batch is ``(inputs, target)``; inputs that are a tuple, a list or a dict are the arguments of
    the network.

    Targets are fitted to the losses of torch where only one thing can be meant: class numbers
    become int64, numbers for "mse" and the like floats, and ``(N,)`` stands for ``(N, 1)``.

    Args:
        net: The network.
        loss: A name of torch ("cross_entropy", "mse", "bce_with_logits"), or a function or module
            that is called with output and target and returns the mean. None: only to evaluate.
        optimizer: A name of torch.optim, a class of it, a function of the parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``, or an optimizer.
        lr: Its learning rate; None: the optimizer's default.
        metrics: Names of torchmetrics ("accuracy", "f1_score", "auroc", "r2_score"), objects of
            torchmetrics, functions of output and target whose mean over samples is logged, or a
            mapping of names to these. What a named metric has to know (the task, the number of
            classes) is found with the first batch. Named metrics are means over the classes
            ("macro", as in "micro" all of them are the accuracy), but for the accuracy, which counts
            samples; their other settings are torchmetrics' defaults.
        scheduler: A function of the optimizer, or of the optimizer and the trainer such as
            ``lightkit.one_cycle``. It returns what ``configure_optimizers`` may give as
            "lr_scheduler": a scheduler, or a dict with "scheduler", "interval", "monitor".

    Attributes:
        net: The network.
        loss: The loss as a function or module; None where there is none.
        measures: The names of the metrics.
        metrics: The torchmetrics objects by the names of their curves, made when they are needed.

    Raises:
        ConfigError: A name that does not exist (it names the nearest), or something of another
            type.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        loss: Any = None,
        optimizer: Any = "adamw",
        lr: float | None = None,
        metrics: Any = (),
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = _network(net)
        self.loss = None if loss is None else loss_of(loss)
        self.lr = lr
        self._kind = kind_of_loss(self.loss)
        self._make_optimizer = optimizer_of(optimizer, lr)
        self._make_scheduler = scheduler_of(scheduler)
        self._measured, self._functions = _told_apart(metrics)
        self.measures = [*self._measured, *self._functions]
        self.metrics = nn.ModuleDict()
        self._found: dict[str, Any] | None = None  # what named metrics have to know

    # --- what a subclass may change --------------------------------------------------------------

    def prepare_batch(self, batch: Any) -> tuple[Any, Any]:
        """Returns the inputs of the network and the target of a batch.

        Raises:
            DataError: The batch is no pair.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        what = type(batch).__name__
        if isinstance(batch, (tuple, list, Mapping)):
            what += f" of {len(batch)}" + (f": {list(batch)}" if isinstance(batch, Mapping) else "")
        raise DataError(
            f"A batch must be a pair (inputs, target), where several inputs are a tuple or a dict; "
            f"the loader gave a {what}. Change what the data set returns, or subclass "
            f"lightkit.SupervisedTask and define prepare_batch(self, batch) to return "
            f"(inputs, target)."
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Returns the network's output."""
        return self.net(*inputs, **named)

    def step(self, batch: Any) -> dict[str, Any]:
        """Returns "loss", "output" (detached) and "target" of a batch; the loss only if there is one."""
        inputs, target = self.prepare_batch(batch)
        output = self._output(inputs)
        target = targets.fitted(self._kind, output, target)
        found = {"output": output.detach() if isinstance(output, Tensor) else output}
        found["target"] = target
        if self.loss is not None:
            found["loss"] = self._compared(output, target)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns `step`."""
        if self.loss is None:
            raise UsageError("SupervisedTask(loss=None) can be evaluated only. Give it a loss.")
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns `step`, with "weight" where the loss is no mean over samples; so does a test."""
        found = self.step(batch)
        if not isinstance(found, Mapping) or "loss" not in found:
            return found
        if isinstance(found["loss"], Tensor) and found["loss"].ndim:
            shape = tuple(found["loss"].shape)
            raise UsageError(f"The loss has the shape {shape}. Give one with reduction='mean'.")
        weight = targets.weight_of(self._kind, self.loss, found.get("target"))
        return found if weight is None else {"weight": weight, **found}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns the output; of a batch that is a tuple or list the first part is the inputs."""
        return self._output(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        """Returns the optimizer, with the scheduler if there is one."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        schedule = self._make_scheduler(optimizer, self._link.trainer)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # --- how it is done --------------------------------------------------------------------------

    def _output(self, inputs: Any) -> Any:
        try:
            if isinstance(inputs, (tuple, list)):
                return self(*inputs)
            return self(**inputs) if isinstance(inputs, Mapping) else self(inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            hint = targets.about_inputs(self.net, inputs, str(error))
            if not hint:
                raise
            raise DataError(hint) from error

    def _compared(self, output: Any, target: Any) -> Any:
        try:
            return self.loss(output, target)  # type: ignore[misc]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            hint = targets.about_target(self._kind, output, target, str(error))
            if not hint:
                raise
            raise DataError(hint) from error

    # Metrics count behind the step, so that a compiled step is the network and the loss alone.

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates the metrics of training."""
        self._measure("train", outputs)

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Updates the metrics of validation."""
        self._measure("val", outputs)

    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Updates the metrics of a test."""
        self._measure("test", outputs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what named metrics have found out, so that they are there before their states."""
        if self._found is not None:
            checkpoint["supervised_metrics"] = self._found

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the metrics of training, whose states come next."""
        if "supervised_metrics" in checkpoint:
            self._found = checkpoint["supervised_metrics"]
            for name in self._measured:
                self._metric("train", name)

    def _measure(self, stage: str, outputs: Any) -> None:
        """Updates and logs the metrics of a stage. No host sync."""
        if not self.measures or not isinstance(outputs, Mapping) or "output" not in outputs:
            return  # a subclass that returns something else measures by itself
        output, target = outputs["output"], outputs["target"]
        with torch.no_grad():
            for name, function in self._functions.items():
                self.log(f"{stage}_{name}", function(output, target), on_step=False, on_epoch=True)
            if self._measured and self._found is None:
                self._found = targets.task_of(self._kind, self.loss, output, target)
            output, target = targets.lined_up(output, target)
            for name in self._measured:
                metric = self._metric(stage, name)
                self._update(name, metric, output, target)
                self.log(f"{stage}_{name}", metric, on_step=False, on_epoch=True)

    def _metric(self, stage: str, name: str) -> Any:
        """Returns the metric of a stage, made when it is first asked for."""
        key = f"{stage}_{name}"
        if key not in self.metrics:
            assert self._found is not None
            self.metrics[key] = _made(name, self._measured[name], self._found).to(self.device)
        return self.metrics[key]

    def _update(self, name: str, metric: Any, output: Any, target: Any) -> None:
        try:
            if type(metric).__module__.startswith("torchmetrics.classification"):
                output, target = targets.for_classes(self._kind, output, target)
            metric.update(output, target)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(
                f"The metric {name!r} ({type(metric).__name__}) cannot compare the output "
                f"({targets.seen(output)}) with the target ({targets.seen(target)}): {error}"
            ) from error


def _network(given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    hint = f" Pass an object of it: {given.__name__}(...)." if isinstance(given, type) else ""
    raise ConfigError(f"net={given!r:.80} is no torch.nn.Module.{hint}")


# --- metrics -------------------------------------------------------------------------------------


def _told_apart(given: Any) -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    """Returns classes and objects of torchmetrics, and functions, by their names."""
    named: dict[str, Any] = {}
    if isinstance(given, Mapping) or metric_objects.is_collection(given):
        named = dict(metric_objects.members(given))
    else:
        single = isinstance(given, str) or callable(given)
        for one in (given,) if single else given or ():
            name = one if isinstance(one, str) else _name_of(one)
            if name in named:
                raise ConfigError(
                    f"metrics: two of them are called {name!r}. Give a dict of names and metrics."
                )
            if metric_objects.is_collection(one):
                raise ConfigError("metrics: give a MetricCollection alone, without a list of it.")
            named[name] = one
    kinds: dict[str, Any] = {}
    functions: dict[str, Callable[..., Any]] = {}
    for name, one in named.items():
        if isinstance(one, str) and one == "loss":  # is logged anyway
            continue
        if name == "loss":
            raise ConfigError("metrics: the loss is called 'loss'. Give a metric another name.")
        if isinstance(one, str):
            kinds[name] = metric_class(one)
        elif metric_objects.is_metric(one) or (isinstance(one, type) and hasattr(one, "update")):
            kinds[name] = one
        elif callable(one):
            check_order("metrics", one)
            functions[name] = one
        else:
            raise ConfigError(
                f"metrics: {one!r:.80} is none. Give a name such as 'accuracy', an object of "
                f"torchmetrics, or a function metric(output, target)."
            )
    return kinds, functions


def _name_of(metric: Any) -> str:
    """Returns what the curve of a metric without a name is called."""
    return str(getattr(metric, "__name__", "") or snake(type(metric).__name__))


def _made(name: str, kind: Any, found: dict[str, Any]) -> Any:
    """Returns a metric of its own, of an object or of a class with what the first batch showed."""
    if not isinstance(kind, type):
        return kind.clone()
    known = inspect.signature(kind.__new__).parameters
    if "task" not in known:
        return kind()
    if not found:
        raise UsageError(
            f"The metric {name!r} is one of classes, and how outputs and targets are meant is not "
            f"known without a loss of torch for classes. Give one, or an object such as "
            f"torchmetrics.{kind.__name__}(task='multiclass', num_classes=10)."
        )
    how = dict(found)
    if "average" in known and kind.__name__ != "Accuracy":
        how["average"] = "macro"
    return kind(**how, validate_args=False)  # the checks would wait for the device
