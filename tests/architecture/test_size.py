"""Small enough to be read."""

from __future__ import annotations

import ast

FILE_LINES = 500
FUNCTION_LINES = 60


def test_no_long_file(modules):
    assert {m.file: m.lines for m in modules.values() if m.lines > FILE_LINES} == {}


def test_no_long_function(modules):
    long = {
        f"{module.file}:{node.lineno} {node.name}": lines
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert long == {}


def test_every_module_says_what_it_is_for(modules):
    assert [m.file for m in modules.values() if not ast.get_docstring(m.tree)] == []
