"""How a task runs on its device or devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class Strategy(ABC):
    """The seam between the loop and the devices. Made once per run.

    The loop calls `setup` before optimizers are made, `bind` once per step method, the rest at the
    places their names say. A strategy for several processes overrides these methods; the loop
    itself never asks how many there are.

    Args:
        device: The device of this process.
    """

    world_size: int = 1
    is_global_zero: bool = True
    name: ClassVar[str] = "base"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def setup(self, task: nn.Module) -> None:
        """Brings the task to where it runs."""

    @abstractmethod
    def bind(self, task: nn.Module, name: str) -> Callable[..., Any]:
        """Returns what the loop calls for the step method ``name``."""

    @abstractmethod
    def clip_grad_norm(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """Scales the gradients to a joint 2-norm of at most ``max_norm``.

        Returns:
            The norm before, a 0-dim tensor on the device.
        """

    @abstractmethod
    def clip_grad_value(self, parameters: list[Tensor], max_value: float) -> None:
        """Limits each element of the gradients to ``-max_value`` .. ``max_value``."""

    @abstractmethod
    def barrier(self) -> None:
        """Waits until all processes are here."""

    @abstractmethod
    def model_state(self, task: nn.Module) -> dict[str, Any]:
        """Returns the task's state for a checkpoint, under the task's own names."""


class SingleDevice(Strategy):
    """One process on one device."""

    name = "single_device"

    def setup(self, task: nn.Module) -> None:
        """Moves the task to the device, and makes a chosen CUDA card the current one."""
        if self.device.type == "cuda":
            # So that device="cuda" in the user's code means the same card.
            torch.cuda.set_device(self.device)
        task.to(self.device)

    def bind(self, task: nn.Module, name: str) -> Callable[..., Any]:
        """Returns the bound method ``name`` of the task itself."""
        method: Callable[..., Any] = getattr(task, name)
        return method

    def clip_grad_norm(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """See `Strategy.clip_grad_norm`. No host sync; the bits of the plain torch call."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def clip_grad_value(self, parameters: list[Tensor], max_value: float) -> None:
        """See `Strategy.clip_grad_value`."""
        torch.nn.utils.clip_grad_value_(parameters, max_value)

    def barrier(self) -> None:
        """Nothing to wait for."""

    def model_state(self, task: nn.Module) -> dict[str, Any]:
        """Returns ``task.state_dict()``."""
        return task.state_dict()
