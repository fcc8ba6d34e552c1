"""Whether a plain value fits an annotation, and what becomes of it.

`convert` turns a value from a file or a flag into a *node*: a checked value in which objects that
are still to be made stand as `Deferred` and imported ones as `Imported`. `make` turns a node into
the live value, `plain` back into what a file holds. So everything is checked before anything is
built, and what is saved is what was built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import importlib
import os
import pathlib
import pkgutil
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightkit.elsewhere import ARGUMENTS
from lightkit.errors import did_you_mean
from lightkit.signatures import MISSING, arguments

Path = tuple[str | int, ...]
_SPEC = ("class_path", "init_args")
_LISTS: tuple[Any, ...] = (list, abc.Sequence, abc.Iterable, abc.Collection, abc.MutableSequence)
_DICTS: tuple[Any, ...] = (dict, abc.Mapping, abc.MutableMapping)
_BASIC = (bool, int, float, str, bytes, complex, type(None))
_NAMES = {type(None): "null", str: "text", pathlib.Path: "path"}


class MisfitError(Exception):
    """Something wrong at one place of the configuration; `lightkit.config` words it.

    Args:
        path: The keys that lead there.
        what: What is wrong, in a few words.
        allowed: What may stand there.
        given: What was given.
        names: The names to choose from: listed, and the one nearest to ``given`` is proposed.
        hint: What to say instead of the nearest name.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        allowed: str = "",
        given: Any = None,
        names: Iterable[str] = (),
        hint: str = "",
    ) -> None:
        super().__init__(what)
        names = list(names)
        # What would be an abbreviation means the name that it begins.
        begun = next((name for name in names if given and name.startswith(str(given))), str(given))
        self.path, self.what, self.given = path, what, given
        self.allowed = allowed or _some(names, str(given))
        self.hint = hint or did_you_mean(begun, names).strip()


class Text(str):
    """A value from the command line: the text, and what it means as YAML (``parsed``)."""

    parsed: Any


@dataclasses.dataclass(frozen=True)
class Imported:
    """An object that stands in a file as its import path."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An object to be made: a class and its checked arguments (nodes).

    ``class_path`` is empty for the fields of a dataclass, which stand in a file without it.
    """

    class_path: str
    target: Any
    arguments: dict[str, Any]
    partial: bool = False

    def make(self) -> Any:
        """Makes the object, or a ``functools.partial`` where a factory is wanted."""
        arguments = {name: make(node) for name, node in self.arguments.items()}
        if self.partial:
            return functools.partial(self.target, **arguments)
        return self.target(**arguments)


def _some(names: list[str], given: str) -> str:
    """Lists names; of many, the few that are nearest."""
    if len(names) <= 8:
        return ", ".join(names)
    near = difflib.get_close_matches(given, names, 5, 0.0)
    return f"{', '.join(near)}, ... ({len(names)} names; --help lists them)"


def make(node: Any) -> Any:
    """Returns the live value of a node: objects are made, inner ones first."""
    if isinstance(node, Deferred):
        return node.make()
    return node.value if isinstance(node, Imported) else _walk(node, make)


def plain(node: Any) -> Any:
    """Returns what a file holds for a node."""
    if isinstance(node, Deferred):
        arguments = {name: plain(value) for name, value in node.arguments.items()}
        if not node.class_path:
            return arguments
        spec = {"class_path": node.class_path}
        return {**spec, "init_args": arguments} if arguments else spec
    if isinstance(node, Imported):
        return node.name
    if isinstance(node, enum.Enum):
        return node.name
    if isinstance(node, pathlib.PurePath):
        return str(node)
    node = _walk(node, plain)
    return list(node) if isinstance(node, (tuple, set, frozenset)) else node


def _walk(node: Any, function: Callable[[Any], Any]) -> Any:
    if type(node) is dict:
        return {key: function(value) for key, value in node.items()}
    if type(node) in (list, tuple, set, frozenset):
        return type(node)(function(value) for value in node)
    return node


def convert(value: Any, annotation: Any, path: Path = ()) -> Any:
    """Checks a plain value against an annotation and returns its node.

    Args:
        value: What a file or a flag holds.
        annotation: A resolved annotation; Any takes every value, and makes objects of mappings
            with ``class_path``.
        path: Where the value stands.

    Raises:
        MisfitError: It does not fit.
    """
    if isinstance(value, Text):
        try:
            return convert(value.parsed, annotation, path)
        except MisfitError as problem:
            try:
                return convert(str(value), annotation, path)
            except MisfitError:
                problem.given = value if problem.path == path else problem.given
                raise problem from None
    origin = typing.get_origin(annotation)
    inner = typing.get_args(annotation)
    if origin is typing.Annotated:
        return convert(value, inner[0], path)
    if origin in (typing.Union, types.UnionType):
        return _union(value, annotation, inner, path)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
        names = [choice for choice in inner if isinstance(choice, str)]
        raise MisfitError(path, "unknown choice", describe(annotation), value, names)
    if annotation is Callable or origin is abc.Callable:
        return _callable(value, inner, path)
    if origin is type or annotation is type:
        return _type(value, inner[0] if inner else object, path)
    kind = origin or annotation
    if kind in _LISTS or kind in _DICTS or kind in (tuple, set, frozenset):
        return _container(value, annotation, path)
    if kind in (Any, object) or not isinstance(kind, type) or typing.is_typeddict(kind):
        return _anything(value, path)
    return _scalar(value, kind, path)


def _union(value: Any, annotation: Any, members: tuple[Any, ...], path: Path) -> Any:
    if type(value) in members and not isinstance(value, (dict, list)):
        return value  # exactly one of them: 1 stays an int under "float | int"
    deepest = _mismatch(value, annotation, path)
    for member in members:
        try:
            return convert(value, member, path)
        except MisfitError as problem:
            if len(problem.path) > len(deepest.path):
                deepest = problem  # what is wrong inside a list or an object says more
    raise deepest


def _scalar(value: Any, kind: Any, path: Path) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise _mismatch(value, kind, path) from None
    if type(value) is kind:
        return value
    if issubclass(kind, enum.Enum):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
        by_value = [member for member in kind if member.value == value]
        if by_value:
            return by_value[0]
        raise MisfitError(path, "unknown choice", describe(kind), value, kind.__members__)
    if issubclass(kind, os.PathLike):
        if isinstance(value, str):
            return pathlib.Path(value)
        raise _mismatch(value, kind, path)
    if kind in _BASIC:
        raise _mismatch(value, kind, path)
    return _object(value, kind, path)


def _container(value: Any, annotation: Any, path: Path) -> Any:
    kind = typing.get_origin(annotation) or annotation
    inner = typing.get_args(annotation)
    if kind in _DICTS and isinstance(value, dict):
        keys, items = inner or (Any, Any)
        return {
            convert(key, keys, (*path, key)): convert(item, items, (*path, key))
            for key, item in value.items()
        }
    if kind in _DICTS or not isinstance(value, list):
        raise _mismatch(value, annotation, path)
    each = [inner[0] if inner else Any] * len(value)
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(inner) != len(value):
            raise _mismatch(value, annotation, path)
        each = list(inner)
    pairs = enumerate(zip(value, each, strict=True))
    nodes = [convert(item, hint, (*path, i)) for i, (item, hint) in pairs]
    return kind(nodes) if kind in (tuple, set, frozenset) else nodes


def _anything(value: Any, path: Path) -> Any:
    """Takes a value as it is, but makes objects of the mappings with class_path inside."""
    if isinstance(value, dict) and "class_path" in value:
        return _object(value, object, path)
    if isinstance(value, dict):
        return {key: convert(item, Any, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [convert(item, Any, (*path, i)) for i, item in enumerate(value)]
    return value


def _callable(value: Any, inner: tuple[Any, ...], path: Path) -> Any:
    if _is_dotted(value):
        target = import_path(value, (*path, "class_path"))
        if not callable(target):
            raise MisfitError(path, "not callable", "the import path of a function", value)
        return Imported(value, target)
    if not (isinstance(value, dict) and "class_path" in value):
        raise _mismatch(value, abc.Callable, path)
    # A callable that returns what the class makes (an optimizer factory) is the class with some
    # arguments set; so is a class whose instances cannot be called.
    target = import_path(value["class_path"], (*path, "class_path"))
    returns = inner[-1] if inner else None
    wanted = isinstance(returns, type) and isinstance(target, type) and issubclass(target, returns)
    calls = isinstance(target, type) and any("__call__" in vars(c) for c in target.__mro__)
    return _object(value, object, path, partial=wanted or not calls)


def _type(value: Any, base: Any, path: Path) -> Any:
    if not _is_dotted(value):
        raise _mismatch(value, type, path)
    target = import_path(value, (*path, "class_path"), base)
    if not isinstance(target, type) or not _is_subclass(target, base):
        raise MisfitError(path, "wrong class", f"a subclass of {_name(base)}", value)
    return Imported(value, target)


def _object(value: Any, base: Any, path: Path, partial: bool = False) -> Any:
    """Checks ``{class_path, init_args}``, an import path, or the fields of a dataclass."""
    if _is_dotted(value):
        target = import_path(value, (*path, "class_path"), base)
        if not isinstance(target, type) and isinstance(target, base):
            return Imported(value, target)  # torch.float32
        value = {"class_path": value}
    if not isinstance(value, dict):
        allowed = f"{_name(base)}, as class_path and init_args"
        raise MisfitError(path, "wrong type", allowed, value)
    if "class_path" not in value and dataclasses.is_dataclass(base):
        return Deferred("", base, check_arguments(base, value, path))
    for key in value:
        if key not in _SPEC:
            raise MisfitError((*path, key), "unknown key", given=key, names=_SPEC)
    if "class_path" not in value:
        what = "init_args without class_path" if "init_args" in value else "class_path is missing"
        allowed = "class_path: module.Class, beside init_args"
        first = list(value.get("init_args") or ())[:1]
        raise MisfitError((*path, *value, *first), what, allowed, ", ".join(value) or None)
    name = value["class_path"]
    target = import_path(name, (*path, "class_path"), base)
    if not callable(target) or (isinstance(target, type) and not _is_subclass(target, base)):
        allowed = f"a subclass of {_name(base)}" if base is not object else "a class"
        raise MisfitError((*path, "class_path"), f"not a {_name(base)}", allowed, name)
    given = value.get("init_args")
    given = given.parsed if isinstance(given, Text) else given
    if not isinstance(given, dict | None):
        raise MisfitError((*path, "init_args"), "wrong type", "a mapping of arguments", given)
    checked = check_arguments(target, given or {}, (*path, "init_args"), partial)
    return Deferred(str(name), target, checked, partial)


def check_arguments(
    target: Any, given: Mapping[str, Any], path: Path = (), partial: bool = False
) -> dict[str, Any]:
    """Checks keyword arguments for a class or function, and adds the defaults a file can hold.

    Args:
        target: The class or function.
        given: Plain values by argument name.
        path: Where the mapping of arguments stands.
        partial: Whether arguments may still be missing; then no defaults are added.

    Raises:
        MisfitError: An unknown name, a missing argument or a value that does not fit.
    """
    known, takes_any = arguments(target)
    for name in given:
        if name not in known and not takes_any:
            allowed = "" if known else f"{target.__name__} takes no arguments"
            other = (
                f"Write {ARGUMENTS[name]}." if path == ("trainer",) and name in ARGUMENTS else ""
            )
            raise MisfitError((*path, name), "unknown key", allowed, name, known, other)
    checked = {}
    for name, argument in known.items():
        hint = argument.annotation
        if argument.default is None and hint is not Any:
            hint = typing.Optional[hint]  # "x: int = None" takes null  # noqa: UP045
        if name in given:
            checked[name] = convert(given[name], hint, (*path, name))
        elif partial or argument.inherited:
            continue
        elif argument.default is MISSING:
            where = (*path[:-1], "class_path") if path[-1:] == ("init_args",) else path
            missing = f"argument {name!r} of {target.__name__} is missing"
            raise MisfitError(where, missing, f"{name}: {describe(hint)}", ", ".join(given) or None)
        elif (node := _default(argument.default, hint)) is not MISSING:
            checked[name] = node
    others = {n: convert(v, Any, (*path, n)) for n, v in given.items() if n not in known}
    return {**checked, **others}


def _default(default: Any, hint: Any) -> Any:
    """Returns the node of a default if a file can hold it and give it back equal."""
    holds = (*_BASIC, list, dict, tuple, set, frozenset, pathlib.PurePath, enum.Enum)
    if not isinstance(default, holds):
        return MISSING
    try:
        node = convert(plain(default), hint)
        return node if type(node) is type(default) and node == default else MISSING
    except (MisfitError, TypeError, ValueError, RuntimeError):  # arrays inside do not compare
        return MISSING


def import_path(name: Any, path: Path = (), base: Any = object) -> Any:
    """Imports ``module.attribute``; an error inside the module is raised as it is.

    Args:
        name: The import path.
        path: Where it stands, for the error.
        base: The class that is looked for, to list what the module has.

    Raises:
        MisfitError: No such module, or no such attribute in it.
    """
    parts = str(name).split(".")
    if not isinstance(name, str) or len(parts) < 2 or not all(p.isidentifier() for p in parts):
        raise MisfitError(path, "not an import path", "module.Class", name, hint=_ours(str(name)))
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise  # the module is there, one that it imports is not
        for i, part in enumerate(parts[cut:], cut):
            if not hasattr(found, part):
                owner = ".".join(parts[:i])
                raise _no_attribute(found, owner, part, base, path)
            found = getattr(found, part)
        return found
    near = [m.name for m in pkgutil.iter_modules([os.getcwd()])]
    allowed = f"a module that can be imported ({os.getcwd()} is searched)"
    raise MisfitError(path, f"no module {parts[0]!r}", allowed, parts[0], near)


def _no_attribute(owner: Any, owner_name: str, name: str, base: Any, path: Path) -> MisfitError:
    names = [n for n in dir(owner) if not n.startswith("_")]
    names += [m.name for m in pkgutil.iter_modules(getattr(owner, "__path__", ()))]
    members = {}
    for known in names:
        with contextlib.suppress(AttributeError, ImportError):  # what is lazy may lack a library
            members[known] = getattr(owner, known)
    classes = [n for n, member in members.items() if isinstance(member, type)]
    names = [n for n in classes if _is_subclass(members[n], base)] or classes or names
    hint = _ours(name) if owner_name == "lightkit" else ""
    return MisfitError(path, f"no {name!r} in {owner_name}", given=name, names=names, hint=hint)


def _ours(name: str) -> str:
    """Says where a class of lightkit is, for who left the module out."""
    from lightkit import callbacks, loggers

    for module in (callbacks, loggers):
        if name in module.__all__:
            return f"Did you mean '{module.__name__}.{name}'?"
    return ""


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and "." in value and value.replace(".", "").isidentifier()


def _is_subclass(cls: type, base: Any) -> bool:
    try:
        return issubclass(cls, base)
    except TypeError:  # a Protocol that cannot be asked
        return True


def _mismatch(value: Any, annotation: Any, path: Path) -> MisfitError:
    return MisfitError(path, "wrong type", describe(annotation), value)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def describe(annotation: Any) -> str:
    """Returns an annotation in words: ``int or null``, ``list of Callback``."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        *first, last = [describe(member) for member in inner]
        return f"{', '.join(first)} or {last}"
    if origin is typing.Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin is typing.Annotated:
        return describe(inner[0])
    kind = origin or annotation
    if kind is abc.Callable or kind is type:
        return "the import path of a class" if kind is type else "the import path of a function"
    if kind in _DICTS:
        return f"mapping of {' to '.join(map(describe, inner))}" if inner else "mapping"
    if kind in _LISTS or kind in (tuple, set, frozenset):
        items = ", ".join(describe(i) for i in inner if i is not Ellipsis)
        return f"list of {items}" if items else "list"
    if annotation is Any or not isinstance(kind, type):
        return "any value"
    if issubclass(kind, enum.Enum):
        return " or ".join(repr(name) for name in kind.__members__)
    return _NAMES.get(kind) or _name(kind)


def shown(value: Any) -> str:
    """Returns a plain value as a file writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value) if isinstance(value, Text) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
