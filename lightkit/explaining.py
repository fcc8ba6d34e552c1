"""What a step was doing when it failed: its module, shapes, dtypes and devices, as a note on the error.

All of it is read from the frames that the exception passed, so nothing runs a second time and nothing
is kept. The note is text; tensors are named by their shapes, and their values are not read.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import linecache
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightkit.data.move import members_of
from lightkit.errors import LightkitError, some
from lightkit.mending import mend

_log = logging.getLogger("lightkit")

#: What torch raises where shapes, dtypes, devices or the structure of a batch do not fit.
_KINDS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError)
#: The functions that call the user's steps, and where batches come from.
DOORS = {("lightkit.loops", "train_step"), ("lightkit.evaluation", "_evaluate_loader")}
_FETCHING = ("lightkit.data.stream", "lightkit.data.groups", "lightkit.evaluation")
_LIBRARIES = sys.stdlib_module_names | {"lightkit", "torch", "torchmetrics"}
_CALLS = ("_wrapped_call_impl", "_call_impl")
_INSTALLED = "site-packages"
_START = "lightkit: "
_MOST, _LONG = 8, 300


@dataclass
class Step:
    """Where an exception was in the loop.

    Attributes:
        stage: "training", "validation", "test" or "predict".
        batch: The batch, on its device.
        index: Its number in its loader, from 0.
        loader: The number of the loader.
        frames: The frames below the loop, from the step to where the exception was raised.
    """

    stage: str
    batch: Any
    index: int
    loader: int
    frames: list[tuple[FrameType, int]]


def step_of(error: BaseException) -> Step | None:
    """Returns the step that an exception came out of; None where it did not, as from a loader."""
    frames, doors = list(walk_tb(error.__traceback__)), []
    if (cause := _cause(error)) is not error:
        frames += walk_tb(cause.__traceback__)
    for number, (frame, _) in enumerate(frames):
        if passes(frame, DOORS):
            doors.append(number)
    if not doors or not (below := frames[doors[-1] + 1 :]):
        return None
    if below[0][0].f_globals.get("__name__") in _FETCHING:
        return None
    names = frames[doors[-1]][0].f_locals
    if "index" not in names or "batch" not in names:
        return None
    stage = "training" if "group" in names else names["run"].stage
    return Step(stage, names["batch"], names["index"], names.get("number", 0), below)


def passes(frame: FrameType, functions: Set[tuple[str, str]]) -> bool:
    """Tells whether a frame is of one of these functions, named by module and name."""
    return (frame.f_globals.get("__name__", ""), frame.f_code.co_name) in functions


def explain(error: BaseException, task: nn.Module) -> None:
    """Adds a note to an error that torch raised in a step of the task; never raises.

    On Python 3.10, where exceptions have no notes, it is logged.

    Args:
        error: The exception under way.
        task: The task whose submodules are named.
    """
    try:
        noted = any(note.startswith(_START) for note in getattr(error, "__notes__", ()))
        cause = _cause(error)
        if noted or not isinstance(cause, _KINDS) or isinstance(cause, LightkitError):
            return
        step = step_of(error)
        if step is None or _says_enough(cause, step):
            return
        note = _note(cause, step, task)
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            _log.error("%s", note)
    except Exception as problem:  # noqa: BLE001  must not hide the error itself
        _log.debug("no note on the error: %s", problem)


def _cause(error: BaseException) -> BaseException:
    """Returns what an error of ours was made of; any other is returned itself."""
    return (error.__cause__ or error) if isinstance(error, LightkitError) else error


def _says_enough(error: BaseException, step: Step) -> bool:
    """Tells whether an error is one of the user's own, or of Python's on a line without tensors."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    if raised and of_user(trace.tb_frame) and _INSTALLED not in code.co_filename:
        return True
    if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torchmetrics"):
        return False
    python = not isinstance(error, RuntimeError) or isinstance(error, RecursionError)
    return python and not _near(line_of(step.frames))


def of_user(frame: FrameType) -> bool:
    """Tells whether a frame is of code that is neither ours nor torch's nor Python's."""
    name = frame.f_globals.get("__name__", "")
    return name.startswith("lightkit._shared.") or name.partition(".")[0] not in _LIBRARIES


def _note(error: BaseException, step: Step, task: nn.Module) -> str:
    """Returns the lines of a note."""
    module, inputs = module_of(step.frames, task)
    where = f"in {step.stage} batch {step.index}"
    rows: list[tuple[str, Any]] = []
    loss = _loss(step.frames)
    if module is not None:
        where = f"in {name_of(module, task)}, {where}"
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if name != "bias"]
        weights = [(name, p) for name, p in own if is_lazy(p) or p.ndim > 1]
        rows = [*inputs.items(), *(weights or own)[:4]]
        rows = [row for row in rows if row[1] is not None and not isinstance(row[1], bool)]
    if loss is not None and "target" not in inputs:  # else it is a module of torch's
        where = f"in {loss[0]}, {where}"
        rows = [("input", loss[1]), ("target", loss[2])]
    lines = [(f"{_START}{where}", rows)]
    if (line := line_of(step.frames)) is not None:
        shown = {(name, id(value)) for name, value in rows}
        own = [(n, v) for n, v in line[1] if (n, id(v)) not in shown and v is not step.batch]
        lines.append((line[0], own))
    taken = any(name == "batch" for _, part in lines for name, _ in part)  # another by now
    lines.append(("", [("given batch" if taken else "batch", step.batch)]))
    hint = mend(error, module, inputs, loss, _near(line) or (line[1] if line else []), task)
    width = max(len(name) for _, part in lines for name, _ in part)
    text = []
    for head, part in lines:
        text += [head] if head else []
        for name, value in part:
            words = seen(value)
            text.append(f"  {name:{width}}  {words[:_LONG]}{' ...' if words[_LONG:] else ''}")
    return "\n".join([*text, f"  {'hint':{width}}  {hint}"] if hint else text)


def module_of(
    frames: list[tuple[FrameType, int]], task: nn.Module
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Returns the innermost module that was called in these frames, and what it was called with.

    None where it is the task itself or none was called.
    """
    for frame, _ in reversed(frames):
        module = frame.f_locals.get("self")
        if frame.f_code.co_name in _CALLS and isinstance(module, nn.Module):
            if any(one is task for one in module.modules()):  # itself, or what shares it over ranks
                return None, {}
            args, kwargs = frame.f_locals.get("args", ()), frame.f_locals.get("kwargs", {})
            signature = inspect.signature(module.forward)
            if all(p.kind is not p.VAR_POSITIONAL for p in signature.parameters.values()):
                with contextlib.suppress(TypeError):  # it cannot be called so: perhaps the error
                    return module, dict(signature.bind_partial(*args, **kwargs).arguments)
            return module, {f"input {i}": value for i, value in enumerate(args, 1)} | kwargs
    return None, {}


def name_of(module: nn.Module, task: nn.Module) -> str:
    """Returns where a module stands in the task, and what it is: ``"net.fc: Linear(...)"``."""
    path = next((name for name, found in task.named_modules() if found is module), "")
    kind = type(module).__name__ if any(True for _ in module.children()) else repr(module)
    return f"{path}: {kind}" if path else f"{kind} (no submodule of the task)"


def line_of(frames: list[tuple[FrameType, int]]) -> tuple[str, list[tuple[str, Any]]] | None:
    """Returns the innermost line of the user's, and the tensors that it could see, by name.

    A line of an installed package, such as a library of networks, only where there is no other.
    """
    found = [one for one in frames if of_user(one[0])]
    own = [one for one in found if _INSTALLED not in one[0].f_code.co_filename]
    for frame, number in (own or found)[-1:]:
        code = frame.f_code
        text = linecache.getline(code.co_filename, number, frame.f_globals).strip()
        place = f"{Path(code.co_filename).name}:{number}, in {code.co_name}: {text}"
        return place, list(_tensors(frame, text))[:_MOST]
    return None


def _near(line: tuple[str, list[tuple[str, Any]]] | None) -> list[tuple[str, Any]]:
    """Returns the tensors that a line names."""
    text, tensors = line or ("", [])
    words = text.partition(": ")[2]
    return [one for one in tensors if re.search(rf"\b{re.escape(one[0])}\b", words)]


def _tensors(frame: FrameType, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the local tensors of a frame, those that its line names first, and attributes there."""
    names = {name: value for name, value in frame.f_locals.items() if _holds_tensors(value)}
    first: dict[str, Any] = {}
    for word in re.findall(r"[A-Za-z_]\w*(?:\.\w+)*", text):
        path, *others = word.split(".")
        value = frame.f_locals.get(path)
        for name in others:
            if not isinstance(value, nn.Module):  # a method of a tensor
                break
            held = {**vars(value), **value._parameters, **value._buffers, **value._modules}
            path, value = f"{path}.{name}", held.get(name)  # a property of the user's is not called
        if path in names or isinstance(value, Tensor):
            first[path] = value
    yield from {**first, **names}.items()


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > 3 or isinstance(value, nn.Module):
        return False
    return any(_holds_tensors(item, depth + 1) for _, item in (members_of(value) or [])[:_MOST])


def _loss(frames: list[tuple[FrameType, int]]) -> tuple[str, Any, Any, int] | None:
    """Returns the loss function of torch's among the frames, with its input, target and no class."""
    for frame, _ in frames:
        names = frame.f_locals
        own = frame.f_globals.get("__name__") == "torch.nn.functional"
        if (
            own
            and isinstance(names.get("input"), Tensor)
            and isinstance(names.get("target"), Tensor)
        ):
            ignored = names.get("ignore_index", -100)
            return frame.f_code.co_name, names["input"], names["target"], ignored
    return None


def seen(value: Any, depth: int = 0) -> str:
    """Returns the structure of a value: ``[float32 (64, 3), int64 (64,)]``. Reads no tensor."""
    if isinstance(value, Tensor):
        shape = "without a shape yet" if is_lazy(value) else tuple(value.shape)
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {shape}{device}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    members, name = members_of(value), type(value).__name__
    if members is None or depth > 3:
        return name
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        inner = some([seen(item, depth + 1) for _, item in members], most=_MOST)
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if hasattr(value, "_fields"):
        members = list(zip(value._fields, value, strict=False))
    inner = some([f"{key}: {seen(item, depth + 1)}" for key, item in members], most=_MOST)
    return f"{{{inner}}}" if isinstance(value, Mapping) else f"{name}({inner})"
