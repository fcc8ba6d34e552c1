"""From YAML files and flags to a trainer, data and a task.

`load_config` overlays the sources (defaults < files in their order < overrides), checks every
value against the annotations and returns a `Config` before anything is built; `build` makes the
objects; `Config.to_yaml` is what repeats the run. The command line (`lightkit.cli`) does nothing
that these functions cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightkit.config_types import (
    Deferred,
    MisfitError,
    Text,
    check_arguments,
    convert,
    import_path,
    make,
    plain,
    shown,
)
from lightkit.data import DataModule
from lightkit.distributed import Ranks, join, launched, resolve_device
from lightkit.elsewhere import ARGUMENTS
from lightkit.errors import ConfigError, did_you_mean
from lightkit.signatures import arguments
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

_BASES: dict[str, type] = {"trainer": Trainer, "task": TaskModule, "data": DataModule}
KEYS = ("trainer", "data", "task", "ckpt_path")
#: What other trainers call our keys.
_OTHER_NAMES = {"model": "task", "datamodule": "data", "seed_everything": "trainer.seed"}
Keys = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, 12:30:00 is text, no key may be there twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replaces ``<<`` by what it stands for, after a look for keys given twice."""
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be text", problem_mark=key.start_mark
                )
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        super().flatten_mapping(node)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INT = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"
_FLOAT = (
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {
    first: [(tag, rule) for tag, rule in rules if tag.endswith((":null", ":bool", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _rule in (("int", _INT), ("float", _FLOAT)):
    for _first in "-+.0123456789":
        _pair = (f"tag:yaml.org,2002:{_kind}", re.compile(rf"^({_rule})$"))
        _RESOLVERS.setdefault(_first, []).append(_pair)
_Loader.yaml_implicit_resolvers = _RESOLVERS
_Dumper.yaml_implicit_resolvers = _RESOLVERS


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked configuration: what is to be built, nothing built yet.

    Attributes:
        trainer: The trainer and its arguments.
        task: The task and its arguments.
        data: The data module and its arguments; None where the task brings its own loaders.
        ckpt_path: The checkpoint to start from.
        seed_drawn: Whether the trainer's seed was drawn because none is given.
    """

    trainer: Deferred
    task: Deferred
    data: Deferred | None
    ckpt_path: str | None
    seed_drawn: bool = False

    def to_yaml(self) -> str:
        """Returns the YAML that gives this configuration again, defaults and seed included."""
        values: dict[str, Any] = {"trainer": plain(self.trainer).get("init_args", {})}
        if self.data is not None:
            values["data"] = plain(self.data)
        values |= {"task": plain(self.task), "ckpt_path": self.ckpt_path}
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class Built(NamedTuple):
    """What a configuration became."""

    trainer: Any
    data: Any
    task: Any


@dataclasses.dataclass
class Sources:
    """All files and overrides overlaid, with where each value came from."""

    tree: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: dict[Keys, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def error(self, problem: MisfitError) -> ConfigError:
        """Words a problem in at most four lines: where and what, given, allowed, nearest."""
        path = problem.path
        source, flag = next(
            (self.where[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.where),
            ("configuration", ""),
        )
        key = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path)[1:]
        lines = [": ".join(filter(None, (source, flag or key, problem.what)))]
        if problem.given is not None or problem.what == "wrong type":
            lines.append(f"  given:   {shown(problem.given)}")
        lines += [f"  allowed: {problem.allowed}"] if problem.allowed else []
        lines += [f"  {problem.hint}"] if problem.hint else []
        return ConfigError("\n".join(lines))

    def find_class(self, section: str) -> Any:
        """Imports the class that a section (task or data) names; None where it names none.

        Raises:
            ConfigError: It cannot be imported.
        """
        spec = self.tree.get(section)
        if not isinstance(spec, dict) or "class_path" not in spec:
            return None
        try:
            return import_path(spec["class_path"], (section, "class_path"), _BASES[section])
        except MisfitError as problem:
            raise self.error(problem) from None

    def arguments(self, section: str, target: Any) -> dict[str, Any]:
        """Returns the arguments that a section gives its class, of their types; others may miss.

        Raises:
            ConfigError: The class does not take them.
        """
        path, given = (section, "init_args"), self.tree[section].get("init_args", {})
        try:
            return dict(
                Deferred("", target, check_arguments(target, given, path, True), True)
                .make()
                .keywords
            )
        except MisfitError as problem:
            raise self.error(problem) from None


def load_config(
    *files: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    trainer_class: type | None = None,
) -> Config:
    """Overlays files and overrides, checks all values and draws a seed if none is given.

    Args:
        *files: YAML files with the keys trainer, data, task, ckpt_path; later ones win. Mappings
            are merged; lists are replaced; another class_path drops the init_args before it.
        overrides: Dotted keys and values that win over the files, as on the command line:
            ``{"trainer.max_epochs": 5, "task.lr": "1e-3"}``. Text is read as YAML.
        trainer_class: Something else than `lightkit.Trainer`.

    Raises:
        ConfigError: Unknown keys, wrong types, missing files or arguments; at most four lines.
    """
    sources = read_sources(files, overrides or {}, "overrides")
    return resolve(sources, trainer_class)


def build(config: Config) -> Built:
    """Makes the trainer first (it seeds what follows), then data, then the task.

    The trainer gets the resolved configuration as ``config_text``, which fit writes into the run
    folder.
    """
    trainer = make(config.trainer)
    if config.seed_drawn:
        drawn = config.trainer.arguments["seed"]
        seed = _ranks(trainer).decide(lambda: _earlier_seed(trainer, config), "the drawn seed")
        if seed != drawn:
            config.trainer.arguments["seed"] = seed
            trainer = make(config.trainer)
    # Without the checkpoint: what repeats the run begins where it began.
    trainer.config_text = dataclasses.replace(config, ckpt_path=None).to_yaml()
    trainer.seed_drawn = config.seed_drawn
    data = make(config.data)
    return Built(trainer, data, make(config.task))


def _ranks(trainer: Any) -> Ranks:
    """Returns the processes that were started with this one, which must begin with one seed."""
    env = launched()
    if not env.launched:
        return Ranks(env)
    options = trainer.options
    where = (options.accelerator, options.devices, options.gpus)
    return join(env, resolve_device(*where, env=env, num_nodes=options.num_nodes))


def _earlier_seed(trainer: Any, config: Config) -> int:
    """Returns the seed of the run that the checkpoint continues; else the drawn one."""
    drawn: int = config.trainer.arguments["seed"]
    if config.ckpt_path is None:
        return drawn
    from lightkit.resuming import earlier_seed

    seed = earlier_seed(trainer, config.task.target.__name__, config.ckpt_path)
    return drawn if seed is None else seed


def resolve(sources: Sources, trainer_class: type | None = None) -> Config:
    """Checks the overlaid values against the classes. See `load_config`."""
    try:
        return _resolve(sources, trainer_class or _BASES["trainer"])
    except MisfitError as problem:
        raise sources.error(problem) from None


def _resolve(sources: Sources, trainer_class: type) -> Config:
    tree = sources.tree
    for key in tree:
        if key not in KEYS:
            hint = _elsewhere(key, sources, trainer_class)
            raise MisfitError((key,), "unknown key", given=key, names=KEYS, hint=hint)
    given = tree.get("trainer", {})
    if not isinstance(given, dict):
        raise MisfitError(("trainer",), "wrong type", "a mapping of arguments", given)
    checked = check_arguments(trainer_class, given, ("trainer",))
    drawn = "seed" in checked and checked["seed"] is None
    if drawn:
        checked["seed"] = secrets.randbelow(2**31)
    if tree.get("task") is None:
        raise MisfitError(
            (), "task is missing", "task: {class_path: module.Class} in --config FILE, or --task"
        )
    data = tree.get("data")
    return Config(
        Deferred(f"{trainer_class.__module__}.{trainer_class.__name__}", trainer_class, checked),
        convert(tree["task"], _BASES["task"], ("task",)),
        None if data is None else convert(data, _BASES["data"], ("data",)),
        convert(tree.get("ckpt_path"), str | None, ("ckpt_path",)),
        drawn,
    )


def _elsewhere(name: str, sources: Sources, trainer_class: type) -> str:
    """Looks for an unknown key among the arguments of the trainer, the task and the data."""
    if name in _OTHER_NAMES:
        return f"Did you mean {_OTHER_NAMES[name]!r}?"
    classes = [("trainer", trainer_class)]
    with contextlib.suppress(ConfigError):
        classes += [(section, sources.find_class(section)) for section in ("task", "data")]
    words = (name, ARGUMENTS.get(name, name))
    for word, (section, cls) in itertools.product(words, classes):
        names = arguments(cls)[0] if cls else ()
        if near := difflib.get_close_matches(word, names, 1, 0.8):
            return f"Did you mean '{section}.{near[0]}'?"
    return ""


# Reading and overlaying


def read_sources(
    files: Iterable[str | os.PathLike[str]], overrides: Mapping[str, Any], name: str
) -> Sources:
    """Reads and overlays files and overrides; checks nothing but the syntax.

    Args:
        files: Paths of YAML files.
        overrides: Values by dotted key.
        name: What errors call the overrides, such as "command line".
    """
    sources = Sources(where={(): (name, "")})
    for file in files:
        _read_file(os.fspath(file), sources)
    # Shorter keys first: a class comes before its arguments, however they were given.
    pairs = [(key.removesuffix(".class_path").split("."), key) for key in overrides]
    for keys, key in sorted(pairs, key=lambda pair: len(pair[0])):
        origin = (name, f"--{key}" if name == "command line" else key)
        value = _text(overrides[key])
        parsed = getattr(value, "parsed", value)
        if len(keys) == 1 and keys[0] != "ckpt_path":
            value = parsed = _section(keys[0], parsed)
        if len(keys) > 1 and keys[0] in ("task", "data") and keys[1] != "init_args":
            keys.insert(1, "init_args")
        try:
            path = _assign(sources.tree, keys, value, ())
        except MisfitError as problem:
            sources.where[problem.path] = origin
            raise sources.error(problem) from None
        for inner in (*_paths(parsed), ("class_path",)):
            sources.where[(*path, *inner)] = origin
    return sources


def _paths(value: Any) -> Iterator[Keys]:
    """Yields the place of everything inside a value, itself included."""
    yield ()
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from ((key, *path) for path in _paths(item))


def _read_file(file: str, sources: Sources) -> None:
    path = _find(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read\n  {error}") from None
    where: dict[Keys, tuple[str, str]] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        tree = {} if node is None else _construct(loader, node, (), file, where)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = text.splitlines()[mark.line : mark.line + 1] if mark else []
        place = f"{file}, line {mark.line + 1}" if mark else file
        given = f"\n  given:   {line[0].strip()[:80]}" if line else ""
        raise ConfigError(f"{place}: not valid YAML: {what}{given}") from None
    sources.where.update(where)
    if not isinstance(tree, dict):
        raise sources.error(MisfitError((), "wrong type", f"the keys {', '.join(KEYS)}", tree))
    tree = {key: _section(key, value) for key, value in tree.items()}
    sources.tree = _merge(sources.tree, tree)


def _find(file: str) -> Path:
    """Returns the path of a file; one that is not there may be among those lightkit ships."""
    path = Path(file)
    if path.exists() and not path.is_dir():
        return path
    from lightkit._share import share_dir

    shipped = share_dir("configs")
    if (shipped / file.removeprefix("configs/")).is_file():
        return shipped / file.removeprefix("configs/")
    near = [f"configs/{p.relative_to(shipped).as_posix()}" for p in shipped.rglob("*.yaml")]
    near += [str(p) for p in path.parent.glob("*.y*ml")]
    lines = [f"{file}: no such file", f"  searched: {Path.cwd()}", f" {did_you_mean(file, near)}"]
    raise ConfigError("\n".join(lines).rstrip())


def _construct(
    loader: _Loader, node: yaml.Node, path: Keys, file: str, where: dict[Keys, tuple[str, str]]
) -> Any:
    """Makes plain values of YAML nodes and notes the line of each."""
    where.setdefault(path, (f"{file}, line {node.start_mark.line + 1}" if path else file, ""))
    if node.tag == "tag:yaml.org,2002:seq":
        parts = enumerate(node.value)
        return [_construct(loader, item, (*path, i), file, where) for i, item in parts]
    if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
        return loader.construct_object(node, deep=True)
    loader.flatten_mapping(node)
    values = {}
    for key_node, item in node.value:
        key = loader.construct_object(key_node)
        where[(*path, key)] = (f"{file}, line {key_node.start_mark.line + 1}", "")
        values[key] = _construct(loader, item, (*path, key), file, where)
    return values


def _text(value: Any) -> Any:
    """Reads text as YAML and keeps the text, for arguments that want text."""
    if not isinstance(value, str):
        return value
    text = Text(value)
    try:
        text.parsed = yaml.load(value, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError:
        text.parsed = value
    if text.parsed is None and value.strip() not in ("null", "~"):
        text.parsed = value
    return text


def _section(key: str, value: Any) -> Any:
    """``task: module.Class`` is short for a mapping; an empty section is none."""
    if isinstance(value, str) and key in ("task", "data"):
        return {"class_path": value}
    return {} if value is None and key == "trainer" else value


def _merge(base: Any, over: Any) -> Any:
    """Lays ``over`` on ``base``: mappings are merged, all else is replaced."""
    if isinstance(base, dict) and "class_path" in base:
        parsed = getattr(over, "parsed", over)
        is_class = isinstance(parsed, str) and "." in parsed
        over = {"class_path": parsed} if is_class else parsed if isinstance(parsed, dict) else over
    if isinstance(base, str) and isinstance(over, dict) and set(over) == {"init_args"}:
        base = {"class_path": str(base)}
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "class_path" in over and base.get("class_path", over["class_path"]) != over["class_path"]:
        return over  # the arguments of another class mean nothing here
    return base | {k: _merge(base[k], v) if k in base else v for k, v in over.items()}


def _assign(node: dict[str, Any], keys: list[str], value: Any, path: Keys) -> Keys:
    """Sets a dotted key; the arguments of an object are found without writing init_args."""
    key, *rest = keys
    if "class_path" in node and key not in ("class_path", "init_args"):
        key, rest = "init_args", keys
    path = (*path, key)
    if not rest:
        node[key] = _merge(node.get(key), value)
        return path
    child = getattr(node.get(key), "parsed", node.get(key))
    if isinstance(child, list):
        raise MisfitError(path, "keys cannot reach into a list", "the whole list, or a file")
    child = {"class_path": child} if isinstance(child, str) else child
    node[key] = dict(child) if isinstance(child, dict) else {}
    return _assign(node[key], rest, value, path)
