"""Which modules of a task are put together one at a time, where it is sharded."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightkit.distributed.meta import defines
from lightkit.errors import ConfigError

_log = logging.getLogger("lightkit")


def blocks(task: nn.Module) -> list[nn.Module]:
    """Returns the modules that are put together one at a time, inner ones first.

    Those of `repeated` that have parameters.

    Raises:
        ConfigError: As by `repeated`.
    """
    chosen = repeated(task)
    if not chosen and not defines(task, "configure_sharding"):
        _log.warning(
            "%s has no ModuleList of equal blocks, so the whole model is put together at once "
            "in every step. Say what its blocks are: configure_sharding(self) returns them.",
            type(task).__name__,
        )
    wanted = {id(m) for m in chosen if any(True for _ in m.parameters())}
    return [module for module in reversed(list(task.modules())) if id(module) in wanted]


def repeated(task: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model.

    Those that the task's ``configure_sharding`` returns; else the children of every ModuleList with
    at least two of one type.

    Raises:
        ConfigError: ``configure_sharding`` returned something else than modules of the task that
            are called.
    """
    every = list(task.modules())
    if defines(task, "configure_sharding"):
        given: Any = task.configure_sharding()  # type: ignore[operator]
        alone = isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList)
        chosen = [given] if alone else list(given or ())
        inside = {id(module) for module in every[1:]}
        for module in chosen:
            if id(module) not in inside:
                raise ConfigError(
                    f"configure_sharding returned {type(module).__name__}, which is no module of "
                    f"{type(task).__name__}. Return some of its modules, for example self.blocks."
                )
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                raise ConfigError(
                    f"configure_sharding of {type(task).__name__} returned a "
                    f"{type(module).__name__} among others, which is never called itself. Return "
                    f"the modules in it, for example [self.head, *self.blocks]."
                )
    else:
        chosen = []
        for module in every:
            if isinstance(module, nn.ModuleList):
                kinds = Counter(map(type, module))
                chosen += [child for child in module if kinds[type(child)] > 1]
    return chosen


def check_parameters(task: nn.Module, chosen: Sequence[nn.Module]) -> None:
    """Raises where a parameter cannot be split, before anything is.

    It has no dimension, or two blocks share it: one is split again while the other computes.

    Args:
        task: The task.
        chosen: Its blocks; what is in none of them belongs to the task itself.

    Raises:
        ConfigError: Names the parameter.
    """
    ids, seen = {id(module) for module in chosen}, dict[int, tuple[int, str]]()
    modules = task.named_modules(remove_duplicate=False)
    homes = {name: id(module) for name, module in modules if id(module) in ids}
    for name, parameter in task.named_parameters(remove_duplicate=False):
        above = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
        home = ([homes[at] for at in above if at in homes] or [0])[-1]
        if not parameter.ndim:
            raise ConfigError(
                f"{name} of {type(task).__name__} is a single number without a dimension, which "
                f"cannot be split over ranks. Make it a tensor with one element, such as "
                f"nn.Parameter(torch.ones(1))."
            )
        first, other = seen.setdefault(id(parameter), (home, name))
        if first != home:
            raise ConfigError(
                f"{other} and {name} of {type(task).__name__} are one parameter, but not of one "
                f"block. Let configure_sharding(self) return blocks with both in one of them, or "
                f"both in none: then they are put together with the task itself."
            )
