"""What a class or function accepts: its keyword arguments, their annotations and docstring texts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

#: Stands for "no value", where None is a value.
MISSING: Any = inspect.Parameter.empty


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a class: its annotation (Any without one), default and docstring text."""

    name: str
    annotation: Any
    default: Any
    text: str
    inherited: bool


def arguments(target: Any) -> tuple[dict[str, Argument], bool]:
    """Reads the keyword arguments of a class or function.

    ``**kwargs`` of a constructor is followed to the base class that names its arguments.

    Returns:
        The arguments by name, and whether any other name is taken too.
    """
    found: dict[str, Argument] = {}
    takes_any = False
    for number, (function, doc) in enumerate(_constructors(target)):
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C, without a signature
            return found, True
        hints = _hints(function)
        texts = argument_texts(doc) | argument_texts(function.__doc__)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if isinstance(target, type):
            named = [p for p in named if p is not parameters[0]]  # self
        for p in named:
            hint, text = hints.get(p.name, Any), texts.get(p.name, "")
            found.setdefault(p.name, Argument(p.name, hint, p.default, text, number > 0))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            # Where the base class names nothing, the ** was for the class's own use.
            return found, takes_any and not named
        takes_any = True
    return found, takes_any


def _constructors(target: Any) -> Iterator[tuple[Any, str | None]]:
    """Yields what makes the object, own class first, each with the docstring of its class."""
    if not isinstance(target, type):
        yield target, None
        return
    attribute = "__new__" if target.__init__ is object.__init__ else "__init__"  # type: ignore[misc]
    for cls in target.__mro__[:-1]:
        function: Any = vars(cls).get(attribute)
        function = getattr(function, "__func__", function)  # __new__ is a staticmethod
        # A torch module takes *args and **kwargs and refuses them; our __new__ only records.
        blind = ("torch.nn.modules.module", "lightkit.hparams")
        if function is not None and getattr(function, "__module__", None) not in blind:
            yield function, cls.__doc__


def _hints(function: Any) -> dict[str, Any]:
    failures = (NameError, TypeError, AttributeError, SyntaxError)
    try:
        return typing.get_type_hints(function)
    except failures:  # a name imported under TYPE_CHECKING only: resolve the others
        pass
    hints: dict[str, Any] = {}
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    for name, annotation in getattr(function, "__annotations__", {}).items():
        probe = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(*failures):
            hints.update(typing.get_type_hints(probe, scope))
    return hints


def argument_texts(doc: str | None) -> dict[str, str]:
    """Reads the ``Args:`` section of a Google-style docstring: text by argument name."""
    texts: dict[str, str] = {}
    lines = iter(inspect.cleandoc(doc or "").splitlines())
    for line in lines:
        if line.strip() in ("Args:", "Arguments:"):
            break
    name, indent = "", 0
    for line in filter(str.strip, lines):
        depth = len(line) - len(line.lstrip())
        indent = indent or depth
        if depth == 0 or depth < indent:
            break
        entry = re.match(r"\s*\*{0,2}(\w+)(?: ?\(.*?\))?:\s*(.*)", line)
        if depth == indent and entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif name:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts
