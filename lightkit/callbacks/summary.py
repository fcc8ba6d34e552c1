"""A table of the network's parts when a fit begins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightkit import metric_objects, screen
from lightkit.data import move_to_device
from lightkit.errors import some
from lightkit.export import arguments, tensors_of
from lightkit.freezing import at_rest
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class ModelSummary(Callback):
    """Shows name, type and number of parameters of each part, and the totals.

    Runs on every rank, is shown by rank zero. Where the task has an ``example_input_array``, one
    ``forward`` with it, in eval mode and without gradients, shows the shapes that go into each part
    and come out of it, at its first call. It leaves no trace: random states, buffers and metrics are
    as before. None is made with several processes, for sharded or compiled models, nor for layers
    that find their sizes in the first batch.

    Args:
        max_depth: Levels of submodules to show: 1 the direct children, 0 the totals only, -1 all.
    """

    def __init__(self, max_depth: int = 1) -> None:
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Logs the table."""
        if trainer.is_global_zero and _log.isEnabledFor(logging.INFO):
            shapes, width = _shapes(trainer, task), screen.find_display().width
            _log.info("\n%s\n", summarize(task, self.max_depth, shapes, width))


def summarize(
    module: nn.Module,
    max_depth: int = 1,
    shapes: Mapping[str, tuple[str, str]] | None = None,
    width: int = 10_000,
) -> str:
    """Returns the table as text, without a line break at the end.

    Args:
        module: Any network; shared parameters count once in the totals.
        max_depth: See `ModelSummary`.
        shapes: What goes into modules and comes out of them, by their names; None: no such columns.
        width: Columns of the screen; the last columns of the table that have no room are left out.
    """
    rows = [("name", "type", "params", "trainable", "in", "out")]
    known = shapes or {}
    for name, child in module.named_modules():
        depth = name.count(".") + 1 if name else 0
        if depth and (max_depth < 0 or depth <= max_depth):
            ends = known.get(name, ("-", "-"))
            rows.append((name, type(child).__name__, *_counts(child.parameters()), *ends))
    own = list(module.parameters(recurse=False))
    if own and max_depth:
        rows.append(("(own)", "Parameter", *_counts(own), "-", "-"))
    shown = 4 if shapes is None else 6
    widths = [max(len(row[i]) for row in rows) for i in range(shown)]
    while sum(widths[:shown]) + 2 * shown - 2 > width and shown > 1:
        shown -= 1
    lines = [
        "  ".join(f"{row[i]:{'>' if i == 2 else '<'}{widths[i]}}" for i in range(shown)).rstrip()
        for row in rows
    ]
    if len(rows) > 1:
        lines.insert(1, "-" * (sum(widths[:shown]) + 2 * shown - 2))
        lines.append(lines[1])
    else:
        lines.clear()
    return "\n".join([*lines, _totals(module)])


def _shapes(trainer: Trainer, task: TaskModule) -> dict[str, tuple[str, str]] | None:
    """Returns what `summarize` takes, by one pass; None where there is none."""
    example = getattr(task, "example_input_array", None)
    if example is None or trainer.world_size > 1 or trainer.strategy.sharded:
        return None
    compiled = any(m._compiled_call_impl or hasattr(m, "_orig_mod") for m in task.modules())
    if compiled or any(map(is_lazy, [*task.parameters(), *task.buffers()])):
        return None
    found: dict[str, tuple[str, str]] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        found.setdefault(name, (_text((args, kwargs)), _text(outputs)))

    precision = trainer.session.precision
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(at_rest(task))
            stack.enter_context(metric_objects.kept(task))
            for name, module in task.named_modules():
                hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
                stack.callback(hook.remove)
            args, kwargs = arguments(move_to_device(example, task.device, dtype=precision.dtype))
            stack.enter_context(precision.autocast or contextlib.nullcontext())
            task(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  whatever the user's code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning("no shapes in the summary: forward(example_input_array) failed: %s", reason[0])
        return None
    return found


def _text(values: Any) -> str:
    return some([str(list(tensor.shape)) for tensor in tensors_of(values)], most=3) or "-"


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[str, str]:
    """Returns how many numbers there are, and whether they are trained."""
    known = list(parameters)
    if any(map(is_lazy, known)):
        return "?", "lazy"
    trained = {p.requires_grad for p in known}
    words = {True: "yes", False: "no"}
    return f"{sum(p.numel() for p in known):,}", (
        "-" if not trained else "part" if len(trained) > 1 else words[trained.pop()]
    )


def _totals(module: nn.Module) -> str:
    known = [p for p in module.parameters() if not is_lazy(p)]
    total = sum(p.numel() for p in known)
    trained = sum(p.numel() for p in known if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in known)
    memory = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
    parts = (
        f": {trained:,} trainable, {total - trained:,} not"
        if trained < total
        else ", all trainable"
    )
    return f"{total:,} parameters{parts}; {memory}"
