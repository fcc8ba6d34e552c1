"""Alarms: what will not learn, seen in the first steps of a fit; and what `overfit_batches` showed.

Everything is looked at in the first step. What is suspicious there is looked at in the next ones too
before it is told, since healthy networks begin with zeros (a last layer, LoRA, a warm-up of rates) or
take turns with their parts. The listeners go when all is known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightkit import hints
from lightkit.errors import some
from lightkit.hooks import Callback
from lightkit.readings import read

if TYPE_CHECKING:
    from lightkit.run import FitRun
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

#: Optimizer steps after which a suspicion is told, and how many gradients of zero need at least.
STEPS, _LEAST = 10, 3
_NAMES = ("no-gradient", "zero-gradient", "no-change", "eval-mode", "high-loss")
#: What may stand between a loss and its cross entropy, or between that and what it takes.
_SAME = ("View", "Reshape", "ToCopy", "Squeeze", "Unsqueeze", "Clone", "Alias")


class Alarms(Callback):
    """Looks at the first steps of a fit, on rank zero, and judges a fit with `overfit_batches`."""

    order: ClassVar[int] = 112

    def __init__(self) -> None:
        self._watch: _Watch | None = None

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins to look."""
        run: FitRun = trainer._run  # type: ignore[assignment]
        if run.plan.optimizers and hints.wanted(trainer, _NAMES):
            self._watch = _Watch(trainer, run)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Tells what a short fit has shown, and whether few batches were learnt."""
        if self._watch is not None:
            self._watch.decide(last=True)
            self._watch = None
        if trainer.options.overfit_batches:
            _judge(trainer)

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Looks no more."""
        if self._watch is not None:
            self._watch.leave()


class _Watch:
    """What is known of the first steps: nothing is read from a device before `decide`."""

    def __init__(self, trainer: Trainer, run: FitRun) -> None:
        self._trainer, self._run = trainer, run
        self._names = {id(p): name for name, p in run.task.named_parameters()}
        self._steps, self._step = 0, run.state.global_step
        self._modes: dict[str, nn.Module] | None = None  # those in train mode before the step
        self._loss: tuple[Tensor, int] | None = None
        self._stepped: set[int] = set()  # the optimizers that took steps
        self._open = True  # whether values are to be looked at, not only which gradients there are
        self._with: set[str] = set()
        self._without: set[str] = set()
        #: For each parameter its size, the place of its largest gradient, the value there, that one.
        self._looks: dict[str, tuple[Tensor, int, Tensor, Tensor, Tensor]] = {}
        #: For each parameter the largest gradient so far, and whether that element ever changed.
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        before = "on_after_backward" if run.automatic else "on_before_optimizer_step"
        self._hooks: dict[str, Any] = {
            "on_train_batch_start": self._begin,
            "on_loss": self._take_loss,
            before: self._take_gradients,
            "on_train_batch_end": self._end,
        }
        for name, hook in self._hooks.items():
            setattr(run.hooks, name, (*getattr(run.hooks, name), hook))

    def leave(self) -> None:
        """Takes the listeners away and lets go of all tensors."""
        for name, mine in self._hooks.items():
            now = getattr(self._run.hooks, name)
            setattr(self._run.hooks, name, tuple(hook for hook in now if hook is not mine))
        self._hooks, self._looks, self._found, self._loss, self._modes = {}, {}, {}, None, {}

    def _begin(self, batch: Any, batch_idx: int) -> None:
        if self._modes is None:
            self._modes = {n: m for n, m in self._run.task.named_modules() if m.training}

    def _take_loss(self, loss: Tensor) -> None:
        if self._loss is None and not self._steps and (classes := _classes(loss)) is not None:
            self._loss = loss.detach(), classes

    def _take_gradients(self, optimizer: Any = None) -> None:
        """Notes the gradients that there are, and what they should change."""
        optimizers = self._run.plan.optimizers if optimizer is None else [optimizer]
        self._stepped.update(map(id, optimizers))
        for group in (group for one in optimizers for group in one.param_groups):
            rests = not group.get("lr", 1)  # host sync where the rate is a tensor on a device
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    self._without.add(name)
                    continue
                self._with.add(name)
                if self._open and not rests and (found := _largest(parameter)) is not None:
                    size, at = found
                    value = _at(parameter, at)
                    self._looks[name] = (parameter, parameter.numel(), at, value, size)

    def _end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at what the step has changed."""
        if self._modes:
            self._say_modes(self._modes)
            self._modes = {}
        if self._step == self._run.state.global_step or not self._hooks:
            return
        self._step = self._run.state.global_step
        self._steps += 1
        for name, (parameter, count, index, value, size) in self._looks.items():
            if parameter.device != index.device or parameter.numel() != count:
                continue  # moved away or taken apart meanwhile
            changed = _at(parameter, index) != value
            if name in self._found:
                most, ever = self._found[name]
                size, changed = torch.maximum(size, most), changed | ever
            self._found[name] = size, changed
        self._looks = {}
        if self._steps in (1, STEPS):
            self.decide(last=self._steps == STEPS)

    def decide(self, *, last: bool) -> None:
        """Tells what is certain, and leaves unless something has to be seen again.

        Args:
            last: Whether nothing more is waited for.
        """
        if not self._hooks or not self._steps:
            self.leave()
            return
        steps = "step" if self._steps == 1 else f"{self._steps} steps"
        without = sorted(self._without - self._with)
        if getattr(self._run.strategy, "find_unused_parameters", False):
            without = []
        if self._open:
            self._open = not self._read_values(steps, last=last)
        if not last and (self._open or without):
            return
        if without:
            self._say_without(without, steps)
        self.leave()

    def _read_values(self, steps: str, *, last: bool) -> bool:
        """Tells what the values say, and whether that is all: they may be looked at again."""
        found = list(self._found.items())
        loss, classes = self._loss or (0.0, 1)
        # Host sync: after the first step, and once more where that showed something.
        values = read(
            [loss, *(size for _, (size, _) in found), *(moved for _, (_, moved) in found)]
        )
        sizes = dict(zip(self._found, values[1:], strict=False))
        if self._loss is not None and values[0] > 3 * math.log(classes):
            self._say_loss(values[0], classes)
        self._loss = None
        zeros = _zeros(sizes)
        still = any(sizes.values()) and not any(values[1 + len(found) :]) and not self._run.scaled
        if not last:
            seen = bool(sizes) and len(self._stepped) == len(self._run.plan.optimizers)
            return seen and not zeros and not still
        if zeros and self._steps >= _LEAST:
            self._say_zeros(zeros, len(set(map(_owner, sizes))), steps)
        if still:
            self._say_still(max(sizes.values(), key=_or_nan), len(sizes), steps)
        return True

    def _say_modes(self, before: dict[str, nn.Module]) -> None:
        left = {n: m for n, m in before.items() if not m.training}
        tops = [
            name or type(module).__name__
            for name, module in left.items()
            if (not name or name.rpartition(".")[0] not in left)
            and not isinstance(module, nn.modules.batchnorm._BatchNorm)
            and any(p.requires_grad for p in module.parameters())
        ]
        if tops:
            self._warn(
                "eval-mode",
                f"training_step left {len(tops)} modules in eval mode that were in train mode: "
                f"{some(tops)}. From now on they train without dropout, and their batch norms keep "
                f"their means. Call train() on them before the step returns.",
            )

    def _say_loss(self, loss: float, classes: int) -> None:
        text = (
            f"the first loss is {loss:.3g}, and guessing among {classes} classes gives "
            f"{math.log(classes):.3g}; look at the scale of the inputs and of the last layer's "
            f"weights, and for a softmax before the cross entropy"
        )
        hints.say(self._trainer, "high-loss", text)

    def _say_without(self, names: list[str], steps: str) -> None:
        total = len(self._with | self._without)
        self._warn(
            "no-gradient",
            f"{len(names)} of {total} trainable parameters got no gradient in the first {steps}: "
            f"{some(names)}. The loss does not depend on them: look for layers that forward does "
            f"not call, for detach() and torch.no_grad(), or set requires_grad_(False) on them.",
        )

    def _say_zeros(self, modules: list[str], total: int, steps: str) -> None:
        self._warn(
            "zero-gradient",
            f"The gradients of {len(modules)} of {total} modules were zero in the first {steps}: "
            f"{some(modules)}. They do not learn: look for activations that are all cut off "
            f"(relu, clamp, a saturated softmax), or a factor of 0.",
        )

    def _say_still(self, size: float, count: int, steps: str) -> None:
        groups = [group for one in self._run.plan.optimizers for group in one.param_groups]
        rates = sorted({f"{float(group['lr']):.3g}" for group in groups if "lr" in group})
        kinds = sorted({str(p.dtype).removeprefix("torch.") for g in groups for p in g["params"]})
        self._warn(
            "no-change",
            f"Nothing changed in the first {steps}: in none of {count} parameters the element with "
            f"the largest gradient, of up to {size:.3g}, at a learning rate of "
            f"{some(rates) or 'its own'}. Look for an optimizer_step that does not step, for hooks "
            f"that put weights back, and whether the rate is too small for {some(kinds)}.",
        )

    def _warn(self, name: str, text: str) -> None:
        hints.say(self._trainer, name, text, warn=True)


def _largest(parameter: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the largest gradient of a parameter and its place; None where that cannot be told."""
    gradient = parameter.grad
    if type(gradient) is not Tensor or type(parameter) is not nn.Parameter:
        return None  # sharded, quantized and the like
    with torch.no_grad():
        if not gradient.is_sparse:
            return torch.max(gradient.abs().reshape(-1), 0) if gradient.numel() else None
        values, indices = gradient._values(), gradient._indices()
        if not values.numel() or len(indices) != 1:
            return None
        size, at = torch.max(values.abs().reshape(-1), 0)
        width = values[0].numel()
        return size, _at(indices[0], at // width) * width + at % width


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns one element, by an index on the device that the host does not wait for."""
    return tensor.detach().reshape(-1).index_select(0, index.reshape(1))[0]


def _owner(parameter: str) -> str:
    """Returns the module of a parameter, or the parameter itself where that is the task."""
    return parameter.rpartition(".")[0] or parameter


def _zeros(sizes: dict[str, float]) -> list[str]:
    """Returns the modules of which all parameters have gradients of zero.

    A bias alone is none: before a batch norm its gradient is zero by rights.
    """
    largest: dict[str, float] = {}
    for name, size in sizes.items():
        largest[_owner(name)] = max(largest.get(_owner(name), 0.0), abs(size), key=_or_nan)
    return [name for name, size in largest.items() if size == 0]


def _or_nan(size: float) -> float:
    return math.inf if math.isnan(size) else size


def _classes(loss: Tensor) -> int | None:
    """Returns the number of classes where a loss is the mean of a cross entropy and nothing else.

    Read from autograd's graph, so that nothing has to be put around the step.
    """
    node = _through(loss.grad_fn)
    if node is None or not node.name().startswith("NllLoss") or node._saved_reduction != 1:
        return None
    before, number = node.next_functions[0]
    if before is None:
        return None
    shape = before._input_metadata[number].shape
    return shape[1] if len(shape) > 1 and shape[1] > 1 else None


def _through(node: Any) -> Any:
    """Returns the first node of a graph that changes more than the shape or kind of a tensor."""
    while node is not None and node.name().startswith(_SAME):
        node = node.next_functions[0][0]
    return node


def _judge(trainer: Trainer) -> None:
    """Says whether a fit on a few batches has learnt them: below a tenth of the loss, or no error."""
    rows = [row for row in trainer.history if "train_loss" in row]
    if len(rows) < 2:
        text = "nothing to judge by: that takes the train_loss of two epochs or more"
        hints.say(trainer, "overfit", text, label="verdict:")
        return
    first, last = rows[0]["train_loss"], rows[-1]["train_loss"]
    fell = f"from {first:.3g} to {last:.3g} in {rows[-1]['step']} steps on the same batches"
    right = {n: v for n, v in rows[-1].items() if n.startswith("train_acc") and v > 0.999}
    if last <= 0.1 * first or right:
        also = "".join(f", {name} {value:.3g}" for name, value in right.items())
        text = f"learnt: train_loss went {fell}{also}"
        hints.say(trainer, "overfit", text, label="verdict:")
    elif last < first - 0.1 * abs(first):
        text = (
            f"learning: train_loss went {fell}, not below a tenth; train longer while it falls, and "
            f"leave out dropout and augmentation. Some losses end above 0, as that of a VAE does"
        )
        hints.say(trainer, "overfit", text, label="verdict:")
    else:
        text = (
            f"Not learnt: train_loss went {fell}, where it should fall below a tenth. Look at the "
            f"learning rate, whether the targets are those of the inputs, whether the loss takes "
            f"what forward returns (no softmax before a cross entropy), and at warnings above."
        )
        hints.say(trainer, "overfit", text, warn=True)
