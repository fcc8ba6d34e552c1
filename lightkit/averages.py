"""Averages of a network's tensors beside them, and how the two change places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightkit.distributed.ranks import local_part


class Averages:
    """A ``torch.optim.swa_utils.AveragedModel`` of some tensors, without the network around them.

    Of a sharded network these are the parts of this rank: the arithmetic is by element.

    Args:
        averaged: Names and tensors, parameters first, each with whether it is a buffer. A shared
            tensor comes under each of its names.
        beside: Names and tensors that belong to the averages but are not averaged; shared ones
            likewise.
        device: Where the averages are kept; None: where the tensors are.
        how: The functions of AveragedModel by name.

    Attributes:
        updates: How many times the tensors were averaged in.
        shown: Whether the averages are in the network, and the trained tensors are kept here.
    """

    def __init__(
        self,
        averaged: Iterable[tuple[str, Tensor, bool]],
        beside: Iterable[tuple[str, Tensor]],
        device: torch.device | None,
        how: Mapping[str, Callable[..., Any] | None],
    ) -> None:
        self.updates, self.shown, self._device = 0, False, device
        self._names: dict[str, int] = {}
        self._network, numbers = _Tensors(), dict[int, int]()
        for name, tensor, is_buffer in averaged:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(numbers)
                self._network.take(local_part(tensor.detach()), is_buffer)
            self._names[name] = numbers[id(tensor)]
        self._model = AveragedModel(self._network, device, use_buffers=True, **how)
        copied: Any = self._model.module
        self._live, self._held = self._network.tensors(), copied.tensors()
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for held, live in zip(self._held, self._live, strict=True):
            group = kinds.setdefault((held.device, held.dtype), ([], []))
            group[0].append(held)
            group[1].append(live)
        self._groups = list(kinds.values())
        for name, tensor in beside:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(self._live)
                self._live.append(tensor)
                self._held.append(tensor.clone())
            self._names[name] = numbers[id(tensor)]

    @torch.no_grad()
    def update(self) -> None:
        """Averages the tensors of now in; the first time they are copied."""
        function, self.updates = self._model.multi_avg_fn, self.updates + 1
        if function is None or self._device is not None or self.updates == 1:
            # On CUDA a host sync: torch brings its counter there.
            self._model.update_parameters(self._network)
            return
        for averages, tensors in self._groups:  # what torch does, without the sync
            function(averages, tensors, self._model.n_averaged)
        self._model.n_averaged += 1  # on the CPU

    @torch.no_grad()
    def exchange(self) -> None:
        """Lets averages and tensors change places, in place."""
        for live, held in zip(self._live, self._held, strict=True):
            before = live.clone()
            live.copy_(held)
            held.copy_(before)
        self.shown = not self.shown

    def put_into(self, model: dict[str, Any]) -> dict[str, Any]:
        """Puts the averages into the state of the network, and returns what is trained instead."""
        trained = {}
        for name, number in self._names.items():
            if name not in model:  # a buffer that is never saved
                continue
            here, other = model[name], _like(model[name], self._held[number])
            model[name], trained[name] = (here, other) if self.shown else (other, here)
        return trained

    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from averages by name, which are not shown."""
        for name, tensor in averages.items():
            if name in self._names:
                self._held[self._names[name]].copy_(local_part(tensor))
        self.updates = updates
        self._model.n_averaged.fill_(updates)


class _Tensors(nn.Module):
    """Some tensors as a module: AveragedModel copies what it is given, and a task holds more."""

    def take(self, tensor: Tensor, is_buffer: bool) -> None:
        """Adds a tensor; its memory is shared."""
        name = str(len(self._parameters) + len(self._buffers))
        if is_buffer:
            self.register_buffer(name, tensor)
        else:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def tensors(self) -> list[Tensor]:
        """Returns them, parameters first."""
        return [*(p.detach() for p in self.parameters()), *self.buffers()]


def _like(here: Tensor, part: Tensor) -> Tensor:
    """Returns a part as a tensor of the kind that is in a checkpoint."""
    if not hasattr(here, "to_local"):
        return part
    made = torch.empty_like(here)
    local_part(made).copy_(part)
    return made
