"""Tasks that were built without memory: room and first values for what is on the meta device."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightkit import rng
from lightkit.distributed.ranks import local_part
from lightkit.errors import ConfigError
from lightkit.task_hooks import ShardingHooks

if TYPE_CHECKING:
    from lightkit.distributed.ranks import Ranks

_RESETS = ("reset_parameters", "_reset_parameters")  # the second is MultiheadAttention's
_DRAWS = {
    getattr(torch.ops.aten, name)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_")
}


def materialise(task: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Gives memory and first values to what a task has on the meta device; moves the rest.

    The values come from the task's ``init_weights``, else from each module's ``reset_parameters``.
    They are those of one process, whatever parts of them the ranks hold: every rank draws each
    tensor whole, one at a time, and keeps its part. Collectives.

    Args:
        task: The task, perhaps sharded already.
        device: Where to.
        ranks: The processes.

    Raises:
        ConfigError: Nothing says what the first values are.
    """
    modules = [(name, m) for name, m in task.named_modules() if _own_meta(m)]
    names = [n for n, t in _state(task) if t.is_meta and t.is_floating_point()]
    own = defines(task, "init_weights")
    if not own:
        without = [n for n, m in modules if not any(hasattr(m, reset) for reset in _RESETS)]
        if without:
            raise ConfigError(
                f"{type(task).__name__} was built on the meta device, and nothing says the first "
                f"values of {', '.join(without[:5])}. Define init_weights(self) in the task, or "
                f"reset_parameters(self) in the modules."
            )
    empty, tied = torch.empty_like, _tied(task)
    task._apply(  # type: ignore[no-untyped-call]
        lambda t: empty(t, device=device) if t.is_meta else t.to(device)
    )
    for (module, name), *others in tied:  # each place got a parameter of its own
        for other, its in others:
            other._parameters[its] = module._parameters[name]
    seed = ranks.share(int(torch.randint(2**62, ())), "seed of the first weights")
    with rng.preserved(), torch.no_grad():
        here = dict(_state(task))
        for name in names:
            here[name].fill_(torch.nan)  # to notice what is left out
        torch.manual_seed(seed)
        if own:
            with _WholeDraws():  # type: ignore[no-untyped-call]
                task.init_weights()  # type: ignore[operator]
        else:
            for _, module in modules:
                _reset(module)
        here = dict(_state(task))  # a buffer may have been made anew
        # Host sync, once: whether anything was left out.
        left = [n for n in names if bool(local_part(here[n]).isnan().any())]
    left = sorted(set().union(*ranks.gather(left, "weights without values")))
    if left:
        raise ConfigError(
            f"{type(task).__name__} was built on the meta device, and these got no values: "
            f"{', '.join(left[:10])}. Set them in init_weights (or in reset_parameters of their "
            f"modules), buffers too."
        )


def defines(task: nn.Module, hook: str) -> bool:
    """Tells whether a task defines a hook itself."""
    own = getattr(type(task), hook, None)
    return own is not None and own is not getattr(ShardingHooks, hook, None)


def fill_part(part: Tensor, whole: Tensor) -> None:
    """Copies out of a whole tensor what this rank has of it, without a collective.

    Args:
        part: A tensor of ``torch.distributed.tensor``; or a plain one, which takes everything.
        whole: All of it, on any device. Only what is needed of it is read.
    """
    if not hasattr(part, "__create_chunk_list__"):
        part.copy_(whole)
        return
    local = local_part(part)
    for chunk in part.__create_chunk_list__():
        if local.numel():
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            local.copy_(whole[tuple(slice(start, start + size) for start, size in ends)])


def _reset(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of a module on whole tensors, and keeps this rank's part of them."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    wholes = {
        name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device), p.requires_grad)
        for name, p in own.items()
        if hasattr(p, "__create_chunk_list__")
    }
    module._parameters.update(wholes)
    try:
        getattr(module, next(reset for reset in _RESETS if hasattr(module, reset)))()
    finally:
        module._parameters.update({name: own[name] for name in wholes})
    for name, whole in wholes.items():
        fill_part(own[name], whole)


class _WholeDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random values that are drawn into a sharded tensor are drawn for all of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        part: Any = args[0] if args else None
        if func.overloadpacket in _DRAWS and hasattr(part, "__create_chunk_list__"):
            whole = torch.empty(part.shape, dtype=part.dtype, device=part.device)
            func(whole, *args[1:], **(kwargs or {}))
            fill_part(part, whole)
            return part
        return func(*args, **(kwargs or {}))


def _tied(task: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns where each parameter is, as modules and names in them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return list(places.values())


def _own_meta(module: nn.Module) -> bool:
    tensors = itertools.chain(module._parameters.values(), module._buffers.values())
    return any(t is not None and t.is_meta for t in tensors)


def _state(task: nn.Module) -> list[tuple[str, Tensor]]:
    return [*task.named_parameters(), *task.named_buffers()]
