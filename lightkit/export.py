"""A trained network for use elsewhere: as a program, or its weights; checked before it counts.

The bodies of ``task.export``, ``task.to_onnx`` and ``task.to_torchscript``.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.data import batch_size_of, move_to_device
from lightkit.data.move import members_of, with_members
from lightkit.errors import ExportError, UsageError, did_you_mean
from lightkit.freezing import at_rest

_log = logging.getLogger("lightkit")

#: What a name ends in, and the format that is meant.
SUFFIXES = {
    ".pt2": "torch_export",
    ".onnx": "onnx",
    ".safetensors": "safetensors",
    ".pt": "state_dict",
    ".pth": "state_dict",
}
#: The formats without a program, which need no sample.
WEIGHTS = ("safetensors", "state_dict")
#: Warnings of torch about its own code, and about what forward keeps on itself, as an LSTM does:
#: torch puts that back, and whether the program computes the same without it is looked at here.
_NEEDLESS = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"The tensor attributes? ")
_FIXED = (
    "If forward fixes the size of the batch, take it from the input there, as x.flatten(1) does, "
    "or export with dynamic_batch=False."
)
#: What forward is tried on, and what to say if it fails there.
_TRIED = (
    ("the sample", "A tuple holds its positional arguments, a mapping those by name."),
    ("a batch of twice the sample", _FIXED),
)
#: Words in errors of torch.export, and what to do.
_HINTS = {
    "Constraints violated": _FIXED,
    "data-dependent": "forward branches on the values of a tensor: write torch.where there.",
    "Must provide a tree_name": (
        "Torch cannot free the batch of arguments that forward takes as **: name them in forward, or "
        "export with dynamic_batch=False."
    ),
}


def export_task(
    task: nn.Module,
    path: str | Path,
    sample: Any = None,
    *,
    format: str | None = None,  # noqa: A002  what everybody calls it
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
    **options: Any,
) -> Path:
    """Writes ``forward`` as a program, or the weights alone, for use without lightkit.

    What was written is read again and run on the sample, and with ``dynamic_batch`` on a batch of
    twice its size; the file gets its name only if the outputs are those of the task. All of it
    happens in eval mode, without gradients and in the memory of the CPU, wherever the task is; its
    modes, its weights and all random states are afterwards as they were. No collective: one rank
    may call it alone.

    Args:
        task: What is exported.
        path: Where to; missing folders are made, and a file of that name is replaced as a whole.
        sample: What ``forward`` takes: a tuple holds its positional arguments, a mapping those by
            name, anything else is its only one. Default: ``example_input_array``. Weights alone
            need none.
        format: "torch_export", "onnx", "safetensors" or "state_dict". Default: what the name says
            (.pt2, .onnx, .safetensors, .pt or .pth).
        dynamic_batch: The program takes batches of any size: dimension 0 of every tensor of the
            sample may vary. False: it takes batches as large as the sample only.
        tolerance: The largest difference allowed between outputs of the program and of the task:
            absolute for values up to 1, relative above.
        options: For ``torch.export.export``, or with "onnx" for ``torch.onnx.export``. With both,
            ``dynamic_shapes`` takes the place of ``dynamic_batch``; larger batches are not tried.

    Returns:
        The path of the file.

    Raises:
        UsageError: An unknown format, or no sample that fits.
        ExportError: torch cannot export ``forward``, the outputs differ, or the file cannot be
            written. What was there under this name is untouched.
        ImportError: A package of the extra ``lightkit[export]`` is not installed.
    """
    path = Path(path)
    kind = _format(path, format)
    _require_whole(task)
    if kind in WEIGHTS:
        return export_weights(task.state_dict(), path, format=kind, **options)
    shapes = options.pop("dynamic_shapes", None)
    samples = _samples(task, sample, dynamic_batch and shapes is None)
    with _in_use(task), _own_file(path) as file:
        expected = [_outputs(task, one, *how) for one, how in zip(samples, _TRIED, strict=False)]
        shapes = _any_batch(task, samples[-1]) if len(samples) > 1 else shapes
        with _told(f"{type(task).__name__} cannot be exported ({kind})"):
            run = _WRITERS[kind](task, samples[-1], shapes, file, options)
            apart = [_apart(a, run(one)) for a, one in zip(expected, samples, strict=True)]
        if not max(apart) <= tolerance:
            again = _apart(expected[0], _outputs(task, samples[0], *_TRIED[0]))
            raise ExportError(_too_far(path, apart, tolerance, again > 0))
    _log.info("exported: %s (%s), largest difference %.3g", path, kind, max(apart))
    return path


def export_onnx(
    task: nn.Module, file_path: str | Path, input_sample: Any = None, **options: Any
) -> Path:
    """Writes an ONNX program: `export` with ``format="onnx"``, under Lightning's name.

    Args:
        task: What is exported.
        file_path: Where to.
        input_sample: The sample of `export`.
        options: The other arguments of `export`.

    Raises:
        UsageError: As by `export`; for ``dynamic_axes``, which torch no longer takes.
    """
    if "dynamic_axes" in options:
        raise UsageError(
            "to_onnx takes no dynamic_axes: the size of the batch is free without it; for other "
            "dimensions write dynamic_shapes=, as torch.export.export takes it."
        )
    return export_task(task, file_path, input_sample, format="onnx", **options)


def refuse_torchscript(task: nn.Module, *args: Any, **options: Any) -> None:
    """Refused: torch gives TorchScript up. `export` writes a program with the same use.

    Raises:
        UsageError: Always, with what to write instead.
    """
    raise UsageError(
        "to_torchscript does not exist: torch has given TorchScript up for torch.export. Write "
        "task.export('model.pt2', sample); torch.export.load('model.pt2').module() runs it."
    )


def export_weights(
    weights: Mapping[str, Any],
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002  likewise
) -> Path:
    """Writes a state dict, reads it again and compares it bit for bit.

    Args:
        weights: Names and tensors, on any device.
        path: Where to.
        format: "safetensors" or "state_dict". Default: what the name says.

    Returns:
        The path of the file.

    Raises:
        UsageError: Something is no tensor, which safetensors cannot hold.
        ExportError: The file cannot be written. What was there under this name is untouched.
        ImportError: safetensors is not installed.
    """
    from lightkit.checkpoint import files
    from lightkit.differences import compare

    path = Path(path)
    state = move_to_device(dict(weights), "cpu")
    write: Any = files.save_file
    read: Any = files.read_any
    if (kind := _format(path, format)) == "safetensors":
        write, read = files.save_safetensors, files.read_safetensors
        if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise UsageError(
                f"safetensors holds tensors only, and {', '.join(others)} is none. "
                f"Use the format state_dict."
            )
    with _own_file(path) as file:
        with _told(f"{path} cannot be written ({kind})"):
            write(state, file)
            wrong = [name for name, _ in compare(state, read(file), "weights", ())]
        if wrong:
            raise ExportError(f"{path} is not written: {wrong[0]} came back as something else.")
    _log.info("exported: %s (%s)", path, kind)
    return path


def _format(path: Path, given: str | None) -> str:
    known = dict.fromkeys(SUFFIXES.values())
    kind = SUFFIXES.get(path.suffix) if given is None else given
    if kind in known:
        return str(kind)
    if given is not None:
        hint = did_you_mean(str(given), known)
        raise UsageError(f"format={given!r} is unknown; it may be {', '.join(known)}.{hint}")
    raise UsageError(
        f"The name {path.name} says no format: let it end in {', '.join(SUFFIXES)}, or give "
        f"format= ({', '.join(known)})."
    )


def _require_whole(task: nn.Module) -> None:
    """Raises unless every tensor of the task is there, whole."""
    from lightkit.checkpoint.sharded import is_part

    for name, tensor in itertools.chain(task.named_parameters(), task.named_buffers()):
        if is_part(tensor):
            raise UsageError(
                f"This rank holds a part of {name} only: the task is sharded. Export what "
                f"{type(task).__name__}.load_from_checkpoint makes of its checkpoint."
            )
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise UsageError(f"{name} has no values yet, so there is nothing to export.")


def _samples(task: nn.Module, sample: Any, larger: bool) -> list[Any]:
    """Returns the inputs to try, the last of them to be traced; ``larger``: one of twice the size."""
    if type(task).forward is nn.Module.forward:
        raise UsageError(f"{type(task).__name__} defines no forward, which is what is exported.")
    sample = getattr(task, "example_input_array", None) if sample is None else sample
    if sample is None:
        raise UsageError(
            "A program needs an input of forward: task.export(path, sample), or set "
            "example_input_array of the task."
        )
    sample = move_to_device(sample, "cpu")
    if not larger:
        return [sample]
    if not batch_size_of(sample):
        raise UsageError(
            "The tensors of the sample have no dimension 0 of one size, so nothing says which is "
            "the batch. Give dynamic_shapes= as torch.export.export takes it, or "
            "dynamic_batch=False. A tuple holds the arguments of forward, without targets."
        )
    # Torch takes a size of 1 for a fixed one, so it follows the larger batch.
    return [sample, _mapped(sample, lambda item: torch.cat([item, item]) if item.dim() else item)]


def _any_batch(task: nn.Module, sample: Any) -> dict[str, Any]:
    """Returns torch's dynamic shapes, by the names of the arguments, where dimension 0 is free."""
    args, kwargs = arguments(sample)
    batch, given = torch.export.Dim("batch"), inspect.signature(task.forward)
    by_name = given.bind(*args, **kwargs).arguments  # those of *args are one tuple
    shapes: dict[str, Any] = _mapped(by_name, lambda item: {0: batch} if item.dim() else None, None)
    return shapes


def _mapped(sample: Any, change: Callable[[Tensor], Any], *other: Any) -> Any:
    """Returns ``sample`` with its tensors changed, and all else exchanged for ``other`` if given."""
    if isinstance(sample, Tensor):
        return change(sample)
    if members_of(sample) is None:
        return other[0] if other else sample
    return with_members(sample, lambda item: _mapped(item, change, *other))


def arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns what ``forward`` is called with: a tuple by position, a mapping by name."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return tuple(sample) if isinstance(sample, tuple) else (sample,), {}


def tensors_of(item: Any) -> list[Tensor]:
    """Returns the tensors of a tree, in its order."""
    if isinstance(item, Tensor):
        return [item]
    return [tensor for _, member in members_of(item) or () for tensor in tensors_of(member)]


def _outputs(task: nn.Module, sample: Any, what: str, hint: str) -> list[Tensor]:
    """Returns what forward gives, or says what is wrong with the sample."""
    args, kwargs = arguments(sample)
    try:
        found = tensors_of(task(*args, **kwargs))
    except Exception as error:  # whatever the user's code raises
        raise UsageError(
            f"forward of {type(task).__name__} fails on {what}: {type(error).__name__}: {error}\n  "
            f"{hint}"
        ) from error
    if not found:
        raise UsageError(f"forward of {type(task).__name__} returns no tensor on {what}.")
    return found


@contextlib.contextmanager
def _in_use(task: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, every tensor on the CPU; at its end all is as it was.

    Parameters share the task's memory where it is the CPU's.
    """
    with at_rest(task), warnings.catch_warnings():
        for message in _NEEDLESS:
            warnings.filterwarnings("ignore", message)
        held = [
            (module, name, tensor)
            for module in task.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        ours: dict[int, Tensor] = {}  # one for each tensor, so that tied weights stay tied
        for _, _, tensor in held:
            copy, parameter = tensor.detach().cpu(), isinstance(tensor, nn.Parameter)
            ours[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
        try:
            for module, name, tensor in held:
                setattr(module, name, ours[id(tensor)])
            yield
        finally:
            for module, name, tensor in held:
                setattr(module, name, tensor)


@contextlib.contextmanager
def _own_file(path: Path) -> Iterator[Path]:
    """Gives a file to write in a folder of its own; it gets its name if all goes well."""
    from lightkit.checkpoint import disk

    folder = disk.temporary_name(path)
    file = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield file
        written = sorted(folder.iterdir(), key=file.__eq__)  # weights beside a large ONNX first
        disk.sync_files(written)
        for one in written:
            disk.give_name(one, path.with_name(one.name))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Says in a few words what torch or another library raises."""
    try:
        yield
    except (ImportError, OSError, UsageError):
        raise
    except Exception as error:  # the exporters raise nearly anything
        text = str(error)
        hint = next((hint for mark, hint in _HINTS.items() if mark in text), "")
        first = next((line for line in text.splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {first[:300]}"
        raise ExportError(f"{what}: {reason}\n  {hint}".rstrip()) from error


def _apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """Returns the largest difference of two lists of tensors; inf where they cannot be compared."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        return float("inf")
    worst = 0.0
    for one, two in zip(expected, found, strict=True):
        wide = torch.complex128 if one.is_complex() else torch.float64
        a, b = one.to(wide), two.to(wide)
        apart = (a - b).abs() / a.abs().clamp(min=1)
        apart[(a == b) | (a.isnan() & b.isnan())] = 0  # inf, and nan
        if apart.numel():
            worst = max(worst, float(apart.nan_to_num(nan=float("inf")).max()))
    return worst


def _too_far(path: Path, apart: list[float], tolerance: float, again: bool) -> str:
    """Returns what to say; ``again``: whether the task differs from itself, called again."""
    where = (f"{a:.3g} on {what}" for a, (what, _) in zip(apart, _TRIED, strict=False))
    hint = " forward gives something else each time, in eval mode too." if again else ""
    return (
        f"{path} is not written: its outputs differ from those of the task, by "
        f"{' and by '.join(where)}; tolerance={tolerance:g}.{hint}"
    )


_Run = Callable[[Any], "list[Tensor]"]


def _torch_export(
    task: nn.Module, sample: Any, shapes: Any, file: Path, options: dict[str, Any]
) -> _Run:
    """Writes a program of torch.export and returns what runs the file."""
    torch.export.save(_traced(task, sample, shapes, options), file)
    module = torch.export.load(file).module()

    def run(sample: Any) -> list[Tensor]:
        args, kwargs = arguments(sample)
        return tensors_of(module(*args, **kwargs))

    return run


def _onnx(task: nn.Module, sample: Any, shapes: Any, file: Path, options: dict[str, Any]) -> _Run:
    """Writes an ONNX program and returns what runs the file: onnxruntime, or onnx in Python.

    Traced here and not by torch.onnx.export, which falls back to a fixed batch without a word.
    """
    try:
        import onnx.reference
        import onnxscript  # noqa: F401  torch needs it
    except ImportError as error:
        raise ImportError("ONNX needs more packages: pip install 'lightkit[export]'") from error
    program = _traced(task, sample, shapes, {})
    told, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    told.setLevel(logging.ERROR)  # else it says that torchvision is missing, whatever the network
    try:
        made: Any = torch.onnx.export(program, **{"dynamo": True, "verbose": False, **options})
    finally:
        told.setLevel(level)
    made.save(str(file))
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
    except ImportError:
        session = onnx.reference.ReferenceEvaluator(str(file))
        names = list(session.input_names)

    def run(sample: Any) -> list[Tensor]:
        feeds = zip(names, tensors_of(sample), strict=True)  # what is no tensor became a constant
        found = session.run(None, {name: tensor.numpy() for name, tensor in feeds})
        return [torch.from_numpy(array.copy()) for array in found]

    return run


def _traced(task: nn.Module, sample: Any, shapes: Any, options: dict[str, Any]) -> Any:
    args, kwargs = arguments(sample)
    return torch.export.export(
        task, args, kwargs, dynamic_shapes=shapes, **{"strict": False, **options}
    )


_WRITERS = {"torch_export": _torch_export, "onnx": _onnx}
