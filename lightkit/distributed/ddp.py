"""Data parallelism: every process has the whole model, and gradients are averaged over them."""

from __future__ import annotations

import copy
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightkit import freezing
from lightkit.distributed.ranks import Ranks
from lightkit.distributed.strategies import Strategy, check_alike, to_device
from lightkit.errors import ConfigError, OptimizerError, UsageError, some

if TYPE_CHECKING:
    from lightkit.distributed.strategies import Compiled

_UNUSED = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


class _StepModule(nn.Module):
    """All that DistributedDataParallel sees: its forward is the task's ``training_step``.

    So a step that calls ``self.net(x)`` and never ``self(x)`` is averaged too, and the names of the
    task's parameters carry no prefix.

    Attributes:
        outputs: The mapping that the step returned, if it returned one. DistributedDataParallel is
            given its loss alone: it does not look into every mapping, and what else is in there
            needs no gradient. (A list, since a module takes a microsecond to set an attribute.)
    """

    def __init__(self, task: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.task, self.step = task, step
        self.outputs: list[Mapping[str, Any]] = []

    def forward(self, *arguments: Any) -> Any:
        """Calls the step and returns the loss, or whatever else it returned."""
        outputs = self.step(*arguments)
        if isinstance(outputs, Tensor) or not isinstance(outputs, Mapping):
            return outputs
        self.outputs.append(outputs)
        return outputs.get("loss")


class DDPStrategy(Strategy):
    """Every process trains the whole model on its share of the data.

    In automatic optimization gradients are averaged by torch's DistributedDataParallel while the
    backward runs. In manual optimization ``self.manual_backward`` averages the gradients that it has
    made: two optimizers within DistributedDataParallel's forward would give gradients that differ
    over ranks, without an error.

    Args:
        find_unused_parameters: Whether a step may leave out parameters. It costs a walk over the
            graph in every step.
        static_graph: Whether the same parameters are used in every step, in the same order, as
            reentrant activation checkpointing needs.
        bucket_cap_mb: Megabytes of gradients that are sent together; None for torch's choice.
        sync_batchnorm: Whether batch norms compute their means over all ranks; on GPUs only.
        timeout: How long a rank waits for the others, in the first trainer of a program; None for
            ten minutes.
    """

    name = "ddp"

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        sync_batchnorm: bool = False,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__()
        self.timeout = timeout
        self.find_unused_parameters, self.static_graph = find_unused_parameters, static_graph
        self.bucket_cap_mb, self.sync_batchnorm = bucket_cap_mb, sync_batchnorm
        self._adaptor: _StepModule | None = None
        self._ddp: DistributedDataParallel | None = None
        self._all: list[tuple[str, Tensor]] = []
        self._trained: list[tuple[str, Tensor]] = []
        self._switches: list[bool] = []
        self._learns = False
        self._hooked: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._touched: list[Tensor] = []

    def begin(self, device: torch.device, ranks: Ranks) -> None:
        """See `Strategy.begin`.

        Raises:
            UsageError: Another trainer is in the middle of a fit with this very object.
        """
        if self._adaptor is not None or self._hooked:
            raise UsageError(
                "This DDPStrategy object is in the middle of another trainer's fit. Give each "
                'trainer its own, or strategy="ddp".'
            )
        super().begin(device, ranks)

    def fresh(self) -> DDPStrategy:
        """See `Strategy.fresh`."""
        other = copy.copy(self)
        other._handles = []  # those of this one stay where they are
        other.end()
        return other

    def setup(self, task: nn.Module) -> None:
        """Moves the task to the device and gives it rank zero's weights."""
        if self.sync_batchnorm:
            self._convert(task)
        to_device(task, self.device)
        state = [*task.named_parameters(), *task.named_buffers()]
        check_alike(self.ranks, state)
        with torch.no_grad():
            self.ranks.copy_from_zero([tensor for _, tensor in state])

    def _convert(self, task: nn.Module) -> None:
        if self.device.type != "cuda":
            raise ConfigError(
                "sync_batchnorm=True works on GPUs only, as torch's SyncBatchNorm does. Leave it "
                "out on the CPU."
            )
        kept = freezing.switches(task)["kept"]
        nn.SyncBatchNorm.convert_sync_batchnorm(task)  # type: ignore[no-untyped-call]
        freezing.keep(task, kept)  # they are other objects now

    # --- automatic optimization ------------------------------------------------------------------

    def bind_training(
        self, task: nn.Module, *, automatic: bool, compiled: Compiled | None = None
    ) -> Callable[..., Any]:
        """See `Strategy.bind_training`.

        Raises:
            ConfigError: For buckets that are too small for what is compiled.
        """
        if compiled is not None and (self.bucket_cap_mb or 1) < 1:
            raise ConfigError(
                f"DDPStrategy(bucket_cap_mb={self.bucket_cap_mb}): torch cuts a compiled step where "
                f"buckets end, and the first one has 1 MB. Give at least 1, or leave out compile=."
            )
        step = super().bind_training(task, automatic=automatic, compiled=compiled)
        if not automatic:
            self._follow(task)
            return step
        self._adaptor = _StepModule(task, step)
        self._wrap()
        self.sync_gradients = self._sync_gradients
        return self._step

    def begin_epoch(self, task: nn.Module) -> None:
        """Wraps the task anew where hooks gave it other parameters, froze or unfroze some."""
        if self._adaptor is None:
            self._follow(task)
            return
        now = [id(parameter) for parameter in task.parameters()]
        if now != [id(parameter) for _, parameter in self._all] or self._switched():
            self._wrap()

    def _switched(self) -> bool:
        """Tells whether parameters were frozen or unfrozen since the task was wrapped."""
        return [parameter.requires_grad for _, parameter in self._all] != self._switches

    def _wrap(self) -> None:
        assert self._adaptor is not None
        self._ddp = None  # its hooks go before those of the next one come
        self._all = list(self._adaptor.task.named_parameters())
        self._switches = [parameter.requires_grad for _, parameter in self._all]
        self._trained = [(name, p) for name, p in self._all if p.requires_grad]
        self._learns = self.static_graph
        if not self._trained:
            raise OptimizerError("No parameter of the task is trainable, so there is no gradient.")
        more = {} if self.bucket_cap_mb is None else {"bucket_cap_mb": self.bucket_cap_mb}
        self._ddp = DistributedDataParallel(
            self._adaptor,  # without device_ids: batches are where they belong already
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=True,
            **more,  # type: ignore[arg-type]
        )

    def _sync_gradients(self, last: bool) -> None:
        if self._switched():  # by a hook, in the middle of an epoch
            self._wrap()
        # A static graph is learned in the first backward, which therefore must average: a sum of
        # what is the same on all ranks stays as it is when it is averaged again.
        learns, self._learns = self._learns, False
        sync, ddp = last or learns, self._ddp
        assert ddp is not None
        if ddp.require_backward_grad_sync is not sync:
            ddp.require_backward_grad_sync = sync

    def _step(self, *arguments: Any) -> Any:
        adaptor = self._adaptor
        assert self._ddp is not None
        assert adaptor is not None
        try:
            loss = self._ddp(*arguments)
            if not adaptor.outputs:
                return loss
            outputs = adaptor.outputs.pop()
            return outputs if loss is None else {**outputs, "loss": loss}
        except RuntimeError as error:
            self._explain(error)
            raise

    def check_step(self) -> None:
        """Raises where a backward left out parameters, for which other ranks may wait.

        Torch itself would say so in the next forward, to which this rank may never come: the others
        wait within their backward, and it would in a collective of its own. Torch is asked whether
        it has averaged all gradients, which costs less than to look for them.
        """
        if self._ddp is None:
            return
        if self._switched():
            raise UsageError(
                "training_step changed requires_grad of parameters, so their gradients were not "
                "averaged over ranks. Change it in a hook: on_train_batch_start, or "
                "on_train_epoch_start."
            )
        if self.find_unused_parameters or self.static_graph:
            return
        try:
            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            self._explain(error)
            raise

    def _explain(self, error: RuntimeError) -> None:
        """Raises what torch says about parameters without a gradient, in names."""
        unused = _UNUSED.search(str(error))
        if unused is not None:
            raise self._unused([self._trained[int(i)][0] for i in unused[1].split()]) from None

    def _unused(self, names: Sequence[str]) -> UsageError:
        return UsageError(
            f"training_step on rank {self.ranks.rank} did not use {some(names, most=10)}, so "
            f"gradients cannot be averaged over ranks. Use them in every step, freeze them (requires_grad_(False)), or "
            f'allow it with Trainer(strategy="ddp_find_unused_parameters_true").'
        )

    def end(self) -> None:
        """Takes the hooks off the task's parameters."""
        self._ddp = self._adaptor = None
        self.sync_gradients, self._all, self._trained, self._switches = None, [], [], []
        for handle in self._handles:
            handle.remove()
        self._handles, self._touched, self._hooked = [], [], {}

    # --- manual optimization ---------------------------------------------------------------------

    def _follow(self, task: nn.Module) -> None:
        """Notices gradients of the parameters that are new, and gives them rank zero's values."""
        new = [p for p in task.parameters() if id(p) not in self._hooked]
        if not new:
            return
        with torch.no_grad():
            self.ranks.copy_from_zero(new)
        for parameter in new:
            self._hooked[id(parameter)] = parameter
            if not (
                parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex())
            ):
                continue
            # One that is frozen now may be trained later, and torch hooks none that is frozen.
            trained = parameter.requires_grad
            hook = parameter.requires_grad_(True).register_post_accumulate_grad_hook
            self._handles.append(hook(self._touched.append))  # type: ignore[no-untyped-call]
            parameter.requires_grad_(trained)

    def before_manual_step(self, task: nn.Module) -> None:
        """Averages what ``loss.backward()`` made, where ``manual_backward`` was not called."""
        if self._touched:
            self.average_touched(task)

    def after_backward(self, task: nn.Module) -> Callable[[], None]:
        """See `Strategy.after_backward`."""
        return functools.partial(self.average_touched, task)

    def average_touched(self, task: nn.Module) -> None:
        """Averages the gradients that a backward of the task's own has made.

        Gradients of before are the same on all ranks, so averaging a sum leaves them as they are.
        """
        names = {id(parameter): name for name, parameter in task.named_parameters()}
        found = {names[id(p)]: p for p in self._touched if id(p) in names}
        self._touched.clear()
        ordered = sorted(found)
        mark = [len(ordered), zlib.crc32(";".join(ordered).encode())]
        what = "gradients of manual_backward"
        if any(row != mark for row in self.ranks.exchange(mark, what)):
            raise self._differ(ordered)
        self.average_gradients([found[name] for name in ordered])

    def _differ(self, names: list[str]) -> UsageError:
        every = self.ranks.gather(names, "names of the gradients")
        odd = sorted(set().union(*every) - set(every[0]).intersection(*every))
        return UsageError(
            f"manual_backward made gradients of other parameters on some ranks than on others: "
            f"{', '.join(odd[:10])}. All ranks must call it for the same losses in the same order."
        )

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """See `Strategy.average_gradients`."""
        self.ranks.average([p.grad for p in parameters if p.grad is not None])

    def before_evaluation(self, task: nn.Module) -> None:
        """Gives all ranks the buffers of rank zero, as its checkpoints have them."""
        self.ranks.copy_from_zero(list(task.buffers()))
