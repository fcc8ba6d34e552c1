"""`LightkitClassifier` and `LightkitRegressor`: scikit-learn's estimators on the ordinary loop.

Both make a `SupervisedTask` of a module and train it with a `Trainer`; nothing is written to a disk,
and nothing but warnings is said. They need the extra: ``pip install 'lightkit[sklearn]'``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightkit import console, rng
from lightkit.callbacks import EarlyStopping
from lightkit.data import move_to_device
from lightkit.data.tensor_loader import TensorLoader
from lightkit.errors import ConfigError, UsageError, did_you_mean
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.supervised import SupervisedTask
from lightkit.trainer import Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "lightkit.sklearn needs scikit-learn 1.6 or later: pip install 'lightkit[sklearn]'"
    ) from error

#: Arguments whose first word is one of these go on to the part that it names.
_PARTS = ("module", "optimizer", "trainer")
#: What has an argument of its own here.
_OWN = {
    "optimizer__lr": "lr",
    "trainer__callbacks": "callbacks",
    "trainer__max_epochs": "epochs",
    "trainer__seed": "random_state",
}


class _Estimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """What both estimators have in common; their docstrings name the arguments."""

    _loss: str

    def __init__(
        self,
        module: Any = None,
        *,
        loss: Any = None,
        optimizer: Any = "adamw",
        lr: float | None = None,
        scheduler: Any = None,
        metrics: Any = (),
        epochs: int = 20,
        batch_size: int = 32,
        early_stopping: bool = False,
        validation_fraction: float | None = None,
        n_iter_no_change: int = 5,
        callbacks: Any = None,
        dtype: Any = "float32",
        random_state: Any = None,
        verbose: bool = False,
        **parts: Any,
    ) -> None:
        self.module = module
        self.loss = loss
        self.optimizer = optimizer
        self.lr = lr
        self.scheduler = scheduler
        self.metrics = metrics
        self.epochs = epochs
        self.batch_size = batch_size
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.callbacks = callbacks
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose
        self._set_parts(parts)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns all arguments by name, those of parts (``module__hidden``) among them."""
        parts = {name: value for name, value in vars(self).items() if _is_part(name)}
        return {**super().get_params(deep=deep), **parts}

    def set_params(self, **params: Any) -> Self:
        """Sets arguments by name; those of parts need not have been given before.

        Raises:
            ConfigError: There is none of this name.
        """
        own = self._get_param_names()
        self._set_parts({name: value for name, value in params.items() if name not in own})
        return super().set_params(**{name: params[name] for name in params if name in own})

    def _set_parts(self, parts: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        for name in parts:
            if name in _OWN:
                raise ConfigError(f"{kind} has an argument for {name}: write {_OWN[name]}=.")
            if not _is_part(name):
                hint = did_you_mean(name, self._get_param_names())
                raise ConfigError(
                    f"{kind} has no argument {name!r}.{hint} Arguments of its parts begin with "
                    f"{', '.join(f'{part}__' for part in _PARTS)}."
                )
        vars(self).update(parts)

    def _part(self, part: str) -> dict[str, Any]:
        """Returns the arguments that were given for a part, under their own names."""
        start = f"{part}__"
        found = {name: value for name, value in vars(self).items() if name.startswith(start)}
        return {name.removeprefix(start): value for name, value in found.items()}

    def _module(self, inputs: int, outputs: int) -> nn.Module:
        """Returns the module to train, anew: its factory's, or a copy of the one that was given."""
        given, arguments = self.module, self._part("module")
        if isinstance(given, nn.Module):
            if arguments:
                raise ConfigError(
                    f"module__{next(iter(arguments))} needs a module that is made anew with each "
                    f"fit: give its class or a function, not an object of {type(given).__name__}."
                )
            return copy.deepcopy(given)
        factory = mlp if given is None else given
        names = _names(factory, "module", arguments)
        sizes = {"in_features": inputs, "out_features": outputs}
        made = factory(**{name: sizes[name] for name in sizes if name in names} | arguments)
        if not isinstance(made, nn.Module):
            raise ConfigError(f"module= returned {made!r:.60}, but a torch.nn.Module is needed.")
        return made

    def _fit(self, X: Any, y: Any, epochs: int, fresh: bool, classes: Any = None) -> Self:  # noqa: N803
        fresh = fresh or not hasattr(self, "module_")
        X, y = validate_data(  # noqa: N806
            self, X, y, reset=fresh, dtype=self.dtype, allow_nd=True, **self._y_checks
        )
        y, outputs = self._targets(y, classes, fresh)
        with self._streams(fresh), _said(self.verbose):
            module = self._module(X.shape[1], outputs) if fresh else self.module_
            before = _Before({} if fresh else self._moments)
            callbacks = [*listed(self.callbacks, Callback, "callbacks"), before]
            loaders = self._loaders(X, y, callbacks) if fresh else (self._loader(X, y),)
            trainer = self._trainer(max_epochs=epochs, callbacks=callbacks)
            rows = trainer.fit(self._task(module), *loaders)
