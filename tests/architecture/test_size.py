"""Small enough to be read."""

from __future__ import annotations

import ast
import io
import tokenize

FILE_LINES = 500
FUNCTION_LINES = 60
#: What runs a fit, read in this order: an evening.
LOOP = ("state", "flow", "hooks", "task", "trainer", "calls", "run", "loops", "losses", "closure",
        "evaluation", "optim")  # fmt: skip
#: Lines of code: those with something on them beside comments and docstrings. The package is large
#: for all that it does; more of it needs a reason, and less of it lowers the number here.
LOOP_LINES = 2_400
PACKAGE_LINES = 25_300
SKLEARN_LINES = 250


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


def lines_of_code(module) -> int:
    """Returns the lines of a module that hold code."""
    documented = {ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef}
    text = {
        line
        for node in ast.walk(module.tree)
        if type(node) in documented and ast.get_docstring(node) is not None
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}  # fmt: skip
    tokens = tokenize.generate_tokens(io.StringIO(module.path.read_text()).readline)
    held = {
        line
        for token in tokens
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(held - text)


def test_the_loop_is_an_evenings_reading(modules):
    found = sum(lines_of_code(modules[name]) for name in LOOP)
    assert found <= LOOP_LINES


def test_the_package_does_not_grow_unseen(modules):
    found = sum(map(lines_of_code, modules.values()))
    assert found <= PACKAGE_LINES


def test_the_estimators_are_small(modules):
    assert lines_of_code(modules["sklearn"]) <= SKLEARN_LINES


def test_every_module_says_what_it_is_for(modules):
    assert [m.file for m in modules.values() if not ast.get_docstring(m.tree)] == []
