"""The Trainer's arguments, checked: what is wrong by itself or contradicts another is said early."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lightkit import hints
from lightkit.data import limited
from lightkit.distributed import Strategy, check_strategy
from lightkit.elsewhere import ARGUMENTS, CALL_ARGUMENTS, refusal
from lightkit.errors import ConfigError, did_you_mean
from lightkit.hooks import Callback
from lightkit.limits import make_cadence
from lightkit.loggers.base import Logger
from lightkit.precision import resolve_precision

P = ParamSpec("P")
R = TypeVar("R")

#: The field's arguments whose usual value asks for nothing: accepted with it, so code can be ported.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "barebones": (False,),
    "enable_autolog_hparams": (True, False),
    "inference_mode": (True, False),
    "model_registry": (None,),
    "plugins": (None, []),
}
#: Those whose default is None elsewhere, as written settings hold it: the default is meant.
_UNSET = (
    *("enable_checkpointing", "enable_model_summary", "enable_progress_bar"),
    *("gradient_clip_algorithm", "log_every_n_steps", "precision"),
)


def known_names(init: Callable[P, R]) -> Callable[P, R]:
    """Makes an unknown keyword of a constructor an error that names the nearest valid one."""
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1:
            raise ConfigError(
                "Trainer takes keyword arguments only, such as Trainer(max_epochs=3)."
            )
        for name in [n for n in kwargs if n not in names]:
            value: Any = kwargs.pop(name)
            if any(value is nothing or value == nothing for nothing in _NOTHING.get(name, ())):
                continue
            text = refusal("Trainer has no argument", name, ARGUMENTS, names)
            if name in _NOTHING:
                text = (
                    f"Trainer has no argument {name!r}. {name}={value!r} asks for what is not in "
                    f"this version; leave it out."
                )
            raise ConfigError(text)
        for name in _UNSET:
            if kwargs.get(name, name) is None:
                del kwargs[name]
        return init(*args, **kwargs)

    return checked


def refuse_unknown(call: Callable[..., Any], unknown: dict[str, Any]) -> None:
    """Raises `ConfigError` for keywords that an entry point of the Trainer does not have."""
    unknown.pop("weights_only", None)  # needless, so code can be ported: no file runs code here
    for name in unknown:
        what, known = f"Trainer.{call.__name__} has no argument", inspect.signature(call).parameters
        raise ConfigError(refusal(what, name, CALL_ARGUMENTS, known))


@dataclass(frozen=True)
class Options:
    """Every argument of the Trainer under its own name; `Trainer` documents them."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int | None
    min_steps: int | None
    max_time: str | timedelta | dict[str, int] | None
    accelerator: str
    devices: int | str | list[int]
    gpus: int | list[int] | None
    num_nodes: int | None
    strategy: str | Strategy
    sync_batchnorm: bool
    use_distributed_sampler: bool
    precision: str | int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    val_check_interval: int | float | str | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | None
    rehearse: bool | None
    log_every_n_steps: int
    callbacks: Any
    logger: Any
    enable_progress_bar: bool
    enable_checkpointing: bool
    enable_model_summary: bool
    default_root_dir: str | Path | None
    fast_dev_run: bool | int
    overfit_batches: int | float
    reload_dataloaders_every_n_epochs: int
    deterministic: Any
    benchmark: bool | None
    detect_anomaly: bool
    fused: bool | None
    compile: Any
    memory_format: str | None
    prefetch: Any
    terminate_on_nan: bool
    hints: bool | list[str]
    seed: int | None
    profiler: Any

    def __post_init__(self) -> None:
        """Checks every argument by itself, and those that belong together."""
        for name, lowest in _WHOLE.items():
            self._whole(name, lowest)
        for name in ("enable_progress_bar", "enable_checkpointing", "enable_model_summary"):
            self._one_of(name, (True, False))
        for name in ("detect_anomaly", "terminate_on_nan", "sync_batchnorm"):
            self._one_of(name, (True, False))
        self._one_of("gradient_clip_algorithm", ("norm", "value"))
        self._one_of("use_distributed_sampler", (True, False))
        self._one_of("fused", (None, True, False))
        self._one_of("rehearse", (None, True, False))
        self._one_of("benchmark", (None, True, False))
        self._one_of("deterministic", (None, True, False, "warn"))
        self._one_of("memory_format", (None, "channels_last"))
        self._one_of("prefetch", (None, True, False, "epoch"))
        if self.compile is not False:
            from lightkit import compiling

            compiling.settings(self.compile)
        check_strategy(self.strategy)
        hints.check(self.hints)
        self._profiler()
        self._numbers()
        for name in ("train", "val", "test", "predict"):
            limited(_MANY, getattr(self, f"limit_{name}_batches"), f"limit_{name}_batches")
        resolve_precision(self.precision, "cpu")
        if not isinstance(self.default_root_dir, (str, Path, type(None))):
            raise ConfigError(
                f"default_root_dir={self.default_root_dir!r}: allowed is the path of a folder, or "
                f"None for 'runs'."
            )
        trial = self.fast_dev_run
        if not isinstance(trial, int) or trial < 0:
            raise ConfigError(
                f"fast_dev_run={trial!r}: allowed are True, False or a number of batches."
            )

    def _profiler(self) -> None:
        if self.profiler in ("advanced", "pytorch"):
            raise ConfigError(
                f"profiler={self.profiler!r}: write 'simple' for a table of all parts of a run, or "
                f"'trace' for torch.profiler, with the operators of some steps."
            )
        if isinstance(self.profiler, type):
            name = self.profiler.__name__
            raise ConfigError(f"profiler={name} is a class. Make an object of it: {name}().")
        if not isinstance(self.profiler, Callback):
            self._one_of("profiler", (None, "simple", "trace"))

    def _numbers(self) -> None:
        clip = self.gradient_clip_val
        if clip is not None and not (_is_number(clip) and clip > 0):  # nan is neither
            raise ConfigError(
                f"gradient_clip_val={clip!r}: allowed is a number above 0, or None for no clipping."
            )
        interval = self.val_check_interval
        if interval is not None and not isinstance(interval, str):
            fraction = isinstance(interval, float) and 0 < interval <= 1
            if not fraction and (not _is_whole(interval) or interval < 1):
                raise ConfigError(
                    f"val_check_interval={interval!r}: allowed are a whole number of batches, a "
                    f"fraction of the epoch such as 0.25, '500 steps' or '10 min'."
                )
        if interval is None or isinstance(interval, str):
            make_cadence(interval, self.check_val_every_n_epoch, None)
        overfit = self.overfit_batches
        highest = 1 if isinstance(overfit, float) else _MANY
        if not _is_number(overfit) or not 0 <= overfit <= highest:  # nan is neither
            raise ConfigError(
                f"overfit_batches={overfit!r}: allowed are a number of batches, or a fraction of "
                f"the training batches between 0 and 1."
            )

    def _whole(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        optional = name not in _NEEDED
        if (value is None and optional) or (_is_whole(value) and value >= lowest):
            return
        more = ", or None" if optional else ""
        unlimited = " (-1: no limit)" if lowest == -1 and name != "num_sanity_val_steps" else ""
        raise ConfigError(
            f"{name}={value!r}: allowed is a whole number of at least {lowest}{unlimited}{more}."
        )

    def _one_of(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if any(value is a or (isinstance(a, str) and value == a) for a in allowed):
            return
        words = [a for a in allowed if isinstance(a, str)]
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        listed = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{name}={value!r}: allowed: {listed}.{hint}")


_WHOLE = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 1,
    "num_nodes": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "seed": 0,
}
_NO_STATE = Callback.state_dict
_MANY = 10**12  # batches of which every fraction that can be meant leaves some
_NEEDED = (
    "accumulate_grad_batches",
    "log_every_n_steps",
    "reload_dataloaders_every_n_epochs",
)


def listed(given: Any, kind: type, what: str) -> list[Any]:
    """Returns one object or several as a list, all of one kind."""
    items = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for item in items:
        if not isinstance(item, kind):
            hint = f" Make an object of it: {item.__name__}()." if isinstance(item, type) else ""
            raise ConfigError(
                f"{what}: {item!r} is no {kind.__name__} of lightkit.{hint} Give one "
                f"{kind.__name__}, a list of them, or nothing."
            )
    _check_twice(items, what)
    return items


def chosen_loggers(given: Any) -> list[Logger]:
    """Returns the loggers that ``Trainer(logger=given)`` asks for."""
    if given is True:
        from lightkit.loggers import JSONLLogger, TensorBoardLogger

        return [TensorBoardLogger(), JSONLLogger()]
    return [] if given is False else listed(given, Logger, "logger")


def _check_twice(items: list[Any], what: str) -> None:
    """Raises for what can be there once only."""
    if len(items) < 2:
        return
    from lightkit.callbacks import ModelSummary, ProgressBar

    kinds = (ModelSummary, ProgressBar)
    for i, item in enumerate(items):
        name = type(item).__name__
        for other in items[:i]:
            if other is item:
                raise ConfigError(f"{what}: the same {name} object is there twice. Remove one.")
            shown = any(isinstance(item, kind) and isinstance(other, kind) for kind in kinds)
            profilers = type(item) is type(other) and not getattr(item, "measured", True)
            if shown or profilers:
                raise ConfigError(
                    f"{what}: {type(other).__name__} and {name} would show the same twice. "
                    f"Remove one."
                )
            target = item._target if isinstance(item, Logger) else None
            if target is not None and isinstance(other, Logger) and other._target == target:
                raise ConfigError(
                    f"{what}: two {name} would write to one file, {target}. Remove one."
                )
            stateful = isinstance(item, Callback) and type(item).state_dict is not _NO_STATE
            if stateful and type(other) is type(item) and other.state_key == item.state_key:
                raise ConfigError(
                    f"{what}: two {name} store their state in checkpoints under the key "
                    f"{item.state_key!r}. Give them different arguments of those it names, "
                    f"override state_key in their class, or remove one."
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
