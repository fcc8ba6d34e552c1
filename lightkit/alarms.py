"""Alarms: what will not learn, seen in the first steps of a fit; and what `overfit_batches` showed.

Everything is looked at in the first step. What is suspicious there is looked at in the next ones too
before it is told, since healthy networks begin with zeros (a last layer, LoRA, a warm-up of rates), and
for longer where parts are seen to take turns (heads, experts). The listeners go when all is known.
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

#: Optimizer steps after which a suspicion is told, or else, where parts take turns; less tell nothing.
STEPS, _TURNS, _LEAST = 10, 100, 3
_NAMES = ("no-gradient", "zero-gradient", "no-change", "eval-mode", "high-loss", "probabilities")
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
            self._watch.decide(over=True)
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
        #: Those in train mode before the first batch, later those of them that no batch left so.
        self._modes: dict[str, nn.Module] | None = None
        self._loss: tuple[Tensor, int] | None = None
        #: What a loss takes that was taken before it, and what it cannot fall below for that.
        self._twice: tuple[str, float] | None = None
        self._stepped: set[int] = set()  # the optimizers that took steps
        self._open = True  # whether values are to be looked at, not only which gradients there are
        self._with: set[str] = set()
        self._without: set[str] = set()
        #: For each parameter its size, the place of its largest gradient, the value there before the
        #: step, and that gradient.
        self._looks: dict[str, tuple[Tensor, int, Tensor, Tensor, Tensor]] = {}
        #: For each parameter the largest gradient in the steps so far, the smallest of those of each
        #: step, whether such an element ever changed, and in how many steps it was looked at.
        self._found: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}
        before = "on_after_backward" if run.automatic else "on_before_optimizer_step"
        self._hooks: dict[str, Any] = {
            "on_train_batch_start": self._begin,
            "on_loss": self._take_loss,
            before: self._take_gradients,
            "on_train_batch_end": self._end,
        }
        for name, hook in self._hooks.items():
            now = getattr(run.hooks, name)
            # The user's hooks may make gradients, or take some away for a while: looked at twice.
            first = (hook,) if name == before and now else ()
            setattr(run.hooks, name, (*first, *now, hook))

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
        if self._steps:
            return
        if (classes := _classes(loss)) is not None and self._loss is None:
            self._loss = loss.detach(), classes
        self._twice = self._twice or _twice(loss, classes)

    def _take_gradients(self, optimizer: Any = None) -> None:
        """Notes the gradients that there are, and what they should change."""
        optimizers = self._run.plan.optimizers if optimizer is None else [optimizer]
        self._stepped.update(map(id, optimizers))
        for group in (group for one in optimizers for group in one.param_groups):
            rests = group.get("lr") == 0  # host sync where the rate is a tensor on a device
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
                    if name in self._looks:  # before the step: it may differentiate several times
                        _, _, at, value, most = self._looks[name]
                        size = torch.maximum(size, most)
                    else:
                        value = _at(parameter, at)
                    self._looks[name] = (parameter, parameter.numel(), at, value, size)

    def _end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at what the step has changed."""
        self._modes = {n: m for n, m in (self._modes or {}).items() if not m.training}
        if self._step == self._run.state.global_step or not self._hooks:
            return
        self._step = self._run.state.global_step
        self._steps += 1
        for name, (parameter, count, index, value, size) in self._looks.items():
            if parameter.device != index.device or parameter.numel() != count:
                continue  # moved away or taken apart meanwhile
            least, changed, looks = size, _at(parameter, index) != value, 0
            if name in self._found:
                most, low, ever, looks = self._found[name]
                size, least = torch.maximum(size, most), torch.minimum(least, low)
                changed = changed | ever
            self._found[name] = size, least, changed, looks + 1
        self._looks = {}
        if self._steps in (1, STEPS, _TURNS):
            self.decide()

    def decide(self, *, over: bool = False) -> None:
        """Tells what is certain, and leaves unless something has to be seen again.

        Args:
            over: Whether there is nothing more to see.
        """
        if not self._hooks or not self._steps:
            self.leave()
            return
        if self._twice is not None:
            self._say_twice(*self._twice)
            self._twice = None
        sizes: dict[str, float] = {}
        without, zeros, still = self._without - self._with, set[str](), False
        if getattr(self._run.strategy, "find_unused_parameters", False):
            without = set()
        turns = bool(self._without & self._with)
        if self._open:
            sizes, least, moved = self._read_values()
            zeros = _zeros(sizes)
            looked = any(sizes.values()) or (not sizes and self._with and self._at_rest())
            still = bool(looked) and not any(moved) and not self._excused()
            turns = turns or any(sizes[n] and not low for n, low in least.items())
            seen = bool(sizes) and len(self._stepped) == len(self._run.plan.optimizers)
            self._open = bool(zeros or still or not seen)
        more = self._open or without or self._modes
        if more and not over and self._steps < (_TURNS if turns else STEPS):
            return
        if self._steps >= _LEAST:
            self._say_modes()
            if not turns or self._steps >= _TURNS:
                self._say_without(sorted(without))
                self._say_zeros(zeros, len(set(map(_owner, sizes))))
            if still:
                self._say_still(sizes)
        self.leave()

    def _read_values(self) -> tuple[dict[str, float], dict[str, float], list[float]]:
        """Returns of each parameter the largest and the smallest gradient, and whether it changed."""
        found = list(self._found.values())
        loss, classes = self._loss or (0.0, 1)
        # Host sync: after the first step, and twice more at most where that showed something.
        values = read([loss, *(value for looks in found for value in looks[:3])])
        if self._loss is not None and values[0] > 3 * math.log(classes):
            self._say_loss(values[0], classes)
        self._loss = None
        most, least = (dict(zip(self._found, values[i::3], strict=True)) for i in (1, 2))
        return most, least, values[3::3]

    def _excused(self) -> bool:
        """Tells whether weights may rest: rates that are to rise, or a scale that is still sought."""
        for one in self._run.plan.optimizers:
            for group in one.param_groups:
                meant = [
                    group.get("max_lr"),
                    group.get("initial_lr"),
                    getattr(one, "defaults", {}).get("lr"),
                ]
                if any(rate and float(group["lr"]) < float(rate) / 2 for rate in meant):
                    return True
        return self._run.scaled

    def _at_rest(self) -> bool:
        """Tells whether all rates are 0."""
        optimizers = self._run.plan.optimizers
        rates = [group.get("lr") for one in optimizers for group in one.param_groups]
        return all(rate is not None and float(rate) == 0 for rate in rates)

    def _say_modes(self) -> None:
        groups = [group for one in self._run.plan.optimizers for group in one.param_groups]
        trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        left = self._modes or {}
        tops = [
            name or type(module).__name__
            for name, module in left.items()
            if (not name or name.rpartition(".")[0] not in left)
            and not isinstance(module, nn.modules.batchnorm._BatchNorm)
            and any(id(p) in trained for p in module.parameters())
        ]
        if tops:
            self._warn(
                "eval-mode",
                f"training_step left modules in eval mode, {self._when()}, that were in train mode: "
                f"{some(tops)}. So they train without dropout, and their batch norms keep their "
                f"means. Call train() on them before the step returns, or, if that is meant, "
                f"eval() before the fit.",
            )

    def _say_loss(self, loss: float, classes: int) -> None:
        text = (
            f"the first loss is {loss:.3g}, and guessing among {classes} classes gives "
            f"{math.log(classes):.3g}; look at the scale of the inputs and of the last layer's "
            f"weights"
        )
        hints.say(self._trainer, "high-loss", text)

    def _say_twice(self, function: str, least: float) -> None:
        bound = f"cannot fall below {least:.3g}" if least else "falls slowly"
        self._warn(
            "probabilities",
            f"The loss takes the {function} itself, and what it is given went through a {function} "
            f"already: so it {bound}. Give it what comes before, the logits, and take the {function} "
            f"where probabilities are needed, as in predict_step.",
        )

    def _say_without(self, names: list[str]) -> None:
        if names:
            total = len(self._with | self._without)
            self._warn(
                "no-gradient",
                f"{len(names)} of {total} trainable parameters got no gradient {self._when()}: "
                f"{some(names)}. The loss did not depend on them: look for layers that forward does "
                f"not call, for detach() and torch.no_grad(), or set requires_grad_(False) on them.",
            )

    def _say_zeros(self, zeros: set[str], total: int) -> None:
        rare = {_owner(name) for name, looks in self._found.items() if looks[3] < _LEAST}
        if modules := sorted(zeros - rare):
            self._warn(
                "zero-gradient",
                f"The gradients of {len(modules)} of {total} modules were zero {self._when()}: "
                f"{some(modules)}. They did not learn: look for activations that are all cut off "
                f"(relu, clamp, a saturated softmax), or a factor of 0.",
            )

    def _say_still(self, sizes: dict[str, float]) -> None:
        if not sizes:
            self._warn(
                "no-change",
                f"Nothing changed {self._when()}: the learning rate is 0, and so is the one that the "
                f"optimizer was made with. Give it one above 0.",
            )
            return
        groups = [group for one in self._run.plan.optimizers for group in one.param_groups]
        rates = sorted(
            {f"{float(group['lr']):.3g}" for group in groups if group.get("lr") is not None}
        )
        kinds = sorted({str(p.dtype).removeprefix("torch.") for g in groups for p in g["params"]})
        self._warn(
            "no-change",
            f"Nothing changed {self._when()}: in none of {len(sizes)} parameters the element with "
            f"the largest gradient, of up to {max(sizes.values(), key=_or_nan):.3g}, at a learning rate of "
            f"{some(rates) or 'its own'}. Look for an optimizer_step that does not step, for hooks "
            f"that put weights back or take gradients away, and whether the rate is too small for "
            f"{some(kinds)}.",
        )

    def _when(self) -> str:
        return f"in the first {self._steps} steps"

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


def _zeros(sizes: dict[str, float]) -> set[str]:
    """Returns the modules of which all parameters have gradients of zero.

    A bias alone is none: before a batch norm its gradient is zero by rights.
    """
    largest: dict[str, float] = {}
    for name, size in sizes.items():
        largest[_owner(name)] = max(largest.get(_owner(name), 0.0), abs(size), key=_or_nan)
    return {name for name, size in largest.items() if size == 0}


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
    scores = _through(before)
    if scores is not None and scores.name().startswith("LogSoftmax"):
        scores = _through(scores.next_functions[0][0])
        if scores is not None and scores.name().startswith(("Mul", "Div")):
            return None  # with a temperature, as that of cosines: sure of itself on purpose
    shape = before._input_metadata[number].shape
    return shape[1] if len(shape) > 1 and shape[1] > 1 else None


def _twice(loss: Tensor, classes: int | None) -> tuple[str, float] | None:
    """Returns what a cross entropy takes of probabilities; the least that it can be, 0 if unknown."""
    node = _through(loss.grad_fn)
    if node is not None and node.name().startswith("BinaryCrossEntropyWithLogits"):
        even = node._saved_reduction == 1 and node._saved_weight is node._saved_pos_weight is None
        found = "sigmoid", math.log1p(math.exp(-1)) if even else 0.0, True
    elif classes is not None:  # a mean, as `_classes` has seen
        node = _through(node.next_functions[0][0])
        found = "softmax", math.log(math.e + classes - 1) - 1, node.name().startswith("LogSoftmax")
    else:
        return None
    before = _through(node.next_functions[0][0])
    given = before is not None and before.name().lower().startswith(found[0])
    return found[:2] if given and found[2] else None


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
    if (first > 0 and last <= 0.1 * first) or last == 0 or right:
        also = "".join(f", {name} {value:.3g}" for name, value in right.items())
        text = f"learnt: train_loss went {fell}{also}"
        hints.say(trainer, "overfit", text, label="verdict:")
    elif last < first - 0.1 * abs(first):
        goal = ", not below a tenth" if first > 0 else ""  # of what begins below 0 nobody knows
        text = (
            f"learning: train_loss went {fell}{goal}; train longer while it falls, and leave out "
            f"dropout and augmentation. Some losses do not end at 0, as that of a VAE"
        )
        hints.say(trainer, "overfit", text, label="verdict:")
    else:
        text = (
            f"Not learnt: train_loss went {fell}, where it should fall below a tenth. Look at the "
            f"learning rate, whether the targets are those of the inputs, whether the loss takes "
            f"what forward returns (no softmax before a cross entropy), and at warnings above."
        )
        hints.say(trainer, "overfit", text, warn=True)
