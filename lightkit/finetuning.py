"""Learning rates that differ over the layers, and parameters that join an optimizer late."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightkit.errors import ConfigError, UsageError

#: What a schedule keeps in a group of its optimizer: rates, and what moves against them.
_RATES = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_MOMENTA = ("base_momentum", "max_momentum", "momentum", "betas")
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
            without parameters do not count, parameters of its own belong to the first layer; the
            children of an only child count in its place); or the layers themselves.
        lr: The rate of the last layer.
        decay: How many times lower the rate of each layer is than that of the next; 1 for equal
            rates.
        no_decay: Whether biases and the weights of norms (all parameters with less than two
            dimensions) get groups of their own, with ``weight_decay=0``.

    Returns:
        What an optimizer takes, from the first layer to the last. A group has the name of its layer
        as "name", by which ``LearningRateMonitor`` writes it.

    Raises:
        ConfigError: ``lr`` or ``decay`` is not possible, or a layer is no module.
    """
    numbers = isinstance(lr, (int, float)) and isinstance(decay, (int, float))
    if not (numbers and lr >= 0 and decay > 0):
        raise ConfigError(
            f"param_groups: lr={lr!r}, decay={decay!r} is not possible: lr is at least 0, decay "
            f"more than 0."
        )
    layers, seen = _layers(module), set[int]()
    groups: list[dict[str, Any]] = []
    for number, (name, members) in enumerate(layers, start=1):
        rate = lr / decay ** (len(layers) - number)
        own = [p for p in members if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        flat = [p for p in own if p.ndim < 2] if no_decay else []
        rest = [p for p in own if p.ndim > 1] if no_decay else own
        if rest:
            groups.append({"params": rest, "lr": rate, "name": name})
        if flat:
            more = {"weight_decay": 0.0, "name": f"{name}_no_decay"}
            groups.append({"params": flat, "lr": rate, **more})
    return groups


def _layers(module: nn.Module | Sequence[nn.Module]) -> list[tuple[str, list[nn.Parameter]]]:
    """Returns the layers that have parameters, by name."""
    own: list[nn.Parameter] = []
    if isinstance(module, nn.Module):
        named, own = list(module.named_children()), list(module.parameters(recurse=False))
    else:
        named = [(str(number), layer) for number, layer in enumerate(module)]
        if others := {type(one).__name__ for _, one in named if not isinstance(one, nn.Module)}:
            raise ConfigError(f"param_groups takes a module or a list of modules; got {others}.")
    found = [(name, list(layer.parameters())) for name, layer in named]
    found = [(name, members) for name, members in found if members]
    if isinstance(module, nn.Module) and not own and len(found) == 1:
        only = dict(named)[found[0][0]]
        return _layers(only) if any(True for _ in only.children()) else found
    if not own:
        return found
    name, members = found[0] if found else (type(module).__name__, [])
    return [(name, [*own, *members]), *found[1:]]


def add_group(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    *,
    times: float,
    lr: float | None = None,
    name: str | None = None,
) -> None:
    """Adds parameters to an optimizer as a group of their own; call `follow` afterwards.

    Args:
        optimizer: Who gets the group.
        parameters: What it holds.
        times: Its rate, as a multiple of the first group's.
        lr: The same as a number; it takes the place of ``times``.
        name: The "name" of the group.

    Raises:
        UsageError: The optimizer takes no groups.
    """
    if isinstance(optimizer, LBFGS):
        raise UsageError(
            "No parameters can join an LBFGS, which has one group. Give it all that shall ever learn "
            "from the start: it passes over those without a gradient."
        )
    first = optimizer.param_groups[0]
    group: dict[str, Any] = {"params": list(parameters)}
    if "param_names" in first:  # made from named_parameters(), so each group must have names
        count = len(optimizer.param_groups)
        group["params"] = [(f"group{count}.{i}", p) for i, p in enumerate(parameters)]
    if lr is None:
        group |= {key: first[key] * times for key in ("lr", "initial_lr") if key in first}
    else:
        group["lr"] = lr
    if name is not None:
        group["name"] = name
    optimizer.add_param_group(group)


def rates(optimizer: Optimizer) -> list[float]:
    """Returns the rates of an optimizer's groups, for `follow`."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def follow(optimizer: Optimizer, before: Sequence[float], schedulers: Iterable[Any]) -> None:
    """Lets the schedules of an optimizer go on from groups that were added and rates that were set.

    A group that is new goes on as if it had been there from the start: at every moment its rate is
    the same multiple of the first group's as it is now. Without this torch's schedules raise at
    their next move, as they keep lists with one element for each group. Likewise a group whose rate
    was set goes on from that.

    Args:
        optimizer: The optimizer.
        before: What `rates` returned before the change.
        schedulers: Schedules, those of other optimizers too.
    """
    groups = optimizer.param_groups
    own = [vars(scheduler) for scheduler in _own(optimizer, schedulers)]
    for number, group in enumerate(groups):
        if number >= len(before):
            _join(number, groups, own)
        elif before[number] and float(group["lr"]) != before[number]:
            times = float(group["lr"]) / before[number]
            group.update({key: group[key] * times for key in _RATES if key in group})
            for values in _lists(own, _LISTS_OF_RATES):
                values[number] *= times


def _join(number: int, groups: list[dict[str, Any]], schedulers: list[dict[str, Any]]) -> None:
    """Lets schedules take in a new group, in proportion to the first one."""
    first, group = groups[0], groups[number]
    key = "initial_lr" if "initial_lr" in group else "lr"
    # Where a schedule stands at zero, the rate that is given is the one that it begins with.
    of_first = float(first[key]) or float(first.get("initial_lr", 0.0))
    times = float(group[key]) / of_first if of_first else 1.0
    group.update({key: first[key] * times for key in _RATES if key in first})
    if "max_momentum" in first:  # the schedule moves the momentum as well
        group.update({key: first[key] for key in _MOMENTA if key in first})
    for names, factor in ((_LISTS_OF_RATES, times), (_LISTS, None)):
        for values in _lists(schedulers, names):
            if len(values) == number:
                values.append(values[0] if factor is None else values[0] * factor)


def _lists(schedulers: list[dict[str, Any]], names: tuple[str, ...]) -> Iterator[list[Any]]:
    """Yields the lists of schedules that have one of these names, each once."""
    found = [own[name] for own in schedulers for name in names if isinstance(own.get(name), list)]
    yield from {id(values): values for values in found}.values()


def _own(optimizer: Optimizer, schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yields the schedules of an optimizer, those within others too."""
    for scheduler in schedulers:
        yield from _own(optimizer, getattr(scheduler, "_schedulers", ()))
        if getattr(scheduler, "optimizer", None) is optimizer:
            yield scheduler
