"""scikit-learn's estimators around `lightkit.fit`; they need the extra ``lightkit[sklearn]``."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightkit import console, functional, rng
from lightkit.callbacks import EarlyStopping, LambdaCallback
from lightkit.elsewhere import ESTIMATOR, refusal
from lightkit.errors import ConfigError, UsageError, did_you_mean
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.named import optimizer_of
from lightkit.options import listed
from lightkit.signatures import arguments
from lightkit.trainer import Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier
    from sklearn.model_selection import train_test_split
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
except ImportError as error:
    raise ImportError("scikit-learn 1.6 is missing: pip install 'lightkit[sklearn]'") from error


def mlp(in_features: int, out_features: int, hidden: int = 64) -> nn.Sequential:
    """Returns the default module: one hidden layer."""
    into, out = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
    return nn.Sequential(nn.Flatten(), into, nn.ReLU(), out)


class _Estimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
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
        given = {name: value for name, value in locals().items() if name not in ("self", "parts")}
        self.__dict__.update(given | parts)  # checked by fit, as scikit-learn asks for

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns all arguments by name, those of parts if they were given."""
        return {n: v for n, v in vars(self).items() if not (n.startswith("_") or n.endswith("_"))}

    def set_params(self, **params: Any) -> Self:
        """Sets arguments by name; those of parts may be new. `ConfigError` if there is none."""
        self._check_names(params.keys() - self.get_params().keys())
        self.__dict__.update(params)
        return self

    def _check_names(self, names: Any) -> None:
        own = self._get_param_names()
        for name in names:
            if name not in own and not name.startswith(("module__", "optimizer__", "trainer__")):
                raise ConfigError(refusal("There is no argument", name, ESTIMATOR, own))

    def _part(self, part: str, make: Any) -> dict[str, Any]:
        """Returns the arguments that were given for a part, whose names ``make`` has to know."""
        found = {n.removeprefix(part): v for n, v in vars(self).items() if n.startswith(part)}
        known, any_name = arguments(make)
        for name in () if any_name else found.keys() - known.keys():
            raise ConfigError(f"There is no argument {part}{name}.{did_you_mean(name, known)}")
        return found

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803  scikit-learn's name
        """Trains a new module; `ConfigError` for a wrong argument, ``ValueError`` for wrong data."""
        return self._train(X, y)

    def _train(self, X: Any, y: Any, more: bool = False, classes: Any = None) -> Self:  # noqa: N803
        """Trains a new module for all epochs, or with ``more`` the present one for one epoch."""
        self._check_names(self.get_params())
        if isinstance(self.optimizer, Optimizer):
            raise ConfigError(
                "optimizer: give a name, a class or a function, as modules are copied."
            )
        if self.lr is not None and hasattr(self, "optimizer__lr"):
            raise ConfigError("lr and optimizer__lr mean the same: leave out one of them.")
        new = not (more and hasattr(self, "module_"))
        how = {"reset": new, "dtype": self.dtype, "allow_nd": True}
        how |= dict.fromkeys(("multi_output", "y_numeric"), not is_classifier(self))
        X, y = validate_data(self, X, y, **how)  # noqa: N806
        y, outputs = self._targets(y, new, classes)
        seed = check_random_state(self.random_state).randint(2**31 - 1) if new else 0
        callbacks = listed(self.callbacks, Callback, "callbacks")
        callbacks.append(LambdaCallback(on_fit_start=self._go_on))
        with _aside(self.verbose):
            if new:
                rng.seed_everything(seed, verbose=False)
                self._optimizer: Any = None
            else:
                rng.set_rng_state(self._random)
            module = self._new_module(X[0].size, outputs) if new else self.module_
            train, val = ((X, y), None) if more else self._split(X, y, callbacks)
            make = optimizer_of(self.optimizer, self.lr)
            make = functools.partial(make, **self._part("optimizer__", make))
            loss = copy.deepcopy(self.loss) or ("cross_entropy" if is_classifier(self) else "mse")
            how = {"loss": loss, "metrics": self.metrics, "scheduler": self.scheduler}
            how |= {"optimizer": make, "callbacks": callbacks, "epochs": 1 if more else self.epochs}
            rows = functional.fit(module, train, val, **how, **self._options())
            self._random: dict[str, Any] = rng.rng_state()
        self.module_: nn.Module = module.cpu()
        self._optimizer.load_state_dict(self._optimizer.state_dict())  # to the CPU, like the module
        for row in () if new else rows:
            row.update({name: row[name] + self.history_[-1][name] for name in ("epoch", "step")})
        self.history_: History = History([*(() if new else self.history_), *rows])
        return self

    def _split(self, X: Any, y: Any, callbacks: list[Any]) -> tuple[Any, Any]:  # noqa: N803
        """Returns the data to train on and those kept apart, with what stops the fit by them."""
        stop = self.early_stopping
        fraction = 0.1 if self.validation_fraction is None and stop else self.validation_fraction
        if not (fraction or stop):
            return (X, y), None
        how = {"test_size": fraction, "stratify": y if is_classifier(self) else None}
        x, x_val, y, y_val = train_test_split(X, y, **how)
        if stop:
            callbacks.append(EarlyStopping("val_loss", 0, self.n_iter_no_change, restore_best=True))
        return (x, y), (x_val, y_val)

    def _new_module(self, inputs: int, outputs: int) -> nn.Module:
        make = mlp if self.module is None else self.module
        if isinstance(make, nn.Module) and not self._part("module__", dict):
            return copy.deepcopy(make)
        if isinstance(make, nn.Module) or not callable(make):
            what = "a class, a function, or without arguments module__... a module"
            raise ConfigError(f"module is {make!r:.40}, but allowed is {what}.")
        sizes = {"in_features": inputs, "out_features": outputs}
        asked = {name: sizes[name] for name in sizes.keys() & arguments(make)[0]}
        return make(**asked | self._part("module__", make))

    def _go_on(self, trainer: Trainer, task: Any) -> None:
        """Gives the optimizer the state of the one before; its settings are those of today."""
        before, (self._optimizer,) = self._optimizer, trainer.optimizers
        if type(before) is type(self._optimizer):
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({**before.state_dict(), "param_groups": groups})

    def _options(self) -> dict[str, Any]:
        off = ("logger", "enable_checkpointing", "enable_model_summary", "rehearse")
        how = {"enable_progress_bar": self.verbose, "batch_size": self.batch_size}
        if hasattr(self, "trainer__callbacks"):
            raise ConfigError("trainer__callbacks does not exist: write callbacks=[...].")
        return dict.fromkeys(off, False) | how | self._part("trainer__", Trainer)

    def _outputs(self, X: Any) -> Tensor:  # noqa: N803
        """Returns what the module returns for samples, as float32 on the CPU."""
        check_is_fitted(self, "module_")
        X = validate_data(self, X, reset=False, dtype=self.dtype, allow_nd=True)  # noqa: N806
        with _aside(self.verbose):
            outputs = functional.predict(self.module_, X, **self._options())
        self.module_.cpu()
        return outputs.float()


class LightkitClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """Classifies with a module that returns a logit for each class.

    Arguments of the module, the optimizer and `lightkit.Trainer` are given after the name of their
    part: ``module__hidden=9``, ``optimizer__weight_decay=0.1``, ``trainer__accelerator="cpu"``.

    Args:
        module: A class or function that makes a new module for each fit; it gets ``in_features``
            (numbers per sample) and ``out_features`` (classes, or numbers per target) where it has
            such arguments. Or a module, of which each fit trains a copy. None: `mlp`.
        loss: As for `lightkit.fit`; None: "cross_entropy", in the regressor "mse".
        optimizer: As there, like ``lr``, ``scheduler``, ``metrics``, ``epochs``, ``batch_size``.
        early_stopping: Stop when the loss of samples kept apart has not become smaller for
            ``n_iter_no_change`` epochs, with the best weights.
        validation_fraction: How many are kept apart; None: 0.1 with ``early_stopping``, else none.
        callbacks: Callbacks of lightkit.
        dtype: What samples become; "int64" for a module that begins with an embedding.
        random_state: A seed, a ``RandomState``, or None for NumPy's own.
        verbose: Show the progress and what the Trainer says; else warnings alone.

    Attributes: ``module_`` (on the CPU), ``history_`` (one dict per epoch) and ``classes_``.
    """

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:  # noqa: N803
        """Trains for one more epoch; the first call needs ``classes`` if ``y`` lacks some."""
        return self._train(X, y, more=True, classes=classes)

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        """Returns the probability of each class: float32, (samples, classes)."""
        logits = self._outputs(X)
        if logits.shape[1:] != self.classes_.shape:
            wanted = f"a logit for each of {len(self.classes_)} classes (its argument out_features)"
            raise UsageError(f"The module must return {wanted}, not {tuple(logits.shape)}.")
        return logits.softmax(1).numpy()

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Returns the most probable class of each sample."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _targets(self, y: Any, new: bool, classes: Any) -> tuple[Any, int]:
        check_classification_targets(y)
        if new:
            self.classes_ = np.unique(y if classes is None else classes)
        found = y if classes is None else np.union1d(y, classes)
        if (unknown := np.setdiff1d(found, self.classes_)).size:
            raise UsageError(f"y has {unknown}: partial_fit needs classes= in its first call.")
        return np.searchsorted(self.classes_, y), len(self.classes_)


class LightkitRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """Predicts a number or several; arguments and attributes are those of `LightkitClassifier`."""

    def partial_fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Trains for one more epoch."""
        return self._train(X, y, more=True)

    def predict(self, X: Any) -> Any:  # noqa: N803
        """Returns predictions in the shape of the targets, and in their type if it is a float."""
        return self._outputs(X).numpy().reshape(-1, *self._shape).astype(self._dtype)

    def _targets(self, y: Any, new: bool, classes: Any) -> tuple[Any, int]:
        if new:
            self._shape, self._dtype = y.shape[1:], y.dtype if y.dtype.kind == "f" else "float32"
        return (columns := y.astype("float32").reshape(len(y), -1)), columns.shape[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _aside(verbose: bool) -> contextlib.ExitStack:
    """Leaves random states as they were, and lets only warnings through unless told otherwise."""
    console.install()  # first, since it sets the level
    log = logging.getLogger("lightkit")
    with contextlib.ExitStack() as stack:
        stack.enter_context(rng.preserved())
        stack.callback(log.setLevel, log.level)
        log.setLevel(log.level if verbose else max(log.level, logging.WARNING))
        return stack.pop_all()
