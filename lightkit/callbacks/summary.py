"""A table of the network's parts when a fit begins."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch.nn.parameter import UninitializedParameter

from lightkit.hooks import Callback

if TYPE_CHECKING:
    from torch import nn

    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class ModelSummary(Callback):
    """Shows name, type and number of parameters of each part, and the totals.

    Runs on every rank, is shown by rank zero. No forward pass is made.

    Args:
        max_depth: Levels of submodules to show: 1 the direct children, 0 the totals only, -1 all.
    """

    def __init__(self, max_depth: int = 1) -> None:
        self.max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Logs the table."""
        if trainer.is_global_zero and _log.isEnabledFor(logging.INFO):
            _log.info(summarize(task, self.max_depth))


def summarize(module: nn.Module, max_depth: int = 1) -> str:
    """Returns the table as text, without a line break at the end.

    Args:
        module: Any network; shared parameters count once in the totals.
        max_depth: See `ModelSummary`.
    """
    rows = [("name", "type", "params", "trainable")]
    for name, child in module.named_modules():
        depth = name.count(".") + 1 if name else 0
        if depth and (max_depth < 0 or depth <= max_depth):
            rows.append((name, type(child).__name__, *_counts(child.parameters())))
    own = list(module.parameters(recurse=False))
    if own and max_depth:
        rows.append(("(own)", "Parameter", *_counts(own)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {trained}"
        for name, kind, count, trained in rows
    ]
    if len(rows) > 1:
        lines.insert(1, "-" * (sum(widths) + 6))
        lines.append(lines[1])
    else:
        lines.clear()
    return "\n".join([*lines, _totals(module)])


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[str, str]:
    """Returns how many numbers there are, and whether they are trained."""
    known = list(parameters)
    if any(isinstance(p, UninitializedParameter) for p in known):
        return "?", "lazy"
    trained = {p.requires_grad for p in known}
    words = {True: "yes", False: "no"}
    return f"{sum(p.numel() for p in known):,}", (
        "-" if not trained else "part" if len(trained) > 1 else words[trained.pop()]
    )


def _totals(module: nn.Module) -> str:
    known = [p for p in module.parameters() if not isinstance(p, UninitializedParameter)]
    total = sum(p.numel() for p in known)
    trained = sum(p.numel() for p in known if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in known)
    memory = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
    return f"{total:,} parameters: {trained:,} trainable, {total - trained:,} not; {memory}"
