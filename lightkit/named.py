"""Losses, optimizers and metrics by the names that torch and torchmetrics have for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightkit.errors import ConfigError, did_you_mean

Loss = Callable[..., Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

#: Short names of the field.
_LOSSES = {
    "mae": "l1",
    "binary_cross_entropy": "bce",
    "binary_cross_entropy_with_logits": "bce_with_logits",
    "mean_squared_error": "mse",
    "mean_absolute_error": "l1",
}
#: Names of Keras that mean something else in torch, and what to write.
_KERAS = {
    "sparse_categorical_crossentropy": "'cross_entropy', of a network without softmax at its end",
    "categorical_crossentropy": "'cross_entropy', of a network without softmax at its end",
}
_METRICS = {
    "acc": "Accuracy",
    "f1": "F1Score",
    "auc": "AUROC",
    "mae": "MeanAbsoluteError",
    "mse": "MeanSquaredError",
    "mape": "MeanAbsolutePercentageError",
    "r2": "R2Score",
    "iou": "JaccardIndex",
    "binary_accuracy": "Accuracy",
    "categorical_accuracy": "Accuracy",
    "sparse_categorical_accuracy": "Accuracy",
}


#: Names of targets, which Keras and scikit-learn give first.
_TARGETS = ("y_true", "target", "targets", "label", "labels")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


@functools.cache
def _losses() -> dict[str, tuple[str, type[nn.Module]]]:
    """Returns torch's losses of an output and a target, by plain names, with those to show."""
    found: dict[str, tuple[str, type[nn.Module]]] = {}
    for name in dir(nn):
        kind = getattr(nn, name)
        if not name.endswith("Loss") or len(inspect.signature(kind.forward).parameters) != 3:
            continue
        try:
            kind()
        except TypeError:  # more than a loss: it has layers of its own
            continue
        short = snake(name.removesuffix("Loss"))
        found[_plain(name)] = found[_plain(short)] = short, kind
    for alias, short in _LOSSES.items():
        found[_plain(alias)] = alias, found[_plain(short)][1]
    return found


def loss_of(given: Any) -> Loss:
    """Returns the function of output and target that ``loss=`` means.

    Args:
        given: A name ("cross_entropy", "mse", "bce_with_logits", "CrossEntropyLoss", "mse_loss"),
            a class of a loss, or a function or module that is called with output and target.

    Raises:
        ConfigError: Nothing of this; it names the nearest.
    """
    if isinstance(given, str):
        known = _losses()
        if _plain(given) not in known:
            names = sorted({name for name, _ in known.values()})
            hint = f" Write {_KERAS[given]}." if given in _KERAS else did_you_mean(given, names)
            raise ConfigError(
                f"loss={given!r} is no loss of torch.{hint} There are "
                f"{', '.join(names)}; or give a function loss(output, target)."
            )
        return known[_plain(given)][1]()
    if isinstance(given, type) and issubclass(given, nn.Module):
        return given()
    if not callable(given) or isinstance(given, type):
        raise ConfigError(
            f"loss={given!r:.80} cannot be called. Give a name such as 'cross_entropy', or a "
            f"function or module that takes output and target."
        )
    check_order("loss", given)
    return given  # type: ignore[no-any-return]


def check_order(what: str, function: Any) -> None:
    """Raises `ConfigError` for a function whose first parameter is called like a target."""
    try:
        names = list(inspect.signature(getattr(function, "forward", function)).parameters)
    except (TypeError, ValueError):  # builtins and C functions have no signature
        return
    if len(names) > 1 and names[0] in _TARGETS:
        raise ConfigError(
            f"{what}: a function is called with (output, target), but the first parameter of "
            f"{getattr(function, '__name__', type(function).__name__)} is {names[0]!r}. Turn them "
            f"round, or write lambda output, target: f(target, output)."
        )


def kind_of_loss(loss: Any) -> type[nn.Module] | None:
    """Returns torch's class of a loss, also for its function in torch.nn.functional, or None."""
    kinds = [kind for _, kind in _losses().values()]
    if isinstance(loss, nn.Module):
        return next((kind for kind in kinds if isinstance(loss, kind)), None)
    if getattr(loss, "__module__", "") != "torch.nn.functional":
        return None
    return _losses().get(_plain(loss.__name__), ("", None))[1]


def optimizer_of(given: Any, lr: float | None) -> MakeOptimizer:
    """Returns a function of the parameters that makes the optimizer that ``optimizer=`` means.

    Args:
        given: A name ("adamw", "SGD"), a class of torch.optim, a function of the parameters such as
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``, or an optimizer.
        lr: Its learning rate; None: the default of its own.

    Raises:
        ConfigError: Nothing of this (it names the nearest), or a rate that is no positive number or
            has no meaning.
    """
    if lr is not None and (
        isinstance(lr, bool) or not isinstance(lr, (int, float, Tensor)) or not lr > 0
    ):
        raise ConfigError(
            f"lr={lr!r}: allowed is a positive number; None: the optimizer's default."
        )
    if isinstance(given, Optimizer):
        if lr is not None:
            raise ConfigError(
                f"lr={lr}, but the {type(given).__name__} that was given has its own. Give it "
                f"there, or its name or class here."
            )
        return lambda parameters: given
    make: Any = _optimizer_class(given) if isinstance(given, str) else given
    if not callable(make):
        raise ConfigError(
            f"optimizer={given!r:.80}: allowed are a name such as 'adamw', a class of torch.optim, "
            f"a function of the parameters, and an optimizer."
        )
    return make if lr is None else functools.partial(make, lr=lr)


def _optimizer_class(name: str) -> type[Optimizer]:
    known = {
        _plain(key): (key.lower(), kind)
        for key, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    if _plain(name) not in known:
        names = sorted(key for key, _ in known.values())
        raise ConfigError(
            f"optimizer={name!r} is none of torch.optim.{did_you_mean(name.lower(), names)} There "
            f"are {', '.join(names)}; or give a function that makes one of the parameters."
        )
    return known[_plain(name)][1]


def scheduler_of(given: Any) -> Callable[..., Any] | None:
    """Returns a function of optimizer and trainer that makes what ``scheduler=`` means.

    Args:
        given: A function of the optimizer, or of the optimizer and the trainer, such as
            ``lightkit.one_cycle``; None for none.

    Raises:
        ConfigError: Something else, or a class that has to be told more.
    """
    if given is None:
        return None
    if not callable(given):
        raise ConfigError(
            f"scheduler={given!r:.80}: give a function of the optimizer, such as "
            f"lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10), or lk.one_cycle."
        )
    needed = [
        name
        for name, one in inspect.signature(given).parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(given, type) and needed[1:]:
        raise ConfigError(
            f"scheduler={given.__name__} has to be told {' and '.join(needed[1:])}: "
            f"functools.partial({given.__name__}, {needed[1]}=...)."
        )
    return given if needed[1:] else lambda optimizer, trainer: given(optimizer)


def metric_class(name: str) -> type:
    """Returns the class of torchmetrics that a name means: "accuracy", "f1_score", "AUROC".

    Raises:
        ConfigError: There is none; it names the nearest.
    """
    import torchmetrics

    known = {_plain(key): key for key in torchmetrics.__all__ if key[0].isupper()}
    known |= {_plain(key): _METRICS[key] for key in _METRICS}
    if _plain(name) not in known:
        names = sorted({*_METRICS, *(snake(key) for key in known.values())})
        raise ConfigError(
            f"metrics: {name!r} is no metric of torchmetrics.{did_you_mean(name.lower(), names)} "
            f"Give the name of one, such as 'accuracy', 'f1_score', 'auroc', 'mean_absolute_error' "
            f"or 'r2_score', an object of one, or a function metric(output, target)."
        )
    return getattr(torchmetrics, known[_plain(name)])  # type: ignore[no-any-return]


def snake(name: str) -> str:
    """Returns ``cross_entropy`` for ``CrossEntropy``, and ``bce_with_logits`` for ``BCEWithLogits``."""
    letters = ""
    for i, letter in enumerate(name):
        follows = name[i + 1 : i + 2]
        inner = i > 0 and letter.isupper()
        if inner and (not name[i - 1].isupper() or follows.islower()):
            letters += "_"
        letters += letter.lower()
    return letters
