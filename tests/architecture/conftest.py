"""The source of lightkit, read once."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightkit"


@dataclass
class Import:
    target: str  # the module, or the attribute of a module, as it is written: "lightkit.errors"
    line: int
    eager: bool  # executed when the module is imported


@dataclass
class Module:
    name: str  # without "lightkit.": "loops", "callbacks.progress"; "" for the package itself
    path: Path
    tree: ast.Module = field(repr=False)
    lines: int
    imports: list[Import] = field(repr=False, default_factory=list)

    @property
    def file(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()


class _Imports(ast.NodeVisitor):
    """Collects what is imported at run time: not what stands under TYPE_CHECKING."""

    def __init__(self) -> None:
        self.found: list[Import] = []
        self._depth = 0

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: write absolute imports"
        for alias in node.names:
            self._add(f"{node.module}.{alias.name}", node.lineno)

    def _add(self, target: str, line: int) -> None:
        self.found.append(Import(target, line, eager=self._depth == 0))


def _read(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    # The oldest Python that is supported must be able to read it.
    tree = ast.parse(text, filename=str(path), feature_version=(3, 10))
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    name = name.removesuffix("__init__").removesuffix(".")
    visitor = _Imports()
    visitor.visit(tree)
    return Module(name, path, tree, len(text.splitlines()), visitor.found)


@pytest.fixture(scope="session")
def modules() -> dict[str, Module]:
    """Every module of lightkit by its name without the package's."""
    read = map(_read, sorted(PACKAGE.rglob("*.py")))
    return {module.name: module for module in read if "_shared" not in module.path.parts}
