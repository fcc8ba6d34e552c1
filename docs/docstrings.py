"""Puts docstrings into the reference pages: a hook of mkdocs, named in mkdocs.yml.

Where a page has ``<!-- docstring: lightkit.Trainer -->``, the site shows the signature, the
docstring and the public methods of that name; ``(no methods)`` after the name leaves these out.
Public names in its text are links to where they stand themselves. The sources are read, not
imported, so that the site is built without torch.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- docstring: ([\w.]+)( \(no methods\))? -->")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(
    r"(?<!\[)`(?:lightkit\.|lk\.)?(?:callbacks\.|loggers\.)?([A-Z][\w.]*)(?:\(.*?\))?`"
)
SECTION = re.compile(r"(Args|Attributes|Returns|Raises):")
LINE = 88


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page with its docstrings; mkdocs calls this for each."""
    if not MARK.search(markdown):
        return markdown
    parts = FENCED.split(filled(markdown))
    parts[::2] = [NAMED.sub(linked, part) for part in parts[::2]]  # not in code
    return "".join(parts)


def filled(markdown: str) -> str:
    """Returns a page with its docstrings, as they stand in the sources."""
    return MARK.sub(lambda mark: described(mark[1], methods=not mark[2]), markdown)


def linked(name: re.Match[str]) -> str:
    """Returns a name with a link to its place, if it has one."""
    place = places().get(name[1])
    return f"[{name[0]}]({place})" if place else name[0]


@cache
def places() -> dict[str, str]:
    """Returns ``page#anchor`` of each name on the reference pages: a class, ``Class.method``."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "docs").glob("reference*.md")):
        seen, around = [], ""
        page = filled(path.read_text(encoding="utf-8"))
        for level, title in re.findall(r"^(#{1,3}) (\w+)$", page, re.MULTILINE):
            again = seen.count(title.lower())
            seen.append(title.lower())
            around = around if level == "###" else title
            name = f"{around}.{title}" if level == "###" else title
            found[name] = f"{path.name}#{title.lower()}{f'_{again}' if again else ''}"
    for node in statements("lightkit.errors"):
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, found["errors"])
    return found


def described(name: str, *, methods: bool = True) -> str:
    """Returns the Markdown of a public name, such as ``lightkit.Trainer``.

    Raises:
        LookupError: There is no such name.
    """
    module, _, last = name.rpartition(".")
    home, node = find(module, last)
    if node is None:
        raise LookupError(f"a page asks for the docstring of {name}, which does not exist")
    if isinstance(node, ast.Module):
        return text(node)
    if isinstance(node, ast.FunctionDef):
        return f"{signature(last, node)}\n\n{text(node)}"
    shown = members(home, node)
    made = shown.pop("__init__", None)
    parts = [signature(last, made, method=True)] if made else []
    parts.append(text(node))
    for member, function in shown.items() if methods else ():
        parts += [f"### {member}", signature(member, function, method=True), text(function)]
    return "\n\n".join(parts)


# --- from names to nodes -------------------------------------------------------------------------


@cache
def tree(module: str) -> ast.Module | None:
    """Returns the parsed source of a module or package of lightkit, None where there is none."""
    path = ROOT / module.replace(".", "/")
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if module and file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def statements(module: str) -> Iterator[ast.stmt]:
    """Yields the statements of a module, and those under ``if TYPE_CHECKING``."""
    found = tree(module)
    for node in found.body if found else ():
        yield from node.body if isinstance(node, ast.If) else (node,)


@cache
def public() -> frozenset[str]:
    """Returns the names that lightkit, its callbacks and its loggers export."""
    return frozenset(
        name
        for module in ("lightkit", "lightkit.callbacks", "lightkit.loggers")
        for node in statements(module)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        for name in ast.literal_eval(node.value)
    )


def find(module: str, name: str) -> tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | None]:
    """Returns the module in which a name is defined, and its node: None for what is a guest's."""
    inner = tree(f"{module}.{name}")
    if inner is not None:
        return f"{module}.{name}", inner
    for node in statements(module):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for item in node.names:
                if name == (item.asname or item.name):
                    return find(str(node.module), item.name)
    return module, None


def members(module: str, node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """Returns the public methods of a class and ``__init__``; its own before those of its bases.

    What a base that is public itself has stands there.
    """
    line = list(lineage(module, node))
    elsewhere = {name for home, base, told in line if told for name in own(home, base)}
    shown: dict[str, ast.FunctionDef] = {}
    for home, base, _ in line:
        for name, function in own(home, base).items():
            if name == "__init__" or name not in elsewhere:
                shown.setdefault(name, function)
    return shown


def lineage(
    module: str, node: ast.ClassDef, told: bool = False
) -> Iterator[tuple[str, ast.ClassDef, bool]]:
    """Yields a class and its bases with their modules, and whether a reference page has them."""
    yield module, node, told
    for base in node.bases:
        home, found = find(module, ast.unparse(base))
        if isinstance(found, ast.ClassDef):
            yield from lineage(home, found, told or found.name in public())


def own(module: str, node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """Returns the documented public methods of a class's body, and ``__init__``."""
    found: dict[str, ast.FunctionDef] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            told = ast.get_docstring(item) and not item.name.startswith("_")
            if told or item.name == "__init__":
                found.setdefault(item.name, item)  # a property, not its setter
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Tuple):
            # export, to_onnx = export_task, export_onnx
            sides = (re.findall(r"\w+", ast.unparse(s)) for s in (item.targets[0], item.value))
            for name, value in zip(*sides, strict=True):
                _, function = find(module, value)
                if isinstance(function, ast.FunctionDef):
                    found[name] = function
    return found


# --- from nodes to Markdown ----------------------------------------------------------------------


def signature(name: str, node: ast.FunctionDef, *, method: bool = False) -> str:
    """Returns a block of code with what a call looks like; for a property its type."""
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    result = ast.unparse(node.returns) if node.returns and node.name != "__init__" else ""
    if "property" in marks:
        return f"```python\n{name}: {result}\n```"
    result = result and f" -> {result}"
    found = arguments(node.args)[method and "staticmethod" not in marks :]
    line = f"{name}({', '.join(found)}){result}"
    if len(line) > LINE:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in found) + f"){result}"
    return f"```python\n{line}\n```"


def arguments(given: ast.arguments) -> list[str]:
    """Returns the arguments with their types and defaults."""
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found = [argument(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if given.posonlyargs:
        found.insert(len(found) - len(given.args), "/")
    if given.vararg:
        found.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        found.append("*")
    found += map(argument, given.kwonlyargs, given.kw_defaults)
    if given.kwarg:
        found.append(f"**{ast.unparse(given.kwarg)}")
    return found


def argument(given: ast.arg, default: ast.expr | None) -> str:
    """Returns ``name: type = default``."""
    equals = " = " if given.annotation else "="
    return ast.unparse(given) + (f"{equals}{ast.unparse(default)}" if default else "")


def text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """Returns a Google docstring as Markdown."""
    docstring = re.sub(r"``(.+?)``", r"`\1`", ast.get_docstring(node) or "", flags=re.DOTALL)
    docstring = re.sub(r"::$", ":", docstring, flags=re.MULTILINE)
    docstring = re.sub(r"`?docs/([\w-]+)\.md`?", r"[\1](\1.md)", docstring)
    lines = docstring.splitlines()
    starts = [i for i, line in enumerate(lines) if SECTION.fullmatch(line)]
    parts = ["\n".join(lines[: starts[0] if starts else None])]
    for start, end in zip(starts, [*starts, None][1:], strict=True):
        title, body = lines[start][:-1], textwrap.dedent("\n".join(lines[start + 1 : end])).strip()
        if title != "Returns":  # "name: text"
            body = re.sub(r"^(\*{0,2}[\w.]+(?:, [\w.]+)*):", r"- `\1`:", body, flags=re.MULTILINE)
        parts.append(f"**{title.replace('Args', 'Arguments')}**\n\n{body}")
    return "\n\n".join(part.strip("\n") for part in parts)
