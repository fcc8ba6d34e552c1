"""Unfreezes parts of a model while it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightkit import freezing
from lightkit.errors import ConfigError, UsageError, did_you_mean
from lightkit.finetuning import add_group, follow, rates
from lightkit.hooks import Callback

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightkit.freezing import BatchNorms
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
Modules = nn.Module | Iterable[Any]


class BaseFinetuning(Callback):
    """The base of callbacks that freeze parts before training and unfreeze them at epochs.

    Override `freeze_before_training` and `finetune_function`. Groups of parameters that the latter
    adds to an optimizer follow its schedules, and are there again when a run is resumed; a rate
    that it sets is where the schedule goes on from.
    """

    def __init__(self) -> None:
        #: Number of the optimizer and names of the parameters, for each group that was added.
        self._added: list[tuple[int, list[str]]] = []
        self._thawed: list[Tensor] = []

    def freeze_before_training(self, pl_module: TaskModule) -> None:
        """Called before ``configure_optimizers``: freeze here."""
        raise NotImplementedError(f"{type(self).__name__} must define freeze_before_training")

    def finetune_function(self, pl_module: TaskModule, epoch: int, optimizer: Optimizer) -> None:
        """Called at the start of every epoch (from 0) with each optimizer: unfreeze here."""
        raise NotImplementedError(f"{type(self).__name__} must define finetune_function")

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Freezes what shall not learn from the start."""
        if stage == "fit":
            self._added, self._thawed = [], []
            self.freeze_before_training(task)

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Unfreezes what is due, and notes which groups came."""
        for number, optimizer in enumerate(trainer.optimizers):
            before = rates(optimizer)
            self.finetune_function(task, trainer.current_epoch, optimizer)
            follow(optimizer, before, [entry.scheduler for entry in trainer.lr_schedulers])
            new = optimizer.param_groups[len(before) :]
            names = {id(p): name for name, p in task.named_parameters()} if new else {}
            for group in new:  # what is not the task's own is in no checkpoint
                held = [names[id(p)] for p in group["params"] if id(p) in names]
                self._added.append((number, held))

    def on_load_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the groups that the optimizers had; their states and rates are loaded after that.

        Raises:
            UsageError: The model is sharded.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        named = dict(task.named_parameters())
        if state.get("added") and trainer.strategy.sharded:
            raise UsageError(
                f"{type(self).__name__}: parameters joined the optimizer of this run, and with a "
                f"sharded model it cannot be resumed from there. Start from its weights "
                f"(task.load_weights), or give the optimizer all parameters from the start."
            )
        for number, names in state.get("added", ()):
            optimizer = trainer.optimizers[number]
            before = rates(optimizer)
            members = [named[name] for name in names if name in named]
            # As they were when they joined: what runs fused is decided by that.
            self._thawed += [p.requires_grad_() for p in members if not p.requires_grad]
            add_group(optimizer, members, times=1.0)
            follow(optimizer, before, [entry.scheduler for entry in trainer.lr_schedulers])

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Freezes again what joined in the run that is resumed; the run itself says what learns."""
        while self._thawed:
            self._thawed.pop().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns which groups were added."""
        return {"added": [[number, names] for number, names in self._added]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._added = [(int(number), list(names)) for number, names in state_dict["added"]]

    # --- for subclasses --------------------------------------------------------------------------

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Returns a module, or all of a list and of lists in it, with the modules below them.

        Of modules that have children only those with parameters of their own are there.
        """
        if not isinstance(modules, nn.Module):
            return [one for part in modules for one in BaseFinetuning.flatten_modules(part)]
        found = modules.modules()
        return [m for m in found if not any(m.children()) or any(m.parameters(recurse=False))]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Iterator[nn.Parameter]:
        """Yields the parameters that learn (or do not), without those of batch norms if asked."""
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not any(norm is module for norm in freezing.norms(module)):
                own = module.parameters(recurse=False)
                yield from (p for p in own if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Lets parameters learn; see `lightkit.unfreeze`."""
        for module in _listed(modules):
            freezing.unfreeze(module)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freezes modules; without ``train_bn`` their batch norms too, which stay in eval mode."""
        for module in _listed(modules):
            freezing.freeze(module, bn="train" if train_bn else "eval")

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freezes a module with its batch norms."""
        freezing.freeze(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Any]) -> list[Any]:
        """Returns the parameters that an optimizer does not hold yet."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in params if id(p) not in held]

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreezes modules and adds the parameters that the optimizer lacks as one group.

        Args:
            modules: A module or a list.
            optimizer: Who gets the group.
            lr: The rate of the group; None for that of the first group, divided by the next.
            initial_denom_lr: See ``lr``.
            train_bn: Whether batch norms learn; without it they stay frozen and in eval mode.
        """
        BaseFinetuning.make_trainable(modules)
        for module in _listed(modules) if not train_bn else ():
            for norm in freezing.norms(module):
                freezing.freeze(norm)
        learning = BaseFinetuning.filter_params(modules, train_bn=train_bn)
        new = BaseFinetuning.filter_on_optimizer(optimizer, learning)
        if new:
            add_group(optimizer, new, times=1 / initial_denom_lr, lr=lr)


class BackboneFinetuning(BaseFinetuning):
    """Freezes ``task.backbone`` and lets it learn from an epoch on, at a rate that rises.

    From its epoch on the backbone is a group of the optimizer (of several the first one). At the start of each epoch after
    that its rate is multiplied by ``lambda_func(epoch + 1)``, until it reaches that of the first
    group. Batch norms of the backbone learn from the start. An optimizer that holds the backbone
    already keeps its rate, and a warning says so.

    Args:
        unfreeze_backbone_at_epoch: From which epoch (counted from 0) it learns.
        lambda_func: The factor by which the rate grows; by default 2.0 in every epoch.
        backbone_initial_ratio_lr: The rate that it begins with, over that of the first group.
        backbone_initial_lr: The same as a number; it takes the place of the ratio.
        should_align: Whether the rate ends at that of the first group.
        initial_denom_lr: Accepted and needless: the rate that it begins with is always known.
        train_bn: Whether batch norms learn when the backbone does.
        verbose: Whether the rates are told.
        rounding: Digits behind the point in what is told.

    Raises:
        ConfigError: The epoch is none, or ``lambda_func`` no function.
        UsageError: In ``fit``, where the task has no module ``backbone``.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = lambda epoch: 2.0,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        given = unfreeze_backbone_at_epoch, lambda_func
        if type(given[0]) is not int or given[0] < 0 or not callable(lambda_func):
            raise ConfigError(f"BackboneFinetuning{given}: an epoch from 0 on, then a function.")
        self.unfreeze_backbone_at_epoch, self.lambda_func = unfreeze_backbone_at_epoch, lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr, self.should_align = backbone_initial_lr, should_align
        self.initial_denom_lr, self.train_bn = initial_denom_lr, train_bn
        self.verbose, self.rounding = verbose, rounding
        self.previous_backbone_lr: float | None = None

    def freeze_before_training(self, pl_module: TaskModule) -> None:
        """Freezes the backbone."""
        self.previous_backbone_lr = None
        self.freeze(_backbone(pl_module))

    def finetune_function(self, pl_module: TaskModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreezes the backbone, or lets its rate grow."""
        rate = float(optimizer.param_groups[0]["lr"])
        others = optimizer is not pl_module.trainer.optimizers[0]
        if epoch < self.unfreeze_backbone_at_epoch or others:
            return
        if self.previous_backbone_lr is None:
            given = self.backbone_initial_lr
            own = rate * self.backbone_initial_ratio_lr if given is None else given
            backbone, count = _backbone(pl_module), len(optimizer.param_groups)
            self.unfreeze_and_add_param_group(backbone, optimizer, own, train_bn=self.train_bn)
            if len(optimizer.param_groups) == count:
                own = rate
                _log.warning(
                    "The optimizer holds the backbone from the start, so its rate there stays. For a "
                    "rate of its own leave out parameters without requires_grad."
                )
        elif not self._added:
            return
        else:
            own = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            own = min(own, rate) if self.should_align else own
            optimizer.param_groups[-1]["lr"] = own
        self.previous_backbone_lr = own
        if self.verbose:
            rates = round(rate, self.rounding), round(own, self.rounding)
            _log.info("lr of the first group: %s, of the backbone: %s", *rates)

    def state_dict(self) -> dict[str, Any]:
        """Returns which groups were added, and the rate."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]


class Unfreeze(BaseFinetuning):
    """Unfreezes parts of the task one after another: ``Unfreeze({1: "net.layer4", 3: "net"})``.

    Everything that is named is frozen when the fit begins, and learns from its epoch on (gradual
    unfreezing; Howard and Ruder, 2018). What the optimizer does not hold by then becomes a group of
    it, with ``lr`` of the optimizer's first group, divided by ``decay`` once for the first name,
    twice for the second, and so on; it follows the optimizer's schedules.

    Args:
        schedule: Names of modules of the task, one or a list, by the epoch (counted from 0) from
            which they learn.
        decay: See above; 1 for equal rates.
        bn: What batch norms of the frozen parts do meanwhile; see `lightkit.freeze`.

    Raises:
        ConfigError: For epochs or names that are none.
    """

    def __init__(
        self,
        schedule: Mapping[int, str | Sequence[str]],
        *,
        decay: float = 2.6,
        bn: BatchNorms = "eval",
    ) -> None:
        super().__init__()
        pairs: Iterable[Any] = schedule.items() if isinstance(schedule, Mapping) else ()
        lists = {epoch: list(n) if isinstance(n, (list, tuple)) else [n] for epoch, n in pairs}
        names = [name for listed in lists.values() for name in listed]
        whole = all(type(epoch) is int and epoch >= 0 for epoch in lists)
        whole = whole and isinstance(decay, (int, float)) and decay > 0
        if not (names and whole and all(isinstance(n, str) and n for n in names)):
            raise ConfigError(
                f"Unfreeze({schedule!r}, decay={decay!r}): it takes a dict of epochs (from 0 on) and "
                f"names of modules, such as {{1: 'net.layer4', 3: ['net.layer3', 'net.layer2']}}, "
                f"and a decay above 0."
            )
        self.schedule, self.decay, self.bn = lists, decay, bn
        self._due = [(name, epoch) for epoch in sorted(lists) for name in lists[epoch]]
        self._done = 0

    def freeze_before_training(self, pl_module: TaskModule) -> None:
        """Freezes all that is named."""
        self._done = 0
        for name, _ in self._due:
            freezing.freeze(_module(pl_module, name), bn=self.bn)

    def on_train_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Says for what the fit is too short."""
        late = [name for name, epoch in self._due if 0 <= trainer.max_epochs <= epoch]
        if late:
            names = ", ".join(late)
            _log.warning("max_epochs=%d ends before %s is unfrozen", trainer.max_epochs, names)

    def finetune_function(self, pl_module: TaskModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreezes what is due."""
        groups = [group for o in pl_module.trainer.optimizers for group in o.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        for depth, (name, begins) in enumerate(self._due, start=1):
            if begins > epoch or depth <= self._done:
                continue
            self._done = depth
            module = _module(pl_module, name)
            freezing.unfreeze(module)
            new = [p for p in module.parameters() if id(p) not in held]
            held.update(map(id, new))
            if new:
                add_group(optimizer, new, times=self.decay**-depth, name=name)
            _log.info("epoch %d: %s learns from here on", epoch + 1, name)

    def state_dict(self) -> dict[str, Any]:
        """Returns which groups were added, and how many names were unfrozen."""
        return {**super().state_dict(), "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._done = state_dict["done"]


def _listed(modules: Modules) -> list[nn.Module]:
    """Returns a module as a list, and lists within lists as one."""
    if isinstance(modules, nn.Module):
        return [modules]
    return [one for part in modules for one in _listed(part)]


def _module(task: TaskModule, name: str) -> nn.Module:
    """Returns a module of the task by its name."""
    modules: dict[str, nn.Module] = dict(task.named_modules())
    if name not in modules:
        below = [known for known in modules if known.endswith(f".{name}")]
        hint = f" Did you mean {below[0]!r}?" if below else did_you_mean(name, modules)
        raise ConfigError(f"Unfreeze: {type(task).__name__} has no module {name!r}.{hint}")
    return modules[name]


def _backbone(task: TaskModule) -> nn.Module:
    backbone = getattr(task, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UsageError(
            f"BackboneFinetuning: {type(task).__name__} has no module `backbone`. Name it so, or "
            f"use Unfreeze({{10: 'name.of.the.module'}})."
        )
    return backbone
