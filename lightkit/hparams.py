"""Constructor arguments, remembered: what ``task.hparams`` and ``datamodule.hparams`` hold."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightkit.errors import ConfigError, did_you_mean

T = TypeVar("T")


class HParams(dict[str, Any]):
    """A dict whose keys can be read and written as attributes too.

    An unknown name raises an error that lists the names there are. Pickles and copies as itself;
    ``dict(hparams)`` is the plain dict.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(self._unknown(name))

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(self._unknown(name))
        del self[name]

    def __missing__(self, name: str) -> Any:
        raise KeyError(self._unknown(name))

    def _unknown(self, name: str) -> str:
        known = ", ".join(map(str, self)) or "none"
        return (
            f"no hyperparameter {name!r}.{did_you_mean(str(name), map(str, self))} Known: {known}"
        )


def capture(cls: type[T]) -> type[T]:
    """Lets every object of ``cls`` and its subclasses remember its constructor arguments.

    Use it once, on a base class (as a decorator or a call). The arguments of the class that is
    constructed are recorded in ``self.hparams`` before ``__init__`` runs, once, with defaults
    filled in, ``**kwargs`` flattened, and non-empty ``*args`` as a tuple under their own name. What
    a subclass hands on to ``super().__init__`` does not matter. Lists and dicts are copied, so that
    a constructor which changes them leaves the record as it was; all else is kept by reference.

    It works through ``__new__``: no frame in the user's tracebacks, generated constructors
    (dataclasses) are seen too, and ``torch.nn.Module.__init__`` need not have run.

    Returns:
        The same class.
    """

    def construct(made: type[T], *args: Any, **kwargs: Any) -> T:
        inherited: Callable[..., T] = super(cls, made).__new__  # type: ignore[misc]
        if inherited is object.__new__:  # which takes no arguments
            self = inherited(made)
        else:
            self = inherited(made, *args, **kwargs)
        captured = _arguments(made, args, kwargs)
        self.__dict__["hparams"] = HParams(captured)
        self.__dict__["_captured"] = captured
        return self

    cls.__new__ = staticmethod(construct)  # type: ignore[method-assign, assignment]
    return cls


def _arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the bound arguments of ``cls.__init__`` by name, without ``self``."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError:
        # Either a wrong call, and __init__ is about to say so better, or pickle and copy making
        # an empty object whose state they fill in afterwards.
        return {}
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(_snapshot(value))
        elif kind is not inspect.Parameter.VAR_POSITIONAL or value:
            found[name] = _snapshot(value)
    return found


def _snapshot(value: Any) -> Any:
    """Copies plain containers (nested ones too), keeps everything else as it is."""
    if type(value) is dict:
        return {k: _snapshot(v) for k, v in value.items()}
    if type(value) is list:
        return [_snapshot(v) for v in value]
    return value


def save_hyperparameters(
    obj: Any, *names: Any, ignore: str | Iterable[str] = (), logger: bool = True
) -> None:
    """Chooses what ``obj.hparams`` holds; without arguments everything stays as captured.

    Called in a constructor it also sees the arguments of that constructor (a base class's, for
    example) with the values they have by then. Several calls add up.

    Args:
        obj: An object of a class that `capture` prepared.
        names: Names of constructor arguments to keep (default: all). Or one mapping or
            ``argparse.Namespace``: its content then becomes ``obj.hparams``, and the name of the
            argument that it was given for is kept as ``obj._hparams_name``.
        ignore: Names to drop, one or several.
        logger: Whether loggers shall get them; kept as ``obj._log_hparams``.

    Raises:
        ConfigError: A name that is no constructor argument, or anything else in ``names``.
    """
    known = {**obj.__dict__["_captured"], **_running_arguments(obj)}
    if len(names) == 1 and is_config(names[0]):
        given = names[0]
        content = given if isinstance(given, Mapping) else vars(given)
        kept = {str(k): _snapshot(v) for k, v in content.items()}
        obj.__dict__["_hparams_name"] = next(
            (n for n, v in known.items() if type(v) is type(given) and v == given), None
        )
    else:
        kept = {n: known[_known(obj, n, known)] for n in names} if names else known
    if "_log_hparams" in obj.__dict__:  # an earlier call has chosen some already
        kept = {**obj.hparams, **kept}
    for name in (ignore,) if isinstance(ignore, str) else ignore:
        kept.pop(name, None)
    obj.__dict__["hparams"] = HParams(kept)
    obj.__dict__["_log_hparams"] = logger


def is_config(value: Any) -> bool:
    """Tells whether a value holds hyperparameters by name: a mapping or an argparse.Namespace."""
    return isinstance(value, (Mapping, argparse.Namespace))


def _running_arguments(obj: Any) -> dict[str, Any]:
    """Returns the arguments of the constructors of ``obj`` that run now; the outermost wins."""
    found: dict[str, Any] = {}
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            names, star, stars, values = inspect.getargvalues(frame)
            if values.get(names[0]) is obj:
                own = {n: _snapshot(values[n]) for n in names[1:] if n in values}
                if star is not None and values.get(star):
                    own[star] = values[star]
                own |= _snapshot(values.get(stars, {})) if stars is not None else {}
                found |= own
        frame = frame.f_back
    return found


def _known(obj: Any, name: Any, known: Mapping[str, Any]) -> str:
    """Returns ``name`` if it is an argument of a constructor, else raises `ConfigError`."""
    if not isinstance(name, str):
        raise ConfigError(
            f"save_hyperparameters takes names of constructor arguments, or one dict or Namespace; "
            f"got {type(name).__name__}."
        )
    if name not in known:
        raise ConfigError(
            f"save_hyperparameters({name!r}): {type(obj).__name__}.__init__ has no such argument."
            f"{did_you_mean(name, known)} It has: {', '.join(known) or 'none'}."
        )
    return name
