"""From YAML to objects: overlays, conversion by annotation, the resolved configuration."""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
import torch
import yaml

import lightkit as lk
from lightkit.config import build, load_config, read_sources
from lightkit.config_types import MisfitError, convert, describe, make, plain
from lightkit.errors import ConfigError
from lightkit.signatures import argument_texts, arguments

if TYPE_CHECKING:
    from nowhere import Nothing


class Mode(enum.Enum):
    fast = "f"
    slow = "s"


@dataclasses.dataclass
class Options:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


class Inner:
    def __init__(self, size: int, scale: float = 1.0) -> None:
        self.size, self.scale = size, scale


class Task(lk.TaskModule):
    """A task.

    Args:
        lr: The learning rate,
            in two lines.
        inner (Inner, optional): An object.
    """

    def __init__(
        self,
        lr: float = 0.01,
        inner: Inner | None = None,
        name: str = "n",
        free=None,
        unresolved: Nothing | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.inner, self.name, self.free = lr, inner, name, free


class OtherTask(lk.TaskModule):
    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.depth = depth


class Data(lk.DataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.first_draw = torch.rand(()).item()


class FakeTrainer:
    """Seeds as the real one does and records."""

    config_text: str | None = None

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        callbacks: list[lk.Callback] | lk.Callback | None = None,
        seed: int | None = None,
    ) -> None:
        self.max_epochs, self.callbacks, self.seed = max_epochs, callbacks, seed
        torch.manual_seed(seed or 0)


class Noted(lk.Callback):
    def __init__(self, note: str) -> None:
        self.note = note


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Makes this module importable as ``here`` and the temporary folder the current one."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("here")
    vars(module).update({k: v for k, v in globals().items() if not k.startswith("__")})
    monkeypatch.setitem(sys.modules, "here", module)
    return tmp_path


def load(text="", *more, **overrides):
    files = []
    for number, part in enumerate((text, *more)):
        Path(f"{number}.yaml").write_text(part)
        files.append(f"{number}.yaml")
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(*files, overrides=keys, trainer_class=FakeTrainer)


TASK = "task: {class_path: here.Task, init_args: {lr: 0.5, name: a}}\n"


def test_defaults_files_flags(here):
    config = load("trainer: {max_epochs: 1}\n" + TASK, "task: {init_args: {name: b}}\n")
    assert config.trainer.arguments["max_epochs"] == 1
    assert config.task.arguments["lr"] == 0.5
    assert config.task.arguments["name"] == "b"
    config = load(TASK, "task: {init_args: {name: b}}\n", task__name="c", task__lr="1e-3")
    assert config.task.arguments["name"] == "c"
    assert config.task.arguments["lr"] == 1e-3


def test_a_new_class_drops_the_arguments_of_the_old_one(here):
    config = load(TASK, "task: {class_path: here.OtherTask}\n")
    assert config.task.arguments == {"depth": 1}
    config = load(TASK, task="here.OtherTask", task__depth=3)
    assert config.task.arguments == {"depth": 3}
    config = load(TASK, "task: here.Task\n")  # the same class keeps them
    assert config.task.arguments["lr"] == 0.5


def test_a_class_may_be_named_after_its_arguments(here):
    config = load("", task__inner__size=3, task__inner="here.Inner", task__class_path="here.Task")
    assert make(config.task).inner.size == 3


def test_an_object_gives_way_to_a_plain_value_and_back(here):
    note = "trainer: {callbacks: {class_path: here.Noted, init_args: {note: a}}}\n"
    keys = {"task": "here.Task", "trainer.callbacks": "null"}
    Path("note.yaml").write_text(note)
    config = load_config("note.yaml", overrides=keys, trainer_class=FakeTrainer)
    assert config.trainer.arguments["callbacks"] is None
    config = load(TASK, trainer__callbacks="{class_path: here.Noted, init_args: {note: b}}")
    assert build(config).trainer.callbacks.note == "b"


def test_a_profiler_is_a_word_or_an_object(here):
    def profiler(given):
        Path("task.yaml").write_text(TASK)
        config = load_config("task.yaml", overrides={"trainer.profiler": given})
        return build(config).trainer.options.profiler

    assert profiler("simple") == "simple"
    where = "class_path: lightkit.callbacks.TraceProfiler"
    assert profiler(f"{{{where}, init_args: {{steps: [3, 5]}}}}").steps == (3, 5)


def test_lists_are_replaced(here):
    one, two = (
        "{{trainer: {{callbacks: [{{class_path: here.Noted, init_args: {{note: {}}}}}]}}}}",
    ) * 2
    run = build(load(TASK, one.format("a"), two.format("b")))
    assert [callback.note for callback in run.trainer.callbacks] == ["b"]


def test_trainer_data_task_in_this_order_and_a_seed_is_drawn_and_saved(here):
    config = load(TASK + "data: here.Data\n")
    first = build(config)
    assert first.trainer.seed == yaml.safe_load(config.to_yaml())["trainer"]["seed"]
    assert first.trainer.config_text == config.to_yaml()
    again = build(load(config.to_yaml()))
    assert again.trainer.seed == first.trainer.seed
    assert again.data.first_draw == first.data.first_draw


def test_the_resolved_config_gives_itself(here):
    config = load(
        TASK,
        data="here.Data",
        task__inner="here.Inner",
        task__inner__size=2,
        task__name="1e-3",
        task__free="[1, {class_path: here.Inner, init_args: {size: 1}}, 2024-01-31, 1:30:00]",
    )
    assert load(config.to_yaml()).to_yaml() == config.to_yaml()
    task = build(config).task
    assert task.name == "1e-3"
    assert isinstance(task.free[1], Inner)
    assert task.free[2:] == ["2024-01-31", "1:30:00"]
    assert yaml.safe_load(config.to_yaml())["task"]["init_args"]["inner"]["init_args"] == {
        "size": 2,
        "scale": 1.0,
    }


def test_anchors_and_merges_are_read(here):
    text = TASK + "data:\n  class_path: here.Data\n  init_args: &a {batch_size: 8}\n"
    assert load(text).data.arguments == {"batch_size": 8}
    text = "x: &a {size: 1, scale: 2}\ny: {<<: *a, size: 3}\n"
    Path("a.yaml").write_text(text)
    assert read_sources(["a.yaml"], {}, "").tree["y"] == {"size": 3, "scale": 2}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n", "0.yaml: wrong type"),
        ("task: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("trainer: 3\ntask: here.Task\n", "0.yaml, line 1: trainer: wrong type"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("? [a]\n: 1\n", "a key must be text"),
        ("task: {class_path: here.Task, init_args: 3}\n", "a mapping of arguments"),
        ("task: {class_path: [1]}\n", "not an import path"),
        ("task: {class_path: nowhere.at.all}\n", "no module 'nowhere'"),
    ],
)
def test_unusable_files(here, text, part):
    with pytest.raises(ConfigError, match=r"0\.yaml") as caught:
        load(text)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_an_error_inside_an_imported_module_is_not_hidden(here, monkeypatch):
    Path("bad_module.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(str(here))
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        load("task: bad_module.Task\n")


def test_a_shipped_overlay_is_found_from_anywhere(here):
    sources = read_sources(["configs/trainer/cpu.yaml", "trainer/debug.yaml"], {}, "")
    assert sources.tree["trainer"]["accelerator"] == "cpu"


def test_every_shipped_overlay_fits_the_trainer(here):
    from lightkit._share import share_dir

    overlays = sorted((share_dir("configs") / "trainer").glob("*.yaml"))
    assert [file.stem for file in overlays] == ["cpu", "ddp", "debug", "gpu"]
    for file in overlays:
        load_config(file, overrides={"task": "here.Task"})


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        ("1e-3", float, 1e-3),
        (1, int | float, 1),
        (2.5, int | float | str | None, 2.5),
        (None, int | None, None),
        (True, bool | int, True),
        (1, bool | int, 1),
        ("auto", int | str | list[int], "auto"),
        ([0, 1], int | str | list[int], [0, 1]),
        ("warn", bool | Literal["warn"] | None, "warn"),
        ("a/b", Path, Path("a/b")),
        ("a/b", str | Path, "a/b"),
        ("fast", Mode, Mode.fast),
        ("s", Mode, Mode.slow),
        ([1, 2.5], tuple[float, ...], (1.0, 2.5)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1, 1], set[int], {1}),
        ([1], Sequence[float], [1.0]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1]}, dict, {"a": [1]}),
        (3, Annotated[int, "unit"], 3),
        ("builtins.len", Callable[[Any], int], len),
        ("torch.nn.ReLU", type[torch.nn.Module], torch.nn.ReLU),
        ("torch.float64", torch.dtype, torch.float64),
        ({"rate": 1}, Options, Options(rate=1.0)),
        ({"x": {"class_path": "fractions.Fraction"}}, Any, {"x": 0}),
    ],
)
def test_values_that_fit(value, annotation, expected):
    node = convert(value, annotation)
    made = make(node)
    assert made == expected
    assert type(made) is type(expected)
    assert make(convert(plain(node), annotation)) == expected


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int),
        (1, bool),
        (1.0, int),
        ("3", int),
        (True, float),
        ("x", float),
        (3, str),
        (None, str),
        ("yes", bool),
        ("loud", Literal["warn"]),
        (1, Literal[True]),
        ("medium", Mode),
        ([1, "a"], list[int]),
        ("ab", list[str]),
        ([1, 2, 3], tuple[int, int]),
        ([1], dict[str, int]),
        (3, Path),
        (3, torch.nn.Module),
        ("torch.nn.ReLU", lk.Callback),
        ("torch.nn.relu", torch.nn.Module),
        ("math.pi", Callable),
        ("math.pi", type),
        ({"class_path": "math.pi"}, Any),
    ],
)
def test_values_that_do_not_fit(value, annotation):
    with pytest.raises(MisfitError):
        convert(value, annotation)


def test_the_error_tells_what_is_wrong_inside_a_union(here):
    union = list[lk.Callback] | lk.Callback | None
    with pytest.raises(MisfitError) as caught:
        convert([{"class_path": "here.Noted", "init_args": {"note": 3}}], union, ("callbacks",))
    assert caught.value.path == ("callbacks", 0, "init_args", "note")
    assert describe(union) == "list of Callback, Callback or null"


def test_a_factory_is_a_class_with_some_arguments_set():
    spec = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.5}}
    factory = make(convert(spec, Callable[..., torch.optim.Optimizer]))
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["momentum"] == 0.5
    activation = make(convert({"class_path": "torch.nn.ReLU"}, Callable[[Any], Any]))
    assert isinstance(activation, torch.nn.ReLU)


def test_an_object_of_its_class_path(here):
    spec = {"class_path": "here.Inner", "init_args": {"size": 3}}
    assert make(convert(spec, object)).size == 3
    with pytest.raises(MisfitError, match="argument 'size' of Inner is missing"):
        convert("here.Inner", Inner)


def test_arguments_follow_kwargs_to_the_class_that_names_them():
    class Base:
        def __init__(self, a: int, b: int = 2):
            pass

    class Forwards(Base):
        def __init__(self, c: int = 3, **kwargs):
            super().__init__(**kwargs)

    class Keeps(torch.nn.Module):
        def __init__(self, c: int = 3, **kwargs):
            super().__init__()

    known, takes_any = arguments(Forwards)
    assert list(known) == ["c", "a", "b"]
    assert not takes_any
    assert arguments(Keeps)[1]
    assert arguments(lk.DataModule) == ({}, False)
    assert arguments(Mode)[0] is not None


def test_an_annotation_that_cannot_be_resolved_takes_any_value(here):
    known, _ = arguments(Task)
    assert known["unresolved"].annotation is Any
    assert known["lr"].annotation is float
    assert load(TASK, task__unresolved=[1]).task.arguments["unresolved"] == [1]


def test_docstrings_are_read():
    assert argument_texts(Task.__doc__) == {
        "lr": "The learning rate, in two lines.",
        "inner": "An object.",
    }
    assert argument_texts(None) == {}
