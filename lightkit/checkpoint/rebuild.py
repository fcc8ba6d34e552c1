"""Builds a task from a checkpoint: its constructor arguments, then its weights."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lightkit.checkpoint.files import read_checkpoint
from lightkit.checkpoint.storable import placeholder_type, reference
from lightkit.checkpoint.weights import apply_weights, weights_of
from lightkit.errors import CheckpointError, ConfigError, did_you_mean
from lightkit.hparams import HParams, is_config

if TYPE_CHECKING:
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")
_Task = TypeVar("_Task", bound="TaskModule")


def load_task(
    cls: type[_Task],
    path: str | Path,
    *,
    strict: bool = True,
    map_location: str | torch.device | None = "cpu",
    **overrides: Any,
) -> _Task:
    """Returns a new task of class ``cls`` with the arguments and weights of a checkpoint.

    Args:
        cls: The class to build.
        path: A checkpoint of lightkit or Lightning.
        strict: Every name and shape of the weights must agree. False loads what fits.
        map_location: The device to put the task on; None leaves it on the CPU.
        overrides: Constructor arguments that replace the stored ones, and those that could not be
            stored.

    Raises:
        CheckpointError: The file cannot be read, lacks an argument, or does not fit the class.
        ConfigError: The constructor does not have one of ``overrides``.
    """
    checkpoint = read_checkpoint(path)
    stored = checkpoint.get("hparams", checkpoint.get("hyper_parameters")) or {}
    task = _build(cls, path, dict(stored), overrides)
    task.configure_model()
    task.on_load_checkpoint(checkpoint)
    apply_weights(task, weights_of(checkpoint, path), path, strict=strict)
    return task if map_location is None else task.to(torch.device(map_location))


def _build(
    cls: type[_Task], path: str | Path, stored: dict[str, Any], overrides: dict[str, Any]
) -> _Task:
    """Calls the constructor with the stored arguments and those that replace them."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names = [p.name for p in named]
    star = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = [p.name for p in named if p.default is p.empty]
    if stored and not set(stored) & set(names) and not takes_any:
        # Net(config) with save_hyperparameters(config): the stored names are the fields of config.
        given = [overrides.get(name) for name in required]
        fields = {n: overrides.pop(n) for n in stored if n in overrides}
        absent = [name for name in required if name not in overrides]
        if len(absent) == 1:
            stored = {absent[0]: HParams({**stored, **fields})}
        elif any(map(is_config, given)):
            stored = {}  # another config takes the place of the stored one
    for name in overrides:
        if name not in names and not takes_any:
            raise ConfigError(
                f"{cls.__qualname__} has no argument {name!r}.{did_you_mean(name, names)} "
                f"It has: {', '.join(names) or 'none'}."
            )
    arguments = {**stored, **overrides}
    absent = [name for name in required if name not in arguments]
    unknown = [name for name in arguments if name not in names and name != star]
    if unknown and not takes_any:
        for name in unknown:
            del arguments[name]
        of_bases = {n for base in cls.__mro__ for n in inspect.signature(base.__init__).parameters}  # type: ignore[misc]
        gone = [name for name in unknown if name not in of_bases]
        if gone:
            _log.warning(
                "%s no longer has the stored argument%s %s: ignored.",
                cls.__qualname__,
                "s"[: len(gone) > 1],
                ", ".join(gone),
            )
    for p in named:  # a class or function that was the default and still is
        kind = placeholder_type(arguments.get(p.name))
        if kind is not None and kind == reference(p.default):
            del arguments[p.name]
    _check_complete(cls, path, arguments, absent)
    positional: list[Any] = []
    for p in named:
        before_star = star is not None and arguments.get(star) and p.kind is p.POSITIONAL_OR_KEYWORD
        if p.name in arguments and (p.kind is p.POSITIONAL_ONLY or before_star):
            positional.append(arguments.pop(p.name))
    if star is not None:
        positional.extend(arguments.pop(star, ()))
    return cls(*positional, **arguments)


def _check_complete(
    cls: type, path: str | Path, arguments: dict[str, Any], absent: list[str]
) -> None:
    """Raises when an argument is neither stored nor given, and shows the call that gives it."""
    needed = dict.fromkeys(absent, "")
    for name, value in arguments.items():
        kind = placeholder_type(value)
        if kind is not None:
            needed[name] = f" ({kind})"
    if needed:
        listed = ", ".join(f"{name}{kind}" for name, kind in needed.items())
        example = ", ".join(f"{name}=..." for name in needed)
        raise CheckpointError(
            f"{cls.__qualname__} needs arguments that {path} does not hold: {listed}. Pass them: "
            f"{cls.__qualname__}.load_from_checkpoint({str(path)!r}, {example})."
        )
