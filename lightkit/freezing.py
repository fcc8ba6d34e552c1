"""What hooks switch while a run trains: frozen parameters, modules kept in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


def switches(task: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the parameters without gradient and of the modules in eval mode."""
    return {
        "frozen": [name for name, p in task.named_parameters() if not p.requires_grad],
        "eval": [name for name, module in task.named_modules() if not module.training],
    }


def set_switches(task: nn.Module, state: Mapping[str, Iterable[str]]) -> None:
    """Puts back what `switches` returned."""
    frozen, resting = set(state["frozen"]), set(state["eval"])
    for name, parameter in task.named_parameters():
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)
    for name, module in task.named_modules():
        module.training = name not in resting
