"""What `import lightkit` does and what it leaves alone."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types

import pytest

LAZY = (
    "IPython",
    "matplotlib",
    "onnx",
    "pandas",
    "rich",
    "safetensors",
    "sklearn",
    "tensorboard",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchmetrics",
    "wandb",
    "yaml",
)
#: Audit events of a process or a socket that begins.
EVENTS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
          "pty.spawn", "socket.__new__", "subprocess.Popen")  # fmt: skip
#: Functions that start a thread, of which not every Python tells its audit hooks.
STARTS = ("start_new_thread", "_start_new_thread", "start_joinable_thread",
          "_start_joinable_thread")  # fmt: skip


def python(code: str, **variables: str) -> str:
    """Runs code in a new process and returns what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    env = os.environ | variables
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_heavy_modules_stay_out():
    code = f"""
import sys, torch
before = set(sys.modules)
import lightkit
print([name for name in {LAZY} if name in sys.modules and name not in before])
"""
    assert python(code).strip() == "[]"


def test_importing_starts_nothing():
    """Neither every public name, which loads nothing heavy, nor every module of the package."""
    pytest.importorskip("sklearn")  # what lightkit.sklearn is made of
    code = f"""
import _thread, sys, threading, torch
before, seen = set(sys.modules), []
def watch(event, args):
    if event in {EVENTS}:
        seen.append(event)
def watched(start):
    return lambda *args, **kwargs: seen.append("thread") or start(*args, **kwargs)
sys.addaudithook(watch)
for module in _thread, threading:
    for name in {STARTS}:
        if hasattr(module, name):
            setattr(module, name, watched(getattr(module, name)))
import lightkit
for room in lightkit, lightkit.callbacks, lightkit.loggers:
    for name in room.__all__:
        getattr(room, name)
heavy = [name for name in {LAZY} if name in sys.modules and name not in before]
import importlib, pkgutil
for module in pkgutil.walk_packages(lightkit.__path__, "lightkit."):
    if module.name != "lightkit.__main__":
        importlib.import_module(module.name)
print(heavy, seen)
import socket, subprocess
threading.Thread(target=len, args=((),)).start()
socket.socket().close()
subprocess.run([sys.executable, "-c", ""])
print({{"thread", "socket.__new__", "subprocess.Popen"}} - {{*seen}})  # it is looking
"""
    assert python(code).splitlines() == ["[] []", "set()"]


def test_all_is_the_truth():
    import lightkit

    exported = {
        name
        for name, value in vars(lightkit).items()
        if not name.startswith("_") and name != "annotations"
        if not isinstance(value, types.ModuleType) or name in lightkit.__all__
    }
    lazy = {name for name in lightkit.__all__ if name.startswith("__")}
    assert exported | lazy <= set(lightkit.__all__)
    for name in lightkit.__all__:
        assert hasattr(lightkit, name), name
    assert set(lightkit.__all__) <= set(dir(lightkit))
    assert len(lightkit.__all__) == len(set(lightkit.__all__))


def _public() -> dict[str, object]:
    import lightkit

    return {name: getattr(lightkit, name) for name in lightkit.__all__ if name != "__version__"}


def test_every_public_name_is_documented():
    bare = [
        name
        for name, value in _public().items()
        if not (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__)
    ]
    assert bare == []


def test_every_public_method_is_documented():
    """Its own docstring, or that of the method that it overrides."""
    bare = [
        f"{name}.{method}"
        for name, value in _public().items()
        if inspect.isclass(value)
        for method, member in vars(value).items()
        if not method.startswith("_")
        and isinstance(member, (types.FunctionType, property, classmethod, staticmethod))
        and not inspect.getdoc(getattr(value, method))
    ]
    assert bare == []


@pytest.mark.parametrize("package", ["callbacks", "loggers"])
def test_packages_export_what_they_say(package):
    import importlib

    module = importlib.import_module(f"lightkit.{package}")
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), f"{package}.{name}"


def test_importing_is_cheap(tmp_path):
    """With the Trainer too, which is imported when it is first asked for.

    From compiled files, as an installed package has them: where Python is told to write none, each
    of the processes would compile the package anew, which takes five times as long.
    """
    code = """
import sys, time, torch
before, began = len(sys.modules), time.process_time()
import lightkit
alone, few = time.process_time() - began, len(sys.modules) - before
lightkit.Trainer
print(alone, few, time.process_time() - began, len(sys.modules) - before)
"""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [python(code, **compiled).split() for _ in range(5)]
    alone, seconds = (min(float(run[i]) for run in runs) for i in (0, 2))
    few, modules = int(runs[0][1]), int(runs[0][3])
    print(f"import lightkit: {alone * 1e3:.1f} ms of process time, {few} modules")
    print(f"and lightkit.Trainer: {seconds * 1e3:.1f} ms, {modules} modules")
    assert few < modules
    assert seconds <= 0.050
    assert modules <= 100


def test_lazy_names_are_attributes_before_they_are_imported():
    code = """
import sys, lightkit as lk
print("lightkit.callbacks" in sys.modules, "callbacks" in dir(lk))
print(lk.callbacks.ModelCheckpoint.__name__, hasattr(lk, "callback"))
from lightkit import Trainer
print(Trainer is lk.Trainer, Trainer.__module__)
"""
    expected = ["False", "True", "ModelCheckpoint", "False", "True", "lightkit.trainer"]
    assert python(code).split() == expected
