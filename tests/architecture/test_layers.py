"""Imports go down, and never in a circle."""

from __future__ import annotations

import graphlib

#: From the bottom to the top. A package stands for all its modules, unless one is named itself.
#: A module may import from its own layer and from those below it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "differences",
        "direct",
        "elsewhere",
        "errors",
        "freezing",
        "hints",
        "hook_names",
        "state",
        "rng",
        "task_hooks",
        "signatures",
        "screen",
        "signals",
        "timing",
        "_share",
    ),
    (
        "flow",
        "events",
        "hooks",
        "hparams",
        "limits",
        "console",
        "precision",
        "data",
        "distributed",
        "loggers.base",
    ),
    (
        "columns",
        "compile_report",
        "compiling",
        "finetuning",
        "rates",
        "fused",
        "history",
        "losses",
        "metric_merging",
        "metric_objects",
        "named",
        "readings",
        "recording",
        "schedules",
        "targets",
        "totals",
        "windows",
    ),
    ("checkpoint", "export", "metrics", "optim", "supervised", "task", "task_view"),
    ("run",),
    ("agreement", "averages", "loops", "evaluation", "closure", "predictions", "instruments"),
    ("callbacks", "loggers"),
    (
        "advice",
        "alarms",
        "announce",
        "calls",
        "checks",
        "explaining",
        "failure",
        "feeds",
        "functional",
        "ledger",
        "mending",
        "opening",
        "options",
        "outlook",
        "places",
        "planned",
        "pseudocode",
        "provenance",
        "rehearsal",
        "resuming",
        "saving",
        "session",
        "trainer",
        "trials",
        "view",
        "watching",
    ),
    (
        "config_types",
        "config",
        "cli",
        "proofs",
        "prove",
        "replay",
        "runs",
        "sklearn",
        "testing",
        "tuning",
        "__main__",
        "",
    ),
)


def layer(name: str) -> int:
    """Returns the layer of a module: that of its longest prefix in the table."""
    places = {entry: i for i, entries in enumerate(LAYERS) for entry in entries}
    prefix = name
    while prefix not in places and "." in prefix:
        prefix = prefix.rpartition(".")[0]
    assert prefix in places, f"lightkit/{name} has no layer yet: give it one in LAYERS"
    return places[prefix]


def edges(modules, *, eager_only):
    """Yields (module, imported module, line) for each import of one module of ours by another."""
    for module in modules.values():
        for item in module.imports:
            if item.target.split(".")[0] != "lightkit" or (eager_only and not item.eager):
                continue
            target = item.target.removeprefix("lightkit").removeprefix(".")
            while target and target not in modules:  # an attribute of a module
                target = target.rpartition(".")[0]
            if target != module.name:
                yield module, target, item.line


def test_every_entry_of_the_table_exists(modules):
    known = {name.partition(".")[0] for name in modules} | set(modules)
    assert [entry for entries in LAYERS for entry in entries if entry not in known] == []


def test_imports_go_down(modules):
    upward = [
        f"{module.file}:{line} imports {target or 'lightkit'}, which lies above"
        for module, target, line in edges(modules, eager_only=False)
        if layer(target) > layer(module.name)
    ]
    assert upward == []


def test_no_import_cycles(modules):
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for module, target, _ in edges(modules, eager_only=True):
        graph[module.name].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError("imports in a circle: " + " -> ".join(error.args[1])) from None


def test_callbacks_and_loggers_do_not_know_each_other(modules):
    shared = {"loggers.base", "callbacks", "loggers"}
    known = [
        f"{module.file}:{line} imports {target}"
        for module, target, line in edges(modules, eager_only=False)
        if module.name.startswith(("callbacks.", "loggers."))
        and target.startswith(("callbacks", "loggers"))
        and target not in shared
    ]
    assert known == []
