"""scikit-learn's estimators on the ordinary Trainer; they need the extra ``lightkit[sklearn]``."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightkit import console, rng
from lightkit.callbacks import EarlyStopping, LambdaCallback
from lightkit.data import move_to_device
from lightkit.data.tensor_loader import TensorLoader
from lightkit.errors import ConfigError, UsageError, did_you_mean
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.named import optimizer_of
from lightkit.options import listed
from lightkit.signatures import arguments
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

_log = logging.getLogger("lightkit")
_PARTS = ("module__", "optimizer__", "trainer__")
#: Arguments of parts that have a name here.
_OWN = {
    "optimizer__lr": "lr",
    "trainer__callbacks": "callbacks",
    "trainer__max_epochs": "epochs",
    "trainer__seed": "random_state",
}


def mlp(in_features: int, out_features: int, hidden: int | tuple[int, ...] = 64) -> nn.Sequential:
    """Returns the default module; ``hidden`` is the width of its hidden layer, or of several."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (hidden,) if isinstance(hidden, int) else hidden:
        layers += [nn.Linear(in_features, width), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


class _Estimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    _default_loss: ClassVar[str]
    _about_y: ClassVar[dict[str, bool]] = {}

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
        # Kept as they are and checked by fit, as scikit-learn asks for.
        given = {name: value for name, value in locals().items() if name not in ("self", "parts")}
        vars(self).update(given | parts)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns all arguments by name; those of parts if they were given."""
        return {n: v for n, v in vars(self).items() if not (n.startswith("_") or n.endswith("_"))}

    def set_params(self, **params: Any) -> Self:
        """Sets arguments by name; those of parts may be new.

        Raises:
            ConfigError: There is none of such a name.
        """
        self._check_names([name for name in params if name not in self.get_params()])
        vars(self).update(params)
        return self

    def _check_names(self, names: Any) -> None:
        own = self._get_param_names()
        for name in names:
            if name in _OWN or not (name in own or name.startswith(_PARTS)):
                hint = f" Write {_OWN[name]}=." if name in _OWN else did_you_mean(name, own)
                raise ConfigError(f"{type(self).__name__} has no argument {name!r}.{hint}")

    def _part(self, part: str, make: Any = None) -> dict[str, Any]:
        """Returns the arguments that were given for a part, whose names ``make`` has to know."""
        found = {n.removeprefix(part): v for n, v in vars(self).items() if n.startswith(part)}
        known, any_name = ({}, True) if make is None else arguments(make)
        for name in () if any_name else found.keys() - known.keys():
            raise ConfigError(f"{part}{name}: {make} has no {name!r}.{did_you_mean(name, known)}")
        return found

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803  scikit-learn's name
        """Trains a new module.

        Args:
            X: The samples in the first dimension: an array, a data frame, lists.
            y: The targets.

        Raises:
            ConfigError: An argument that cannot be used.
            ValueError: Data that cannot be used.
        """
        return self._train(X, y)

    def _train(self, X: Any, y: Any, more: bool = False, classes: Any = None) -> Self:  # noqa: N803
        """Trains a new module for all epochs, or with ``more`` the present one for one more."""
        self._check_names(self.get_params())
        more = more and hasattr(self, "module_")
        how = {"reset": not more, "dtype": self.dtype, "allow_nd": True}
        X, y = validate_data(self, X, y, **how, **self._about_y)  # noqa: N806
        y, outputs = self._targets(y, more, classes)
        seed = None if more else check_random_state(self.random_state).randint(2**31 - 1)
        callbacks = listed(self.callbacks, Callback, "callbacks")
        with rng.preserved(), _quiet(self.verbose):
            if more:
                rng.set_rng_state(self._random)
                callbacks.append(LambdaCallback(on_fit_start=self._go_on))
            else:
                rng.seed_everything(seed, verbose=False)
            module = self.module_ if more else self._new_module(X[0].size, outputs)
            loaders = self._loaders(X, y, more, callbacks)
            trainer = self._trainer(max_epochs=1 if more else self.epochs, callbacks=callbacks)
            rows = trainer.fit(self._task(module), *loaders)
            self._random = rng.rng_state()
        optimizer, last = trainer.optimizers[0], self.history_[-1] if more else {}
        self._moments = type(optimizer), move_to_device(optimizer.state_dict()["state"], "cpu")
        self.module_ = module.cpu()
        counted = [row | {n: row[n] + last.get(n, 0) for n in ("epoch", "step")} for row in rows]
        self.history_ = History([*(self.history_ if more else []), *counted])
        return self

    def _go_on(self, trainer: Trainer, task: Any) -> None:
        """Gives the optimizer the state of the one before; its settings are those of today."""
        kind, state = self._moments
        optimizer = trainer.optimizers[0]
        if type(optimizer) is kind:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _loaders(self, X: Any, y: Any, more: bool, callbacks: list[Any]) -> list[TensorLoader]:  # noqa: N803
        """Returns the loader to train on, and that to validate on and to stop by if asked for."""
        size, fraction = self.batch_size, self.validation_fraction
        if fraction is None:
            fraction = 0.1 if self.early_stopping else 0
        if more or not (fraction or self.early_stopping):
            return [TensorLoader(X, y, batch_size=size, shuffle=True)]
        stratify = y if is_classifier(self) else None
        x, x_val, y, y_val = train_test_split(X, y, test_size=fraction, stratify=stratify)
        if self.early_stopping:
            how: dict[str, Any] = {"patience": self.n_iter_no_change, "restore_best": True}
            callbacks.append(EarlyStopping("val_loss", **how))
        train = TensorLoader(x, y, batch_size=size, shuffle=True)
        return [train, TensorLoader(x_val, y_val, batch_size=size)]

    def _new_module(self, inputs: int, outputs: int) -> nn.Module:
        make = mlp if self.module is None else self.module
        if isinstance(make, nn.Module):
            for name in self._part("module__"):
                raise ConfigError(
                    f"module__{name} needs a module that is made anew: give its class or a function "
                    f"instead of an object of {type(make).__name__}."
                )
            return copy.deepcopy(make)
        known, _ = arguments(make)
        sizes = {"in_features": inputs, "out_features": outputs}
        asked = {name: size for name, size in sizes.items() if name in known}
        return make(**asked | self._part("module__", make))  # type: ignore[no-any-return]

    def _task(self, module: nn.Module) -> SupervisedTask:
        make: Callable[..., Any] = optimizer_of(self.optimizer, self.lr)
        make = functools.partial(make, **self._part("optimizer__", make))
        loss = self._default_loss if self.loss is None else self.loss
        how = {"metrics": self.metrics, "scheduler": self.scheduler}
        return SupervisedTask(module, loss=loss, optimizer=make, **how)

    def _trainer(self, **options: Any) -> Trainer:
        """Returns a trainer that writes no files."""
        off = ("logger", "enable_checkpointing", "enable_model_summary")
        quiet = dict.fromkeys(off, False) | {"enable_progress_bar": self.verbose}
        return Trainer(**quiet | {"num_sanity_val_steps": 0} | self._part("trainer__") | options)

    def _outputs(self, X: Any) -> Tensor:  # noqa: N803
        """Returns what the module says of samples: float32, on the CPU."""
        check_is_fitted(self, "module_")
        X = validate_data(self, X, reset=False, dtype=self.dtype, allow_nd=True)  # noqa: N806
        with rng.preserved(), _quiet(self.verbose):
            loader = TensorLoader(X, batch_size=self.batch_size)
            outputs = self._trainer().predict(self._task(self.module_), loader)
        self.module_.cpu()
        return torch.cat(outputs).float().cpu()


class LightkitClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """Classifies with a module that returns a logit for each class.

    Arguments of module, optimizer and `lightkit.Trainer` are given with two underscores, also to
    grid searches: ``module__hidden=9``, ``optimizer__weight_decay=0.1``, ``trainer__devices=1``.

    Args:
        module: A class or function that makes the module anew for each fit. Where it has arguments
            ``in_features`` (numbers per sample) and ``out_features`` (classes, or numbers per
            target), they are given. Or a module, of which each fit trains a copy. None: `mlp`.
        loss: As for `lightkit.SupervisedTask`; None: "cross_entropy", of the regressor "mse".
        optimizer: As there; likewise ``lr``, ``scheduler`` and ``metrics``.
        epochs: How often a fit goes over the samples.
        batch_size: Samples in a batch.
        early_stopping: Stop when the loss of samples kept apart no longer falls, with the best weights.
        validation_fraction: How many are kept apart; None: 0.1 with ``early_stopping``, else 0.
        n_iter_no_change: Epochs without a smaller loss before the stop.
        callbacks: Callbacks of lightkit.
        dtype: What samples become; "int64" for a module that begins with an embedding.
        random_state: A seed, a ``RandomState``, or None for NumPy's own.
        verbose: Show the progress and what the Trainer says; else warnings alone.

    Attributes:
        module_: The trained module, on the CPU.
        history_: One dict per epoch, as `lightkit.Trainer.fit` returns them.
        classes_: The classes in the order of their logits; the regressor has none.
    """

    _default_loss = "cross_entropy"

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:  # noqa: N803
        """Trains for one more epoch; ``classes`` names all of them where the first ``y`` lacks some."""
        return self._train(X, y, more=True, classes=classes)

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """Returns the probability of each class, (samples, classes), as float32."""
        logits = self._outputs(X)
        if logits.shape[1:] != self.classes_.shape:
            raise UsageError(
                f"The module returned {tuple(logits.shape)}, but a logit for each of "
                f"{len(self.classes_)} classes is needed. A class or function learns their number "
                f"by an argument out_features."
            )
        return logits.softmax(1).numpy()

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Returns the most probable class of each sample."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _targets(self, y: Any, more: bool, classes: Any) -> tuple[Any, int]:
        check_classification_targets(y)
        if not more:
            self.classes_ = np.unique(y if classes is None else classes)
        if unknown := {*y} - {*self.classes_}:
            raise UsageError(
                f"y has {unknown}, and the classes are {[*self.classes_]}. Name all in the first "
                f"call: partial_fit(X, y, classes=...)."
            )
        return np.searchsorted(self.classes_, y), len(self.classes_)


class LightkitRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """Predicts a number or several; arguments and attributes are those of `LightkitClassifier`."""

    _default_loss = "mse"
    _about_y = {"multi_output": True, "y_numeric": True}

    def partial_fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Trains for one more epoch."""
        return self._train(X, y, more=True)

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Returns the predictions in the shape of the targets, and in their type if it is a float."""
        outputs = self._outputs(X).numpy()
        return outputs.reshape(-1, *self._shape).astype(self._dtype)

    def _targets(self, y: Any, more: bool, classes: Any) -> tuple[Any, int]:
        if not more:
            self._shape, self._dtype = y.shape[1:], y.dtype if y.dtype.kind == "f" else "float32"
        columns = y.astype("float32").reshape(len(y), -1)
        return columns, columns.shape[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Lets only warnings through, unless told otherwise."""
    console.install()  # first, since it sets the level
    level = _log.level
    _log.setLevel(level if verbose else max(level, logging.WARNING))
    try:
        yield
    finally:
        _log.setLevel(level)
