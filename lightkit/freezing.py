"""Frozen parts of a model: what `freeze` stops, and what hooks switch while a run trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightkit import rng
from lightkit.errors import ConfigError, did_you_mean

#: What batch norms of a frozen module do; `freeze` describes them.
BatchNorms = Literal["eval", "update", "train"]


def freeze(module: nn.Module, *, bn: BatchNorms = "eval") -> None:
    """Stops the parameters of a module from learning: they get no gradient.

    Parameters that an optimizer holds already stay as they are in it, since it passes over those
    without a gradient. Modes other than those of batch norms are left alone: dropout goes on.

    Args:
        module: A module; all parameters below it are frozen.
        bn: What the batch norms in it do (and instance norms, which also have running means).
            "eval" keeps them in eval mode, so that their running means are used and stay as they
            are; neither ``train()`` nor an evaluation ends that, `unfreeze` does. "update" freezes
            their parameters alone, and running means follow the new data. "train" leaves them out:
            they go on learning.

    Raises:
        ConfigError: For another ``bn``, or what is no module.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"freeze takes a module, such as task.backbone; got {module!r:.80}.")
    if bn not in ("eval", "update", "train"):
        raise ConfigError(
            f"freeze: bn={bn!r} is not known. 'eval' keeps batch norms as they are, 'update' lets "
            f"their running means follow the data, 'train' lets them learn."
            f"{did_you_mean(str(bn), ('eval', 'update', 'train'))}"
        )
    left = {id(p) for norm in norms(module) for p in norm.parameters()} if bn == "train" else set()
    for parameter in module.parameters():
        if id(parameter) not in left:
            parameter.requires_grad_(False)
    for norm in norms(module) if bn == "eval" else ():
        _keep_in_eval(norm)


def unfreeze(module: nn.Module) -> None:
    """Lets all parameters of a module learn, and its batch norms follow the module's mode again."""
    module.requires_grad_(True)
    for norm in norms(module):
        if vars(norm).pop("train", None) is not None:
            norm.training = module.training or norm is module


def is_frozen(module: nn.Module) -> bool:
    """Tells whether no parameter of a module learns."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def norms(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that have running means: batch norms and instance norms."""
    return (part for part in module.modules() if isinstance(part, _NormBase))


def kept_in_eval(module: nn.Module) -> bool:
    """Tells whether `freeze` keeps a module itself in eval mode."""
    return "train" in vars(module)


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Puts a module and those below it back into train or eval mode at its end, as they were.

    What `freeze` keeps in eval mode has the module's own: it holds where that ends meanwhile.
    """
    own = module.training
    modes = [(part, own if kept_in_eval(part) else part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            if part.training is not training and not kept_in_eval(part):
                part.training = training


@contextlib.contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Is for a look at what ``forward`` does: in eval mode, without gradients, and without a trace.

    Modes, buffers and random states are afterwards as they were, and what a task logs goes nowhere.
    Buffers are copied for that time, on their device.
    """
    buffers = [
        (part, name, tensor)
        for part in module.modules()
        for name, tensor in part._buffers.items()
        if tensor is not None and not is_lazy(tensor)
    ]
    copies = {id(tensor): tensor.clone() for _, _, tensor in buffers}
    link: Any = getattr(module, "_link", None)  # of a task, to its trainer
    tied = () if link is None else link.held()
    with modes_kept(module), rng.preserved(), torch.no_grad():
        try:
            module.eval()
            if link is not None:
                link.hold(link.trainer)
            for part, name, tensor in buffers:
                part._buffers[name] = copies[id(tensor)]
            yield
        finally:
            for part, name, tensor in buffers:
                part._buffers[name] = tensor
            if link is not None:
                link.hold(*tied)


def _keep_in_eval(module: nn.Module) -> None:
    # On the object itself, where train() of the modules above finds it too. Copies and pickles of
    # the module have it as well.
    module.training = False
    vars(module)["train"] = functools.partial(_stay, module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Is ``train`` of a module that is kept in eval mode."""
    module.training = False
    return module


def switches(task: nn.Module) -> dict[str, list[str]]:
    """Returns the names of the parameters without gradient and of the modules in eval mode.

    And of those that are kept in it, whatever ``train()`` says.
    """
    return {
        "frozen": [name for name, p in task.named_parameters() if not p.requires_grad],
        "eval": [name for name, module in task.named_modules() if not module.training],
        "kept": [name for name, module in task.named_modules() if kept_in_eval(module)],
    }


def set_switches(task: nn.Module, state: Mapping[str, Iterable[str]]) -> None:
    """Puts back what `switches` returned."""
    frozen, resting = set(state["frozen"]), set(state["eval"])
    for name, parameter in task.named_parameters():
        if parameter.requires_grad == (name in frozen):
            parameter.requires_grad_(name not in frozen)
    keep(task, state.get("kept", ()))
    for name, module in task.named_modules():
        module.training = name not in resting


def keep(task: nn.Module, names: Iterable[str]) -> None:
    """Keeps exactly these modules in eval mode, whatever ``train()`` says."""
    kept = set(names)
    for name, module in task.named_modules():
        if name in kept:
            _keep_in_eval(module)
        else:
            vars(module).pop("train", None)
