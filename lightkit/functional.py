"""`fit`, `evaluate` and `predict` for a plain network: a `SupervisedTask` and a `Trainer` in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from lightkit import console, screen
from lightkit.data.arrays import as_dataset, is_array
from lightkit.data.tensor_loader import TensorLoader
from lightkit.distributed import launched
from lightkit.errors import ConfigError, DataError, did_you_mean
from lightkit.history import History
from lightkit.predictions import on_cpu
from lightkit.supervised import SupervisedTask
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

#: Arguments of Keras, Poutyne and skorch, and what to write here.
_ELSEWHERE = {
    "x": "train=(X, y)",
    "y": "train=(X, y)",
    "validation_data": "val=(X, y), or val= a loader",
    "validation_split": "val=, with data that you split: torch.utils.data.random_split(data, "
    "[0.8, 0.2]), or sklearn.model_selection.train_test_split",
    "validation_freq": "check_val_every_n_epoch",
    "validation_steps": "limit_val_batches",
    "steps_per_epoch": "limit_train_batches",
    "initial_epoch": "ckpt_path='auto', which goes on with the last run",
    "verbose": "enable_progress_bar=False",
    "class_weight": "loss=torch.nn.CrossEntropyLoss(weight=...)",
    "sample_weight": "a data set whose targets hold the weights, and loss= a function of yours",
    "shuffle": "train= a DataLoader of yours; data sets and arrays are shuffled for training alone",
    **dict.fromkeys(("num_workers", "workers"), "train= a DataLoader of yours, with num_workers"),
    "criterion": "loss",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "device": "accelerator='cpu' or 'gpu'",
}


def fit(
    net: nn.Module,
    train: Any,
    val: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = "adamw",
    lr: float | None = None,
    metrics: Any = (),
    scheduler: Callable[..., Any] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    plot: bool = False,
    ckpt_path: str | Path | None = None,
    **options: Any,
) -> History:
    """Trains a network; afterwards it has the weights of the last epoch.

    It is ``Trainer(max_epochs=epochs, **options).fit(SupervisedTask(net, ...), train, val)``, with
    everything that this brings: curves, checkpoints, resuming, many devices.

    Args:
        net: The network; or a `TaskModule`, which brings its own loss, optimizer and metrics.
        train: A loader; or a data set or ``(X, y)`` (tensors, arrays, data frames, lists), of which
            shuffled batches are made.
        val: The same to validate after each epoch, not shuffled; or a dict of several.
        loss: See `SupervisedTask`, as for the next four.
        optimizer: Name, class, function of the parameters, or object.
        lr: The learning rate.
        metrics: Names, objects or functions.
        scheduler: A function of the optimizer, or one such as ``lightkit.one_cycle``.
        epochs: Epochs to train; default: the Trainer's.
        batch_size: Samples in a batch, where loaders are made here; default 32.
        plot: Whether the curves are drawn at the end: ``curves.png`` in the folder of the run, and
            shown in a notebook.
        ckpt_path: Continue from a checkpoint; see `Trainer.fit`.
        options: Arguments of the Trainer.

    Returns:
        One dict of numbers per epoch: "epoch", "train_loss", "val_loss", "train_accuracy", ...

    Raises:
        ConfigError: An argument or a name that does not exist; it names the nearest.
        DataError: Data that cannot be used, or that do not fit the loss.
    """
    _check_names(fit, options)
    given = {"loss": loss, "optimizer": optimizer, "lr": lr, "scheduler": scheduler}
    task = _task(fit, net, {**given, "metrics": metrics})
    if isinstance(task, SupervisedTask) and task.loss is None:
        raise ConfigError("fit needs a loss: a name such as loss='cross_entropy', or a function.")
    batches, val_batches = _training_loaders(train, val, batch_size)
    if plot and find_spec("matplotlib") is None:
        raise ConfigError("plot=True needs matplotlib: pip install 'lightkit[plot]'.")
    trainer = Trainer(max_epochs=epochs, **options)
    history = trainer.fit(task, batches, val_batches, ckpt_path=ckpt_path)
    if plot and history and trainer.is_global_zero:
        _show(history)
    return history


def evaluate(
    net: nn.Module,
    data: Any,
    *,
    loss: Any = None,
    metrics: Any = (),
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """Returns loss and metrics of a network over data, in eval mode; nothing is written.

    Args:
        net: The network; or a `TaskModule`, whose ``test_step`` runs.
        data: A loader, a data set, or ``(X, y)``; or a dict of several, whose names come before
            those of the metrics.
        loss: See `SupervisedTask`; None: metrics alone.
        metrics: Names, objects or functions.
        batch_size: Samples in a batch, where a loader is made here; default 32.
        options: Arguments of the Trainer.

    Returns:
        "loss" and the metrics by their names, exact means over all samples; of a loss that ignores
        or weighs classes, over what counts. What a task of yours logs in a test comes without the
        "test_" of its names.

    Raises:
        ConfigError: Neither loss nor metrics, or a name that does not exist.
        DataError: Data that cannot be used, or that do not fit.
    """
    _check_names(evaluate, options)
    if isinstance(metrics, (list, tuple)) and "loss" in metrics and loss is None:
        raise ConfigError("metrics has 'loss', but there is none. Give loss= a name or a function.")
    task = _task(evaluate, net, {"loss": loss, "metrics": metrics})
    if isinstance(task, SupervisedTask) and task.loss is None and not task.measures:
        raise ConfigError("evaluate needs loss= or metrics=, for example metrics=['accuracy'].")
    if is_array(data):
        raise DataError("data is an array without targets. Write evaluate(net, (X, y), ...).")
    rows = _quiet(options).test(task, _loader(data, "data", batch_size, False), verbose=False)
    found = {name: value for row in rows for name, value in row.items()}
    return {n.removeprefix("test_").replace("/test_", "/", 1): found[n] for n in found}


def predict(net: nn.Module, data: Any, *, batch_size: int | None = None, **options: Any) -> Tensor:
    """Returns the outputs of a network for data, in order and in eval mode, on the CPU.

    Args:
        net: The network; or a `TaskModule`, whose ``predict_step`` runs.
        data: Inputs: X, a data set or a loader; targets that come with them are left out.
        batch_size: Samples in a batch, where a loader is made here; default 32.
        options: Arguments of the Trainer.

    Returns:
        A tensor whose first dimension is that of the samples: what ``forward`` returns, for example
        logits and not probabilities. With several ranks all have all of it.

    Raises:
        DataError: Data that cannot be used, several of them, a loader that shuffles, or outputs
            that are no tensors of one shape.
    """
    _check_names(predict, options)
    if isinstance(data, Mapping):
        raise DataError("predict takes one data set. Call it for each of them.")
    if getattr(data, "shuffle", False) or isinstance(getattr(data, "sampler", None), RandomSampler):
        raise DataError(
            "The loader shuffles, so that no output could be matched with its sample. Give the "
            "data set itself, or a loader with shuffle=False."
        )
    task = net if isinstance(net, TaskModule) else SupervisedTask(net)
    outputs = _quiet(options).predict(task, _loader(data, "data", batch_size, False))
    wrong = [one for one in outputs if not (isinstance(one, Tensor) and one.ndim)]
    if wrong:
        what = "single number" if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
        raise DataError(
            f"predict joins tensors with a row for each sample, but {type(net).__name__} returned a "
            f"{what} for a batch. Use Trainer().predict(task, loader), which returns what each "
            f"batch gave; if it squeezes a batch of one sample, write squeeze(1) in it."
        )
    return torch.cat(on_cpu(outputs))  # waits for the device


def _task(function: Callable[..., Any], net: Any, given: dict[str, Any]) -> TaskModule:
    """Returns a task as it is, and one around a network."""
    if not isinstance(net, TaskModule):
        return SupervisedTask(net, **given)
    defaults = inspect.signature(function).parameters
    for name, value in given.items():
        if value is not defaults[name].default:
            raise ConfigError(
                f"{name}= is for a plain network, but {type(net).__name__} is a TaskModule, which "
                f"brings its own. Leave it out."
            )
    return net


def _training_loaders(train: Any, val: Any, batch_size: int | None) -> tuple[Any, Any]:
    """Returns what the Trainer gets, with batches of data sets and arrays."""
    if is_array(train):
        raise DataError(
            "train is an array without targets. Write fit(net, (X, y), (X_val, y_val), loss=...)."
        )
    batches = _loader(train, "train", batch_size, True)
    val_batches = _loader(val, "val", batch_size, False)
    if batch_size is not None and batches is train and val_batches is val:
        raise ConfigError(
            f"batch_size={batch_size}, but the loaders that were given make the batches. Set it "
            f"there, or give data sets or (X, y)."
        )
    return batches, val_batches


def _loader(data: Any, name: str, batch_size: int | None, shuffle: bool) -> Any:
    """Returns a loader of a data set or of arrays; all else is left to the Trainer."""
    if isinstance(data, (float, int)):
        raise DataError(
            f"{name}={data}: data are never split by themselves. Split them before: "
            f"torch.utils.data.random_split(data, [0.8, 0.2]), or "
            f"sklearn.model_selection.train_test_split(X, y)."
        )
    console.install(launched().rank)  # what is said of the arrays
    size = 32 if batch_size is None else batch_size
    if isinstance(data, Mapping):
        return {key: _loader(value, name, batch_size, shuffle) for key, value in data.items()}
    if isinstance(data, Dataset):
        own_order = isinstance(data, IterableDataset)
        return DataLoader(data, size, shuffle=None if own_order else shuffle)
    if is_array(data):
        return TensorLoader(*as_dataset(data).tensors, batch_size=size)
    if isinstance(data, (tuple, list)) and len(data) == 2 and _is_pair(data):
        return TensorLoader(*as_dataset(*data).tensors, batch_size=size, shuffle=shuffle)
    if isinstance(data, tuple) and any(map(is_array, data)):
        raise DataError(
            f"{name} is a tuple of {len(data)}, but arrays are given as (X, y). For more of them "
            f"write a Dataset; weights of samples can be part of its targets."
        )
    return data


def _is_pair(data: Any) -> bool:
    """Tells whether two things are inputs and targets, not two loaders."""
    if is_array(data[0]) or is_array(data[1]):
        return True
    return isinstance(data, tuple) and not any(
        isinstance(one, (DataLoader, Dataset, TensorLoader)) for one in data
    )


def _quiet(options: dict[str, Any]) -> Trainer:
    """Returns a trainer that leaves nothing behind."""
    nothing = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(**{**nothing, **options})


def _check_names(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises for an argument of another library, or one that is nearer to ours than to the Trainer's."""
    own = [name for name in inspect.signature(function).parameters if name != "options"]
    for name in options:
        if name in _ELSEWHERE:
            raise ConfigError(
                f"{function.__name__} has no argument {name!r}. Write {_ELSEWHERE[name]}."
            )
        near = did_you_mean(name, [*own, *inspect.signature(Trainer.__init__).parameters])
        if any(f"{word!r}" in near for word in own):
            raise ConfigError(f"{function.__name__} has no argument {name!r}.{near}")


def _show(history: History) -> None:
    figure = history.plot(close=True)
    if screen.in_notebook():
        from IPython.display import display

        display(figure)
