"""The pages of the reference: complete, and as Python itself sees what they show."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("reference*.md"))}


@pytest.fixture(scope="module")
def docstrings():
    """The hook of mkdocs."""
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MARKED = re.findall(r"<!-- docstring: ([\w.]+)", "".join(PAGES.values()))


def real(name):
    """Returns what Python finds under a dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("package", ["lightkit", "lightkit.callbacks", "lightkit.loggers"])
def test_every_public_name_is_on_a_page(package):
    module = importlib.import_module(package)
    # Other names of the same things, such as `RichProgressBar`, stand beside them.
    lines = re.findall(r"^Also .*", "\n".join(PAGES.values()), re.MULTILINE)
    beside = set(re.findall(r"`(?:lk\.)?(\w+)`", " ".join(lines)))
    missing = [
        name for name in module.__all__ if f"{package}.{name}" not in MARKED and name not in beside
    ]
    assert missing == []


def test_no_name_is_on_two_pages():
    assert sorted(MARKED) == sorted(set(MARKED))


@pytest.mark.parametrize("name", MARKED)
def test_what_is_shown_is_what_python_sees(docstrings, name):
    if name.startswith("lightkit.sklearn."):
        pytest.importorskip("sklearn")
    found, shown = real(name), docstrings.described(name)
    first = inspect.getdoc(found).splitlines()[0].replace("``", "`").removesuffix(":")
    assert first in shown
    parts = re.split(r"^### (\w+)\n", shown, flags=re.MULTILINE)
    if parts[0].startswith("```"):
        made = inspect.signature(found.__init__ if inspect.isclass(found) else found)
        assert arguments(parts[0]) == [name for name in made.parameters if name != "self"]
    for member, text in zip(parts[1::2], parts[2::2], strict=True):
        made = getattr(found, member)
        if callable(made):
            expected = list(inspect.signature(made).parameters)
            bound = inspect.isfunction(inspect.getattr_static(found, member))  # and has a self
            assert arguments(text) == expected[bound:], member
        else:
            assert isinstance(made, property)


def arguments(shown):
    """Returns the names of the arguments in the first block of code."""
    block = shown.partition("```python\n")[2].partition("\n```")[0]
    (function,) = ast.parse(f"def {block}: ...").body
    given = function.args
    several = [given.vararg] if given.vararg else []
    every = [given.kwarg] if given.kwarg else []
    return [
        arg.arg for arg in [*given.posonlyargs, *given.args, *several, *given.kwonlyargs, *every]
    ]


def test_a_docstring_becomes_markdown(docstrings):
    shown = docstrings.described("lightkit.Trainer")
    assert shown.startswith("```python\nTrainer(\n    *,\n    max_epochs: int | None = None,\n")
    assert "**Arguments**\n\n- `max_epochs`: Epochs to train" in shown
    assert "**Raises**\n\n- `ConfigError`: For arguments that cannot work." in shown
    assert "### fit\n\n```python\nfit(\n    model: TaskModule,\n" in shown
    assert "**Returns**\n\nThe history: one dict per epoch." in shown
    assert "### global_step\n\n```python\nglobal_step: int\n```" in shown


def test_what_a_public_base_has_stands_with_the_base(docstrings):
    """A callback's page says what is its own."""
    assert "### on_train_start" in docstrings.described("lightkit.Callback")
    assert "### on_train_start" in docstrings.described("lightkit.TaskModule")  # of TaskHooks
    assert "### on_train_start" not in docstrings.described("lightkit.callbacks.LambdaCallback")
    assert "###" not in docstrings.described("lightkit.callbacks.ModelCheckpoint", methods=False)


def test_a_page_gets_its_docstrings(docstrings):
    page = "# Title\n\n<!-- docstring: lightkit.unfreeze -->\n\nThe end.\n"
    shown = docstrings.on_page_markdown(page, page=None, config=None, files=None)
    assert shown.startswith("# Title\n\n```python\nunfreeze(module: nn.Module) -> None\n```\n\n")
    assert shown.endswith("\n\nThe end.\n")
    assert "<!--" not in shown


def test_public_names_are_links(docstrings):
    """But for those in code, and those that are a link already."""
    page = "`Trainer.fit`, `lk.callbacks.SWA()`, [`Trainer`](x), `ConfigError`, `Other`, `fit`\n\n"
    mark = "<!-- docstring: lightkit.unfreeze -->"
    shown = docstrings.on_page_markdown(f"{page}```\n`History`\n```\n{mark}\n")
    assert shown.startswith(
        "[`Trainer.fit`](reference.md#fit), [`lk.callbacks.SWA()`](reference-callbacks.md#swa), "
        "[`Trainer`](x), [`ConfigError`](reference.md#errors), `Other`, `fit`\n\n```\n`History`\n```"
    )
    # The heading "history", of a property of the Trainer's, comes before.
    assert docstrings.places()["History"] == "reference.md#history_1"
    assert docstrings.on_page_markdown(page) == page  # another page than those of the reference


@pytest.mark.parametrize("name", ["lightkit.Trainr", "lightkit.callbacks.Trainer", "torch.nn"])
def test_a_name_that_does_not_exist_stops_the_build(docstrings, name):
    with pytest.raises(LookupError, match=re.escape(name)):
        docstrings.on_page_markdown(f"<!-- docstring: {name} -->")
