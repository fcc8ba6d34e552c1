"""How a task runs on its device or devices."""

from __future__ import annotations

import copy
import itertools
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightkit.distributed.ranks import Ranks
from lightkit.errors import ConfigError, UsageError, ranks_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from lightkit.precision import Precision

    Compiled = Callable[[Callable[..., Any]], Callable[..., Any]]


class Strategy:
    """The seam between the loop and the devices.

    The loop calls `setup` before optimizers are made, `bind_training` and `bind` once per step
    method, the rest at the places their names say. A strategy for several processes overrides these
    methods; the loop itself never asks how many there are.

    Attributes:
        name: What ``Trainer(strategy=)`` calls it.
        device: The device of this process, once a call of the trainer has begun.
        ranks: The processes of the run.
        sync_gradients: Called before each batch of a group with whether it is the last, after
            whose backward gradients are averaged over ranks; None where nothing is to be said.
        sync_batchnorm: Whether batch norms compute their means over all ranks.
        timeout: How long a rank waits for the others; None for ten minutes.
    """

    name: ClassVar[str] = "base"
    sync_gradients: Callable[[bool], None] | None = None
    sync_batchnorm = False
    timeout: timedelta | None = None

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.ranks = Ranks()

    def __getattr__(self, name: str) -> NoReturn:
        """Says for names that a strategy has elsewhere what to write."""
        from lightkit.elsewhere import STRATEGY, refusal

        raise AttributeError(refusal("trainer.strategy has no attribute", name, STRATEGY))

    @property
    def sharded(self) -> bool:
        """Whether each rank has only a part of the model, so that all must write checkpoints."""
        return False

    @property
    def data_ranks(self) -> tuple[int, int]:
        """The number of this rank among those that get batches of their own, and how many."""
        return self.ranks.rank, self.ranks.world_size

    def adapt(self, precision: Precision) -> Precision:
        """Returns the precision of the loop, where the strategy does a part of it by itself."""
        return precision

    def begin(self, device: torch.device, ranks: Ranks) -> None:
        """Learns where this process runs, and with whom; at the start of every call."""
        self.device, self.ranks = device, ranks

    def fresh(self) -> Strategy:
        """Returns one with the same settings, for a call in the middle of this one's."""
        return copy.copy(self)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.ranks.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the first of all."""
        return self.ranks.is_zero

    def setup(self, task: nn.Module) -> None:
        """Brings the task to where it runs, with the same weights on all ranks."""
        to_device(task, self.device)

    def to_channels_last(self, task: nn.Module) -> None:
        """Lays the task's floating 4-D parameters and buffers out with the channels last.

        They keep their names, shapes and values, and stay so after the call, as on their device.

        Raises:
            ConfigError: The size of one is not known yet.
        """
        for name, tensor in itertools.chain(task.named_parameters(), task.named_buffers()):
            if is_lazy(tensor):
                raise ConfigError(
                    f"memory_format='channels_last': {name} belongs to a lazy layer and has no size "
                    f"yet. Give it one, by a call with an example in configure_model, or leave out "
                    f"memory_format."
                )
            if tensor.dim() == 4 and tensor.is_floating_point():
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)

    def bind(self, task: nn.Module, name: str) -> Callable[..., Any]:
        """Returns what is called for the step method ``name`` of an evaluation."""
        method: Callable[..., Any] = getattr(task, name)
        return method

    def bind_training(
        self, task: nn.Module, *, automatic: bool, compiled: Compiled | None = None
    ) -> Callable[..., Any]:
        """Returns what is called for ``training_step``.

        Args:
            task: The task.
            automatic: Whether the loop differentiates, and not the task itself.
            compiled: Returns the compiled form of a function; None where nothing is compiled. It is
                for the task's own method: what wraps that stays outside.
        """
        step: Callable[..., Any] = getattr(task, "training_step")  # noqa: B009
        return step if compiled is None else compiled(step)

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Raises for optimizers that cannot update what the strategy made of the parameters."""

    def check_step(self) -> None:
        """Raises on this rank for what only a backward shows; after the last one of each group."""

    def after_backward(self, task: nn.Module) -> Callable[[], None] | None:
        """Returns what ``self.manual_backward`` calls at its end; None where nothing is to be done."""
        return None

    def before_manual_step(self, task: nn.Module) -> None:
        """Is told of each ``optimizer.step()`` in manual optimization, before hooks and clipping."""

    def begin_epoch(self, task: nn.Module) -> None:
        """Takes in what hooks changed: parameters that are new, frozen or unfrozen."""

    def end(self) -> None:
        """Lets go of what was made for a call."""

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Averages over ranks the gradients that exist; one collective. Nothing with one process."""

    def before_evaluation(self, task: nn.Module) -> None:
        """Makes what the ranks evaluate the same: buffers, such as running means, of rank zero."""

    def clip_grad_norm(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """Scales the gradients to a joint 2-norm of at most ``max_norm``.

        No host sync, and the bits of the plain torch call.

        Returns:
            The norm before, a 0-dim tensor on the device.
        """
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def clip_grad_value(self, parameters: list[Tensor], max_value: float) -> None:
        """Limits each element of the gradients to ``-max_value`` .. ``max_value``."""
        torch.nn.utils.clip_grad_value_(parameters, max_value)

    def storage_group(self) -> Any:
        """Returns the processes that write a checkpoint together, where `sharded`."""
        return None

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Returns the batches of an evaluation, perhaps keeping the ranks in step meanwhile.

        Between one and the next the step runs once. All ranks go on to the end.
        """
        return batches

    def model_state(self, task: nn.Module) -> dict[str, Any]:
        """Returns the task's state for a checkpoint, under the task's own names."""
        return task.state_dict()


class SingleDevice(Strategy):
    """One process on one device."""

    name = "single_device"


def is_meta(module: nn.Module) -> bool:
    """Tells whether a parameter or buffer of a module is on the meta device."""
    return any(t.is_meta for t in itertools.chain(module.parameters(), module.buffers()))


def to_device(task: nn.Module, device: torch.device) -> None:
    """Moves a task to a device, which becomes the current one where it is a CUDA card.

    What was built on the meta device gets its first values there.
    """
    if hasattr(task, "unshard"):
        raise ConfigError(
            f"{type(task).__name__} was sharded by an earlier call with FSDPStrategy, and stays so. "
            f"Use the same strategy, or load its checkpoint into a new task."
        )
    if device.type == "cuda":
        # So that device="cuda" in the user's code means the same card.
        torch.cuda.set_device(device)
    if is_meta(task):
        from lightkit.distributed.meta import materialise

        materialise(task, device, Ranks())
    else:
        task.to(device)


def check_alike(ranks: Ranks, state: Sequence[tuple[str, Tensor]]) -> None:
    """Raises where a rank has built another model: copying would mix up its weights. A collective.

    Args:
        ranks: The processes.
        state: Names and tensors of the model.

    Raises:
        UsageError: On all ranks, naming those that differ from rank zero.
    """
    text = ";".join(f"{name}{tuple(t.shape)}{t.dtype}{t.requires_grad}" for name, t in state)
    marks = ranks.exchange([zlib.crc32(text.encode())], "comparison of the models")
    others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    if others:
        raise UsageError(
            f"The task of {ranks_named(others)} has other parameters than that of "
            f"rank 0, or has frozen others. All processes must build the same model: look for sizes "
            f"that are drawn, or that are read from data which the ranks split."
        )
