"""Each guest enters through one door, and each fact is written in one place."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

#: Packages, and the only files that may import them.
PACKAGES: dict[str, set[str]] = {
    "rich": {"screen.py"},
    "yaml": {"config.py"},
    "tensorboard": {"loggers/tensorboard.py"},
    "torch.utils.tensorboard": {"loggers/tensorboard.py"},
    "wandb": {"loggers/wandb.py"},
    "torchmetrics": {"named.py"},
    # tuning: the picture of its sweep
    "matplotlib": {"history.py"},
    "pandas": {"history.py"},
    "onnx": {"export.py"},
    "onnxruntime": {"export.py"},
    "onnxscript": {"export.py"},
    "safetensors": {"checkpoint/files.py"},
    "torch.profiler": {"callbacks/trace.py"},
    "argparse": {"cli.py", "hparams.py"},  # hparams: its Namespace
    # checkpoint/sharded: the parts of sharded checkpoints, by torch.distributed.checkpoint
    "torch.distributed": {"distributed/", "checkpoint/sharded.py"},
    "torch._dynamo": {"compiling.py", "compile_report.py"},
    "sklearn": {"sklearn.py"},
    # checkpoint: its errors; processes: tries whether a value can be sent before all wait for it
    "pickle": {"checkpoint/", "distributed/processes.py"},
}
#: Expressions as they are written, and the only files that may contain them.
EXPRESSIONS: dict[str, set[str]] = {
    r"os\.(environ|getenv|putenv)": {"distributed/env.py"},
    r"torch\.distributed\.": {"distributed/"},
    r"(torch\.)?(amp\.|cuda\.amp\.)?(autocast|GradScaler)\(": {"precision.py"},
    # proofs: that torch's own reader takes the files
    r"torch\.(save|load)\(": {"checkpoint/", "proofs.py"},
    # Each waits for the device; distributed, planning: numbers in the memory of the CPU.
    r".*\.(item|tolist)$": {"readings.py", "checkpoint/", "distributed/", "data/planning.py"},
    r"torch\.load\(.*weights_only=False": set(),
    r"signal\.signal": {"signals.py", "data/"},  # data: in worker processes
    r"torch\.inference_mode": set(),
    r"torch\.cuda\.(Stream|stream)$": {"data/prefetch.py"},
    r"torch\.(compile|compiler|_dynamo)\b": {"compiling.py"},
}


def _within(file: str, doors: set[str]) -> bool:
    return any(file == door or (door.endswith("/") and file.startswith(door)) for door in doors)


@pytest.mark.parametrize("package", PACKAGES)
def test_one_door_per_package(modules, package):
    strangers = [
        f"{module.file}:{item.line} imports {item.target}"
        for module in modules.values()
        for item in module.imports
        if f"{item.target}.".startswith(f"{package}.")
        and not _within(module.file, PACKAGES[package])
    ]
    assert strangers == []


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_one_door_per_expression(modules, pattern):
    strangers = [
        f"{module.file}:{node.lineno} {ast.unparse(node)}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Attribute, ast.Call))
        and re.match(pattern, ast.unparse(node))
        and not _within(module.file, EXPRESSIONS[pattern])
    ]
    assert strangers == []


def test_only_the_screen_and_the_command_line_print(modules):
    prints = [
        f"{module.file}:{node.lineno}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and module.file not in {"cli.py", "screen.py", "callbacks/progress.py"}
    ]
    assert prints == []


def test_only_the_loop_moves_the_counters(modules):
    from lightkit.state import TrainState

    counters = {field.name for field in dataclasses.fields(TrainState)}
    writes = [
        f"{module.file}:{node.lineno} {ast.unparse(node)}"
        for module in modules.values()
        if module.file not in {"loops.py", "state.py"}
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr in counters
        and re.fullmatch(r"(.*\.)?_?(train_)?state", ast.unparse(node.value))
    ]
    assert writes == []


def test_only_the_loop_calls_the_steps_of_the_user(modules):
    steps = {"training_step", "validation_step", "test_step", "predict_step"}
    calls = [
        f"{module.file}:{node.lineno} {ast.unparse(node)}"
        for module in modules.values()
        if module.file not in {"loops.py", "closure.py", "task.py"}
        and not module.file.startswith("distributed/")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in steps
    ]
    assert calls == []
