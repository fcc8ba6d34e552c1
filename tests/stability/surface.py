"""Writes down what is public: each name, and what it is called with.

At a release, with the version that is released on the path::

    python tests/stability/surface.py tests/stability/surface_0_2_0.txt

The files stay as they are from then on; ``test_surface.py`` holds the code to all of them.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

#: What is in their ``__all__`` is public; of errors, each class.
MODULES = ("lightkit", "lightkit.callbacks", "lightkit.errors", "lightkit.loggers")
#: And of other modules these.
OTHERS = {
    "lightkit.config": ("build", "load_config"),
    "lightkit.sklearn": ("LightkitClassifier", "LightkitRegressor"),
    "lightkit.testing": (
        "assert_resumes_exactly",
        "assert_same_on_ranks",
        "assert_trains",
        "assert_validation_is_pure",
    ),
}


class _Written:
    """A default, shown without what differs from process to process."""

    def __init__(self, default: object) -> None:
        self.text = "..." if repr(default).startswith("<") else repr(default)

    def __repr__(self) -> str:
        return self.text


def arguments(function: Any) -> str:
    """Returns the arguments as in a ``def``, without types and without self."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a C function, whose arguments are not ours
        return "(*args, **kwargs)"
    bare = [
        p.replace(
            annotation=p.empty, default=p.empty if p.default is p.empty else _Written(p.default)
        )
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    return str(inspect.Signature(bare))


def members(cls: type) -> dict[str, Any]:
    """Returns the public methods and properties of a class, those of lightkit's bases too."""
    owners = [owner for owner in cls.__mro__ if owner.__module__.startswith("lightkit")]
    names = {name for owner in owners for name in vars(owner) if not name.startswith("_")}
    found = {name: inspect.getattr_static(cls, name) for name in sorted(names)}
    kinds = (staticmethod, classmethod, property)
    return {name: how for name, how in found.items() if callable(how) or isinstance(how, kinds)}


def surface(*, inherited: bool = True) -> dict[str, str]:
    """Returns what is public with its arguments; "" for a property and what else is not called.

    Args:
        inherited: Also the members that a class has from another public one, or under another name.
    """
    found: dict[str, str] = {}
    public: dict[str, Any] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [
            key for key, value in vars(module).items() if inspect.isclass(value)
        ]
        public |= {f"{name}.{key}": getattr(module, key) for key in sorted(names)}
    for name, names in OTHERS.items():
        if importlib.util.find_spec(name):  # not in every version
            module = importlib.import_module(name)
            public |= {f"{name}.{key}": getattr(module, key) for key in names}
    classes = {value for value in public.values() if inspect.isclass(value)}
    seen: set[type] = set()
    for name, value in public.items():
        found[name] = arguments(value) if callable(value) else ""
        if value not in classes or (value in seen and not inherited):
            continue
        seen.add(value)
        bases = () if inherited else [base for base in value.__mro__[1:] if base in classes]
        promised = {member for base in bases for member in members(base)}
        for member, how in members(value).items():
            if member not in promised:
                called = not isinstance(how, property)
                found[f"{name}.{member}"] = arguments(getattr(value, member)) if called else ""
    return found


if __name__ == "__main__":
    written = [name + args for name, args in surface(inherited=False).items()]
    Path(sys.argv[1]).write_text("\n".join(written) + "\n", encoding="utf-8")
