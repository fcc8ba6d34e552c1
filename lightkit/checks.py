"""Looks at a run before it starts: mistakes that would cost hours without an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightkit.errors import OptimizerError, some
from lightkit.optim import nothing_to_train

if TYPE_CHECKING:
    from lightkit.optim import OptimizerPlan

#: Words in the names of metrics, and what better means for them.
_BETTER = {
    **dict.fromkeys(
        ("acc", "accuracy", "auc", "auroc", "f1", "f1score", "iou", "dice", "r2"), "max"
    ),
    **dict.fromkeys(("loss", "error", "mae", "mse", "rmse", "perplexity"), "min"),
}
#: Words that turn them round, as in neg_mean_squared_error.
_TURNED = {"neg", "negative", "minus", "inverse"}
#: The name of what is wrong, see `hints`, and the text.
Warned = tuple[str, str]
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


def check_loaders(train_loader: Any, val_loaders: Sequence[tuple[str, Any]]) -> list[Warned]:
    """Returns a warning for every validation loader that gives samples of the training loader.

    Seen are: the same loader, the same dataset object (or the same tensors in two
    ``TensorDataset``), and ``Subset`` or ``SubsetRandomSampler`` whose indices meet, nested ones
    too. What a sampler of another kind draws is not known, and nothing is said about it.

    Args:
        train_loader: Any iterable of batches.
        val_loaders: Names and loaders, as the trainer validates them.
    """
    found: list[Warned] = []
    known = _samples(train_loader)
    for name, loader in val_loaders:
        what = "is the training loader itself"
        if loader is not train_loader:
            root, indices = _samples(loader)
            if root is None or root is not known[0]:
                continue
            what = _overlap(known[1], indices)
        if what:
            text = (
                f"Validation loader {name!r} {what}: its numbers say nothing about new data, and "
                f"the best checkpoint is the most overfitted one. Give fit a validation loader "
                f"over data that is kept apart, for example with torch.utils.data.random_split."
            )
            found.append(("same-data", text))
    return found


def check_modes(callbacks: Sequence[Any]) -> list[Warned]:
    """Returns a warning for every callback that takes the worse values of its monitor as better.

    Args:
        callbacks: All of a fit; looked at are those with a ``monitor`` and a ``mode``.
    """
    found: list[Warned] = []
    for callback in callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if not isinstance(monitor, str) or mode not in ("min", "max"):
            continue
        words = set(re.split(r"[\W_]+", monitor.lower()))
        meant = {_BETTER[word] for word in words if word in _BETTER}
        if meant and mode not in meant and not words & _TURNED:
            lower = "a lower" if mode == "min" else "a higher"
            text = (
                f"{type(callback).__name__}({monitor!r}) has mode={mode!r}, by which {lower} value "
                f"is better. Give mode={meant.pop()!r} if that is not what you mean."
            )
            found.append(("wrong-mode", text))
    return found


def _samples(loader: Any) -> tuple[Any, Sequence[int] | None]:
    """Returns what a loader draws from, and the indices (None for all); (None, None): unknown."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset):
        return None, None  # what it gives may be another thing each time
    indices: Sequence[int] | None = None
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:  # as with batch_size=None
        sampler = getattr(loader, "sampler", None)
    if sampler is not None:
        sampler = sampler.sampler if isinstance(sampler, BatchSampler) else sampler
        if isinstance(sampler, SubsetRandomSampler):
            indices = sampler.indices
        elif not isinstance(sampler, _WHOLE):
            return None, None
    while isinstance(dataset, Subset):
        inner = dataset.indices
        indices = inner if indices is None else [inner[i] for i in indices]
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset) and dataset.tensors:
        dataset = dataset.tensors[0]
    return dataset, indices


def _overlap(train: Sequence[int] | None, val: Sequence[int] | None) -> str:
    if train is None or val is None:
        both = train is None and val is None
        return "has the dataset of the training loader" + ("" if both else ", whole or in part")
    common = len(_keys(train) & _keys(val))
    return f"shares {common} of its {len(val)} samples with the training loader" if common else ""


def _keys(indices: Sequence[Any]) -> set[Any]:
    try:
        return set(map(int, indices))  # of a tensor too
    except (TypeError, ValueError):  # names, as a dataset may have
        return set(map(repr, indices))


def check_parameters(task: nn.Module, plan: OptimizerPlan) -> list[Warned]:
    """Returns warnings about parameters that the optimizers miss, share, or do not own.

    Args:
        task: The task, as it will be trained.
        plan: What its ``configure_optimizers`` returned. In manual optimization trainable
            parameters may be in no optimizer.

    Raises:
        OptimizerError: In automatic optimization, when nothing in the task can be trained.
    """
    named = [(id(p), name, p.requires_grad) for name, p in task.named_parameters()]
    names = {key: name for key, name, _ in named}
    averages = {
        id(p) for m in task.modules() if isinstance(m, AveragedModel) for p in m.parameters()
    }
    trainable = {key: name for key, name, trained in named if trained and key not in averages}
    if plan.optimizers and plan.automatic and not trainable:
        raise OptimizerError(nothing_to_train(task))
    seen: dict[int, int] = {}
    for optimizer in plan.optimizers:
        for key in {id(p) for group in optimizer.param_groups for p in group["params"]}:
            seen[key] = seen.get(key, 0) + 1
    found: list[Warned] = []
    foreign = sum(1 for key in seen if key not in names)
    if foreign:
        text = (
            f"The optimizer holds {foreign} parameters that are not the task's own: they are not "
            f"moved to the device, not saved, and perhaps of another copy of the model. Make the "
            f"optimizer in configure_optimizers, from self.parameters()."
        )
        found.append(("foreign-parameters", text))
    missed = [name for key, name in trainable.items() if key not in seen]
    if missed and plan.optimizers and plan.automatic:
        text = (
            f"{len(missed)} trainable parameters are in no optimizer and will never change: "
            f"{some(missed)}. Give them to the optimizer, or set requires_grad_(False) on them."
        )
        found.append(("no-optimizer", text))
    shared = [name for key, name in names.items() if seen.get(key, 0) > 1]
    if shared:
        text = (
            f"{len(shared)} parameters are in more than one optimizer and are stepped by each: "
            f"{some(shared)}. Split the parameters between the optimizers."
        )
        found.append(("two-optimizers", text))
    return found
