"""Learning rates that differ over the layers, and parameters that join an optimizer late."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightkit.errors import ConfigError

#: What a schedule keeps in a group of its optimizer, as multiples of the group's rate ...
_RATES = ("initial_lr", "max_lr", "min_lr")
#: ... and what else it keeps there.
_OTHERS = ("base_momentum", "max_momentum")
#: Lists that schedules of torch have, with one element for each group: rates, and all others.
_LISTS_OF_RATES = ("base_lrs", "max_lrs", "_last_lr")
_LISTS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")


def param_groups(
    module: nn.Module | Sequence[nn.Module],
    lr: float,
    *,
    decay: float = 2.6,
    no_decay: bool = False,
) -> list[dict[str, Any]]:
    """Returns parameter groups with a lower learning rate the nearer a layer is to the input.

    The last layer learns at ``lr``, the one before it at ``lr / decay``, and so on: discriminative
    fine-tuning of Howard and Ruder (2018), "Universal Language Model Fine-tuning for Text
    Classification". Frozen parameters are left out; a frozen layer still counts as one.

    Args:
        module: A module, whose children are the layers from the input to the output (children
            without parameters do not count, parameters of its own belong to the first layer); or
            the layers themselves.
        lr: The rate of the last layer.
        decay: How many times lower the rate of each layer is than that of the next; 1 for equal
            rates.
        no_decay: Whether biases and the weights of norms (all parameters with less than two
            dimensions) get groups of their own, with ``weight_decay=0``.

    Returns:
        What an optimizer takes, from the first layer to the last. A group has the name of its layer
        as "name", by which ``LearningRateMonitor`` writes it.

    Raises:
        ConfigError: ``decay`` is not positive.
    """
    if not decay > 0:
        raise ConfigError(f"param_groups: decay={decay!r} is not possible. Allowed is more than 0.")
    layers = [layer for layer in _layers(module) if layer[1]]
    seen: set[int] = set()
    groups: list[dict[str, Any]] = []
    for depth, (name, members) in enumerate(reversed(layers)):
        layers[-1 - depth] = (name, members)
    for depth, (name, members) in enumerate(layers):
        rate = lr / decay ** (len(layers) - 1 - depth)
        own = [p for p in members if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        parts = [(name, own, {})]
        if no_decay:
            parts = [
                (name, [p for p in own if p.ndim > 1], {}),
                (f"{name}_no_decay", [p for p in own if p.ndim < 2], {"weight_decay": 0.0}),
            ]
        groups += [{"params": ps, "lr": rate, "name": n, **more} for n, ps, more in parts if ps]
    return groups
