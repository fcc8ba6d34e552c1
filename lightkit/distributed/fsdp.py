"""Sharding: every process holds a part of each parameter, of its gradient and its optimizer state.

The parts are put together for as long as a block computes, and only then. By torch's
``fully_shard``, on one mesh of devices for all that is split: whole copies of the model
("replicate"), its parts ("shard"), and the parts of single layers ("tp").
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightkit.distributed.blocks import blocks, check_parameters
from lightkit.distributed.meta import defines, materialise
from lightkit.distributed.ranks import Ranks
from lightkit.distributed.strategies import Strategy, check_alike, is_meta, to_device
from lightkit.errors import ConfigError, OptimizerError, UsageError
from lightkit.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from lightkit.distributed.strategies import Compiled

#: How long the slowest disk may take.
_STORAGE_TIMEOUT = timedelta(hours=1)
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_END = object()
_DONE = -2.0  # said by the ranks that have a batch, when they are through with it
#: What a task is sharded by, kept on the task: a task is sharded once and stays so.
_MARK = "_lightkit_sharding"


class FSDPStrategy(Strategy):
    """Shards parameters, gradients and optimizer states over the processes.

    In one process without a launcher nothing is sharded, so that a script runs anywhere.

    Args:
        replicate: So many groups of processes have the whole model each, and gradients are
            averaged over them: the ranks must be divisible by it. "nodes" makes each machine one
            such group, so that parameters travel within machines only.
        tensor_parallel: Ranks that share single layers, as the task's ``configure_parallelism``
            splits them. They get the same batches.
        reshard_after_forward: Whether blocks are split again between forward and backward: less
            memory, more communication. None is torch's choice: all but the task itself.
        timeout: How long a rank waits for the others; None for ten minutes.
    """

    name = "fsdp"

    def __init__(
        self,
        *,
        replicate: int | str = 1,
        tensor_parallel: int = 1,
        reshard_after_forward: bool | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__()
        self.timeout = timeout
        for what, value in (("replicate", replicate), ("tensor_parallel", tensor_parallel)):
            word = " (or 'nodes')" if what == "replicate" else ""
            if not (word and value == "nodes") and (type(value) is not int or value < 1):
                raise ConfigError(
                    f"FSDPStrategy({what}={value!r}): give a whole number{word}, at least 1."
                )
        self.replicate, self.tensor_parallel = replicate, tensor_parallel
        self.reshard_after_forward = reshard_after_forward
        self._precision = "32-true"
        self._task: nn.Module | None = None
        self._syncs = True
        self._announce: Callable[[int], None] | None = None

    @classmethod
    def named(cls, name: str) -> FSDPStrategy:
        """Returns the strategy that ``Trainer(strategy="fsdp")`` or ``"hsdp"`` means."""
        return cls(replicate="nodes" if name == "hsdp" else 1)

    @property
    def sharded(self) -> bool:
        """Whether the task is sharded: with more than one rank."""
        return self.ranks.world_size > 1

    @property
    def data_ranks(self) -> tuple[int, int]:
        """The number of this rank among those that get batches of their own, and how many."""
        size = self.tensor_parallel if self.sharded else 1
        return self.ranks.rank // size, self.ranks.world_size // size

    # --- the mesh --------------------------------------------------------------------------------

    def begin(self, device: torch.device, ranks: Ranks) -> None:
        """See `Strategy.begin`.

        Raises:
            ConfigError: The ranks cannot be divided as asked for.
        """
        super().begin(device, ranks)
        if self.sharded:
            self._shape()

    def _shape(self) -> tuple[int, int, int]:
        """Returns how many groups there are, ranks that shard in each, and ranks of one layer."""
        world, env, tp = self.world_size, self.ranks.env, self.tensor_parallel
        groups = self.replicate
        if groups == "nodes":
            groups = world // env.local_world_size
            if groups == 1:
                raise ConfigError(
                    f'strategy="hsdp" keeps one copy of the model on each machine, but all {world} '
                    f'ranks are on this one. Use strategy="fsdp", or say how many copies: '
                    f"FSDPStrategy(replicate=2)."
                )
        assert isinstance(groups, int)
        if world % (groups * tp):
            raise ConfigError(
                f"FSDPStrategy(replicate={groups}, tensor_parallel={tp}) divides the ranks by "
                f"{groups * tp}, but there are {world}. Start a multiple of {groups * tp}."
            )
        return groups, world // (groups * tp), tp

    @property
    def mesh(self) -> DeviceMesh:
        """The devices of all ranks, with the axes "replicate", "shard" and "tp" where they exist.

        Made once per process and shape. A collective the first time.
        """
        groups, shard, tp = self._shape()
        sizes = {"shard": shard}
        if groups > 1:
            sizes = {"replicate": groups, **sizes}
        if tp > 1:
            sizes["tp"] = tp
        return _mesh(self.device.type, tuple(sizes.values()), tuple(sizes))

    # --- the task --------------------------------------------------------------------------------

    def adapt(self, precision: Precision) -> Precision:
        """See `Strategy.adapt`. Blocks compute in bf16 by themselves, so nothing is autocast.

        Raises:
            ConfigError: For fp16, whose scaled losses are not for sharded gradients.
        """
        if not self.sharded:
            return precision
        if precision.has_scaler:
            raise ConfigError(
                f'precision="{precision.name}" scales losses, which does not go with a sharded '
                f'model. Use precision="bf16-mixed", which needs no scaling.'
            )
        self._precision = precision.name
        return Precision(precision.name) if precision.name == "bf16-mixed" else precision

    def setup(self, task: nn.Module) -> None:
        """Shards a task, from wherever it is; whole it is on no device. Collectives.

        Weights are those of rank zero. What is on the meta device gets memory when it is sharded,
        and then its first values. A task that is sharded already stays as it is.

        Raises:
            ConfigError: It is sharded in another way, nothing says its first values, or a
                parameter cannot be split.
            UsageError: Ranks have built different models.
        """
        if not self.sharded:
            to_device(task, self.device)
            return
        mark = (self.mesh, self._precision, self.reshard_after_forward)
        if _MARK in task.__dict__:
            if task.__dict__[_MARK] != mark:
                raise ConfigError(
                    f"{type(task).__name__} was sharded by an earlier call with another "
                    f"FSDPStrategy or precision, and stays so. Use the same one, or a new task."
                )
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        state = [*task.named_parameters(), *task.named_buffers()]
        check_alike(self.ranks, state)
        with torch.no_grad():
            self.ranks.copy_from_zero([t.detach() for _, t in state if not t.is_meta])
        if self.tensor_parallel > 1 and not defines(task, "configure_parallelism"):
            raise ConfigError(
                f"FSDPStrategy(tensor_parallel={self.tensor_parallel}) needs "
                f"configure_parallelism(self, mesh) in {type(task).__name__}, which splits layers "
                f'over mesh["tp"].'
            )
        if defines(task, "configure_parallelism"):
            task.configure_parallelism(self.mesh)  # type: ignore[operator]
        self._shard(task)
        if is_meta(task):
            materialise(task, self.device, self.ranks)
        else:
            task.to(self.device)  # buffers
        task.__dict__[_MARK] = mark

    def to_channels_last(self, task: nn.Module) -> None:
        """See `Strategy.to_channels_last`.

        Raises:
            ConfigError: The task is sharded, which torch can do with contiguous parameters only.
        """
        if self.sharded:
            raise ConfigError(
                f"memory_format='channels_last' does not go with strategy=\"{self.name}\": parts of "
                f'parameters are contiguous. Leave it out, or use strategy="ddp".'
            )
        super().to_channels_last(task)

    def _shard(self, task: nn.Module) -> None:
        """Shards the blocks, then what is left of the task."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = self.mesh
        if self.tensor_parallel > 1:
            axes = tuple(axis for axis in mesh.mesh_dim_names or () if axis != "tp")
            mesh = mesh[axes]
        how: dict[str, Any] = {"mesh": mesh}
        if self.reshard_after_forward is not None:  # older versions of torch take no None
            how["reshard_after_forward"] = self.reshard_after_forward
        if self._precision == "bf16-mixed":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # Gradients are added up over ranks in fp32, and parameters are kept in it.
            how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        chosen = blocks(task)
        check_parameters(task, chosen)
        for module in (*chosen, task):
            kind = type(module)
            fully_shard(module, **how)
            # Torch makes a class FSDP<name> of it; run folders and checkpoints are named by it.
            made: Any = type(module)
            made.__name__, made.__qualname__ = kind.__name__, kind.__qualname__
            made.__module__ = kind.__module__
        for step in _STEPS:
            signature = inspect.signature(getattr(type(task), step))
            register_fsdp_forward_method(task, step)
            # By itself it shows one argument too few, since it wraps a bound method.
            getattr(task, step).__func__.__signature__ = signature

    def bind(self, task: nn.Module, name: str) -> Callable[..., Any]:
        """See `Strategy.bind`."""
        method: Callable[..., Any] = getattr(task, name)
        if not self.sharded:
            return method
        self._task = task

        @functools.wraps(method)
        def step(*arguments: Any) -> Any:
            if self._announce is not None:
                self._announce(0)
            return method(*arguments)

        return step

    def bind_training(
        self, task: nn.Module, *, automatic: bool, compiled: Compiled | None = None
    ) -> Callable[..., Any]:
        """See `Strategy.bind_training`.

        Raises:
            ConfigError: For manual optimization.
        """
        step = super().bind_training(task, automatic=automatic, compiled=compiled)
        if not self.sharded:
            return step
        if not automatic:
            raise ConfigError(
                f'strategy="{self.name}" splits the model between forward and backward, so it '
                f"needs automatic optimization, where the loop does both. "
                f'{type(task).__name__} optimizes by itself: use strategy="ddp".'
            )
        self._task, self.sync_gradients = task, self._sync
        return step

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """See `Strategy.check_optimizers`.

        Raises:
            OptimizerError: For LBFGS.
        """
        if self.sharded and any(isinstance(one, torch.optim.LBFGS) for one in optimizers):
            raise OptimizerError(
                f'LBFGS works on all parameters as one long vector, which strategy="{self.name}" '
                f'splits. Use strategy="ddp", or an optimizer such as AdamW.'
            )

    def _sync(self, last: bool) -> None:
        if last is not self._syncs:
            self._task.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
            self._syncs = last

    def end(self) -> None:
        """See `Strategy.end`."""
        if self._task is not None and not self._syncs:
            self._sync(True)
        self._task, self.sync_gradients, self._announce = None, None, None

    # --- gradients -------------------------------------------------------------------------------

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Raises: gradients that were not averaged in their backward are not there as parts.

        Raises:
            UsageError: Always, with several ranks.
        """
        if self.sharded:
            raise UsageError(
                "The loader ended within an accumulated step, before its len(). Gradients of a "
                "sharded model are averaged by the last backward of a step, which did not come: "
                "correct the loader's __len__, or remove it."
            )

    def _total_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the joint 2-norm of tensors. A collective on the device for each kind of split."""
        norms = [_whole(torch.nn.utils.get_total_norm(group)) for group in _by_mesh(tensors)]
        return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)

    def clip_grad_norm(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """See `Strategy.clip_grad_norm`."""
        if not self.sharded:
            return super().clip_grad_norm(parameters, max_norm)
        norm = self._total_norm([p.grad for p in parameters if p.grad is not None])
        for group in _by_mesh(parameters):
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        return norm

    def clip_grad_value(self, parameters: list[Tensor], max_value: float) -> None:
        """See `Strategy.clip_grad_value`."""
        for group in _by_mesh(parameters):
            super().clip_grad_value(group, max_value)

    def storage_group(self) -> Any:
        """See `Strategy.storage_group`. A collective the first time.

        It is of its own and over gloo: a thread writes while the loop goes on.
        """
        return _storage_group()

    # --- evaluation ------------------------------------------------------------------------------

    def before_evaluation(self, task: nn.Module) -> None:
        """Gives all ranks the buffers of rank zero, as its checkpoints have them."""
        self.ranks.copy_from_zero([b for b in task.buffers() if not hasattr(b, "device_mesh")])

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Lets all ranks go through the same collectives, whatever the number of their batches.

        A block is put together by all ranks at once. So the ranks ask before every batch who has
        one, and where some have none, the others tell them which block is next; they help to put
        it together and compute nothing. Nothing of the user's runs for a batch that is not there.
        """
        return self._in_step(batches) if self.sharded else batches

    def _in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        assert self._task is not None
        shards = _shards(self._task)
        try:
            while True:
                item = next(batches, _END)
                rows = self.ranks.exchange([item is not _END], "batches of an evaluation")
                have = [bool(row[0]) for row in rows]
                if not any(have):
                    return
                if all(have):
                    yield item
                elif item is _END:
                    while (number := self._say(-1.0)) != _DONE:
                        self._help(shards, int(number))
                else:
                    yield from self._led(shards, item)
        finally:
            for module in shards:  # the task itself stays whole after a forward without backward
                module.reshard()

    def _led(self, shards: list[Any], item: Any) -> Iterator[Any]:
        """Yields a batch, and tells the ranks without one which blocks its step needs."""
        handles = [
            module.register_forward_pre_hook(
                lambda module, args, number=number: self._say_block(number), prepend=True
            )
            for number, module in enumerate(shards)
        ]
        self._announce = self._say_block
        try:
            yield item
        finally:  # no collective here: it may be an exception that passes
            self._announce = None
            for handle in handles:
                handle.remove()
        self._say(_DONE)

    def _say_block(self, number: int) -> None:
        self._say(float(number))

    def _say(self, number: float) -> float:
        """Returns the block that comes next, as those that have a batch say it. A collective.

        Args:
            number: The block; -1 asks.

        Raises:
            UsageError: They do not say the same.
        """
        said = {row[0] for row in self.ranks.exchange([number], "next block of an evaluation")}
        said.discard(-1.0)
        if len(said) > 1:
            raise UsageError(
                "Evaluation steps of different ranks go through different blocks of the model, "
                "which a sharded model cannot do: all ranks put each block together at once."
            )
        return said.pop()

    def _help(self, shards: list[Any], number: int) -> None:
        """Takes part in putting a block together."""
        shards[number].unshard()
        stays = not number if self.reshard_after_forward is None else not self.reshard_after_forward
        if not stays:
            shards[number].reshard()


# --- parts ----------------------------------------------------------------------------------------


def _shards(task: nn.Module) -> list[Any]:
    """Returns the task and its blocks, in the order of the task."""
    return [module for module in task.modules() if hasattr(module, "unshard")]


def _by_mesh(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns tensors that are split in one way together: torch's operations on lists need that."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def _whole(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor as a plain one. A collective on its device."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@functools.cache
def _storage_group() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=_STORAGE_TIMEOUT)


@functools.cache
def _mesh(kind: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, sizes, mesh_dim_names=names)
