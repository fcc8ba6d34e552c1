"""Averages of the weights while a fit runs: EMA and SWA, by ``torch.optim.swa_utils``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR, get_ema_multi_avg_fn

from lightkit import rng
from lightkit.averages import Averages
from lightkit.data import BatchStream, generators
from lightkit.errors import ConfigError, one_of
from lightkit.freezing import modes_kept, switches
from lightkit.hooks import Callback
from lightkit.run import FitRun
from lightkit.schedules import SchedulerEntry

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")


class WeightAveraging(Callback):
    """Keeps an average of the weights beside those that are trained; see `EMA` and `SWA`.

    From the first average on:

    - **Validations of the fit see the averaged weights.** They are put into the same parameters and
      the weights of the training come back afterwards, also after an exception. So what a
      ModelCheckpoint or an EarlyStopping monitors is about the averages.
    - **The "model" of every checkpoint is the average**, so ``load_weights``, ``test`` and an export
      take it without this callback. The weights of the training are beside it in the same file, and
      a run that is resumed goes on with them, exactly.
    - **When the fit has ended, the task has the averages.** After an exception or a signal it has
      the weights of the training.

    With several ranks each keeps the same average by itself, without communication; of a sharded
    model each keeps that of its part. The memory is that of the weights once more.

    To average at moments of your own, subclass it and override `should_update`; to average in
    another way, give ``avg_fn`` or ``multi_avg_fn``.

    Args:
        use_buffers: Average the floating-point buffers too, such as running means of batch norms.
            False leaves all buffers to the network itself. Buffers that hold infinities or nan when
            the average begins, as masks do, are left alone either way.
        device: Where the averages are kept; None: where the weights are. Elsewhere each update
            waits for the copies.
        avg_fn: As for ``torch.optim.swa_utils.AveragedModel``: gets an average, the weight and the
            number of averaged models, and returns the new average. None: the plain mean.
        multi_avg_fn: Likewise, with lists that it changes in place.

    Attributes:
        updates: How many times weights were averaged in.

    Raises:
        ConfigError: When a fit begins with two of them.
    """

    # Behind what listens for the user and before the checkpoints: all of them see the averages at the
    # end of a validation, and what these save is put together when the weights are back.
    order = 35
    updates: int
    _loaded: dict[str, Tensor]
    _averages: Averages | None

    def __init__(
        self,
        *,
        use_buffers: bool = False,
        device: torch.device | str | None = None,
        avg_fn: Callable[..., Any] | None = None,
        multi_avg_fn: Callable[..., Any] | None = None,
    ) -> None:
        self.use_buffers = use_buffers
        self.device = None if device is None else torch.device(device)
        self._how = {"avg_fn": avg_fn, "multi_avg_fn": multi_avg_fn}
        self._forget()

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Tells whether to average now: after every optimizer step, unless it is overridden.

        Called after each step with its number, and after the batches of each complete epoch with
        its number, before the validation. Both count from 0.

        Args:
            step_idx: The step that was taken; None at the end of an epoch.
            epoch_idx: The epoch that was trained; None after a step.
        """
        return step_idx is not None

    # --- when ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Begins anew with each fit; a checkpoint that is resumed is loaded after this."""
        if stage != "fit":
            return
        self._forget()
        if sum(isinstance(callback, WeightAveraging) for callback in trainer.callbacks) > 1:
            raise ConfigError(
                "Two callbacks average the weights, but a checkpoint has one model. Use one of EMA "
                "and SWA, or fit twice."
            )

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Notes the step at which the fit begins; takes back the averages of a checkpoint."""
        self._step = trainer.global_step
        loaded, self._loaded = self._loaded, {}
        if loaded:
            self._averages = self._begin(task)
            self._averages.load(loaded, self.updates)

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages after an optimizer step."""
        step = trainer.global_step
        if step != self._step:  # with accumulation several batches end at one step
            self._step = step
            if self.should_update(step_idx=step - 1):
                self._update(task)

    def on_validation_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Puts the averages into the network, once there are some."""
        run = trainer._run
        if not isinstance(run, FitRun) or trainer.sanity_checking:
            return
        if run.cadence.unit == "epoch" or run.state.batch_idx == run.train_length:
            self._end_epoch(trainer, task)
        if self._averages is not None:
            self._show(trainer, task)

    def on_validation_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Puts the weights of the training back."""
        self._hide()

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Averages after a complete epoch, where no validation came before."""
        if not trainer.run_ending:
            self._end_epoch(trainer, task)

    def on_train_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Leaves the averages in the task."""
        if self._averages is not None:
            self._show(trainer, task)
            _log.info("the task has the mean of its weights now, of %d updates", self.updates)
        else:
            _log.warning("%s averaged nothing: the fit ended before that", type(self).__name__)

    def on_exception(self, trainer: Trainer, task: TaskModule, exception: BaseException) -> None:
        """Puts the weights of the training back."""
        self._hide()

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Gives the memory back."""
        if stage == "fit":
            updates = self.updates
            self._forget()
            self.updates = updates

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts; the weights are added when the checkpoint is complete."""
        return {"updates": self.updates, "epoch": self._epoch} if self._averages else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the counts back."""
        self.updates, self._epoch = state_dict["updates"], state_dict["epoch"]

    def on_save_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes the averages the model of the checkpoint, and keeps the trained weights beside."""
        if self._averages is None:
            return
        trained = self._averages.put_into(checkpoint["model"])
        if "callbacks" in checkpoint:  # else it holds weights only
            checkpoint["callbacks"][self.state_key]["trained"] = trained

    def on_load_checkpoint(
        self, trainer: Trainer, task: TaskModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets the run go on with the weights of the training."""
        trained = checkpoint["callbacks"].get(self.state_key, {}).get("trained", {})
        self._loaded = {name: checkpoint["model"][name] for name in trained}
        checkpoint["model"].update(trained)

    # --- how -------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Sets what belongs to one fit."""
        self.updates = 0
        self._step, self._epoch = 0, -1  # the last that were looked at
        self._loaded, self._averages = {}, None

    def _begin(self, task: nn.Module) -> Averages:
        """Makes the averages: by now every parameter has its place and its size."""
        return Averages(self._averaged(task), self._beside(task), self.device, self._how)

    def _averaged(self, task: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
        """Yields names and tensors that are averaged, and whether each is a buffer."""
        for name, parameter in task.named_parameters(remove_duplicate=False):
            yield name, parameter, False
        for name, buffer in task.named_buffers(remove_duplicate=False) if self.use_buffers else ():
            # Host sync, once per fit: a mean with an infinity in it would be nan.
            if buffer.is_floating_point() and bool(buffer.isfinite().all()):
                yield name, buffer, True

    def _beside(self, task: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yields what belongs to the averages and is found in another way."""
        yield from ()

    def _update(self, task: nn.Module) -> None:
        """Averages the weights of now in."""
        if self._averages is None:
            self._averages = self._begin(task)
        self._averages.update()
        self.updates = self._averages.updates

    def _end_epoch(self, trainer: Trainer, task: TaskModule) -> None:
        """Averages after the batches of an epoch, once."""
        if self._epoch != trainer.current_epoch:
            self.on_train_batch_end(trainer, task, None, None, 0)  # of a group that was torn
            self._epoch = trainer.current_epoch
            if self.should_update(epoch_idx=self._epoch):
                self._update(task)

    def _show(self, trainer: Trainer, task: TaskModule) -> None:
        """Puts the averages into the network."""
        assert self._averages is not None
        self._averages.exchange()
        if self.use_buffers:
            trainer.strategy.before_evaluation(task)  # over ranks a collective: buffers

    def _hide(self) -> None:
        """Puts the weights of the training back, where the averages are shown."""
        if self._averages is not None and self._averages.shown:
            self._averages.exchange()


class EMA(WeightAveraging):
    """An exponential moving average of the weights; see `WeightAveraging` for what it is used for.

    After each update ``average = decay * average + (1 - decay) * weight``; the first one copies.
    The arithmetic is that of ``torch.optim.swa_utils.get_ema_multi_avg_fn``, in a few kernels for
    all weights and without a host sync.

    Args:
        decay: From 0 to 1; how much of the average stays at an update.
        update_every_n_steps: Averages after every so many optimizer steps.
        update_starting_at_step: Optimizer steps before the first update.
        use_buffers, device: See `WeightAveraging`.

    Raises:
        ConfigError: For arguments out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        update_every_n_steps: int = 1,
        update_starting_at_step: int = 0,
        use_buffers: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ConfigError(f"EMA(decay={decay!r}): it is from 0 to 1, such as 0.999.")
        for name, value, least in (
            ("update_every_n_steps", update_every_n_steps, 1),
            ("update_starting_at_step", update_starting_at_step, 0),
        ):
            if type(value) is not int or value < least:
                raise ConfigError(f"EMA({name}={value!r}): it is a number of steps, from {least}.")
        self.decay, self.update_every_n_steps = decay, update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        super().__init__(use_buffers=use_buffers, device=device)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Tells whether this is one of the steps; see `WeightAveraging.should_update`."""
        done = 0 if step_idx is None else step_idx + 1 - self.update_starting_at_step
        return done > 0 and done % self.update_every_n_steps == 0

    def _begin(self, task: nn.Module) -> Averages:
        # Made here: torch's function cannot be pickled, and the callback shall be.
        how = {"multi_avg_fn": get_ema_multi_avg_fn(self.decay)}  # type: ignore[no-untyped-call]
        return Averages(self._averaged(task), self._beside(task), self.device, how)


class SWA(WeightAveraging):
    """The mean of the weights at the ends of the last epochs: Stochastic Weight Averaging.

    After Izmailov and others, "Averaging Weights Leads to Wider Optima and Better Generalization",
    2018. From the start epoch on, the learning rate follows ``torch.optim.swa_utils.SWALR`` instead
    of the task's own schedules, which rest. After the batches of each such epoch the weights are
    averaged in, then the validation sees the mean. See `WeightAveraging` for the rest.

    Running means of batch norms belong to weights, so those of the mean have to be found by a pass
    over the training data (``torch.optim.swa_utils.update_bn``: forward only, in train mode). It
    is made for each new mean, before its validation or at the end of its epoch, and for networks
    with batch norms alone. Those that are in eval mode while the task trains keep their means.
    Random states are put back after it. With several ranks each takes its share of the data.
    In manual optimization the task moves its schedules itself: it has to let them rest.

    Args:
        swa_lrs: The learning rate at the end of the annealing: a number, or one for each group of
            every optimizer. None lets the task's own schedules go on.
        swa_epoch_start: The first epoch that is averaged: its number from 0, or a share of
            ``max_epochs`` (0.8: the last fifth).
        annealing_epochs: Epochs until ``swa_lrs`` is reached.
        annealing_strategy: "cos" or "linear".
        avg_fn, device: See `WeightAveraging`.
        update_bn: Whether to make the passes for batch norms.

    Raises:
        ConfigError: For arguments out of range; when a fit begins, where ``max_epochs`` or a
            ``forward(x)`` is missing, and for rates that are not one for each group.
    """

    def __init__(
        self,
        swa_lrs: float | Sequence[float] | None,
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        *,
        update_bn: bool = True,
    ) -> None:
        rates = swa_lrs if isinstance(swa_lrs, Sequence) else () if swa_lrs is None else (swa_lrs,)
        if any(not isinstance(rate, (int, float)) or not rate > 0 for rate in rates):
            raise ConfigError(f"SWA(swa_lrs={swa_lrs!r}): a rate above 0, one per group, or None.")
        most = 1 if isinstance(swa_epoch_start, float) else swa_epoch_start
        if type(swa_epoch_start) not in (int, float) or not 0 <= swa_epoch_start <= most:
            raise ConfigError(
                f"SWA(swa_epoch_start={swa_epoch_start!r}): the number of an epoch (an int from 0), "
                f"or a share of max_epochs (a float from 0 to 1)."
            )
        if type(annealing_epochs) is not int or annealing_epochs < 0:
            raise ConfigError(f"SWA(annealing_epochs={annealing_epochs!r}): a number from 0.")
        one_of("SWA: annealing_strategy", annealing_strategy, ("cos", "linear"))
        self.swa_lrs, self.swa_epoch_start = swa_lrs, swa_epoch_start
        self.annealing = {"anneal_epochs": annealing_epochs, "anneal_strategy": annealing_strategy}
        self.update_bn = update_bn
        super().__init__(device=device, avg_fn=avg_fn)

    def _forget(self) -> None:
        super()._forget()
        self._start = 0
        self._schedules: list[SWALR] = []
        self._saved_schedules: list[dict[str, Any]] = []
        self._stale = False  # whether the batch norms are those of an earlier mean

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Tells whether this is the end of one of the last epochs; what has begun goes on."""
        return epoch_idx is not None and (epoch_idx >= self._start or self.updates > 0)

    def _update(self, task: nn.Module) -> None:
        super()._update(task)
        self._stale = any(True for _ in self._beside(task))

    # --- the learning rate -----------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Finds the epoch to begin with; goes on where a checkpoint left."""
        start = self.swa_epoch_start
        if isinstance(start, float) and trainer.max_epochs < 0:
            raise ConfigError(
                f"SWA(swa_epoch_start={start}) is a share of max_epochs, but this run has none. Give "
                f"the number of an epoch, or set max_epochs."
            )
        self._start = int(trainer.max_epochs * start) if isinstance(start, float) else start
        if any(True for _ in self._beside(task)):
            sharded = trainer.strategy.sharded
            if sharded or not _takes_x(task):
                why = "splits the model" if sharded else "needs a forward(x), of one argument"
                raise ConfigError(
                    f"SWA finds the running means of batch norms by task(x) over the training data, "
                    f"and {type(task).__name__} {why}. SWA(update_bn=False) leaves them as they are."
                )
        super().on_fit_start(trainer, task)
        if self._saved_schedules:
            self._take_over(trainer)
        elif isinstance(self.swa_lrs, Sequence):
            for optimizer in trainer.optimizers:
                if len(self.swa_lrs) != len(optimizer.param_groups):
                    raise ConfigError(
                        f"SWA(swa_lrs={self.swa_lrs!r}): {type(optimizer).__name__} has "
                        f"{len(optimizer.param_groups)} groups. Give as many rates, or one number."
                    )

    def on_train_epoch_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Lets SWALR take the place of the task's schedules at the start epoch."""
        if trainer.current_epoch >= self._start and not self._schedules and self.swa_lrs:
            self._take_over(trainer)
            _log.info("SWA: weights are averaged from epoch %d on", self._start + 1)

    def _take_over(self, trainer: Trainer) -> None:
        """Puts SWALR in the place of what moves the rates, or goes on with it."""
        plan = trainer.session.plan
        assert plan is not None
        saved, self._saved_schedules = self._saved_schedules, []
        for number, optimizer in enumerate(plan.optimizers):
            rates = [group["lr"] for group in optimizer.param_groups]
            # A group may have joined since, with a rate of its own.
            ends = [group["swa_lr"] for group in optimizer.param_groups] if saved else self.swa_lrs
            self._schedules.append(SWALR(optimizer, ends, **self.annealing))  # type: ignore[arg-type]
            # Torch's mark for steps that were taken: those of before this schedule count.
            optimizer._opt_called = True  # type: ignore[attr-defined]
            if saved:
                self._schedules[-1].load_state_dict(saved[number])
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
        plan.step_entries = plan.plateau_entries = ()
        pairs = zip(self._schedules, plan.optimizers, strict=True)
        plan.epoch_entries = tuple(SchedulerEntry(one, optimizer) for one, optimizer in pairs)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and the states of SWALR."""
        schedules = [schedule.state_dict() for schedule in self._schedules]
        own = {"schedules": schedules, "stale": self._stale}
        return {"updates": self.updates, "epoch": self._epoch, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        super().load_state_dict(state_dict)
        self._saved_schedules, self._stale = state_dict["schedules"], state_dict["stale"]

    # --- batch norms -----------------------------------------------------------------------------

    def _beside(self, task: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, module in task.named_modules(remove_duplicate=False) if self.update_bn else ():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                for own, buffer in module.named_buffers(recurse=False):
                    yield f"{name}.{own}" if name else own, buffer

    def on_train_epoch_end(self, trainer: Trainer, task: TaskModule) -> None:
        """Averages, and finishes a mean that no validation saw, so that each save has it whole."""
        super().on_train_epoch_end(trainer, task)
        if self._stale:
            self._show(trainer, task)
            self._hide()

    def _show(self, trainer: Trainer, task: TaskModule) -> None:
        super()._show(trainer, task)
        if self._stale:
            self._find_means(trainer, task)
            self._stale = False

    def _find_means(self, trainer: Trainer, task: TaskModule) -> None:
        """Does what torch's update_bn does to norms that learn. Over ranks a collective at its end."""
        run = trainer._run
        assert isinstance(run, FitRun)
        resting = set(run.resting if run.flow.validating else switches(task)["eval"])
        learning = [module for name, module in task.named_modules() if name not in resting]
        norms = {norm: norm.momentum for norm in learning if isinstance(norm, _BatchNorm)}
        if not norms:
            return
        feed = run.feed.fresh()
        feed.share.even = True  # the mean over ranks is that of all batches
        still = rng.preserved(*generators(run.train_loader))
        try:
            with modes_kept(task), still, run.autocast or nullcontext(), torch.no_grad():
                for module in learning:
                    module.training = True
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the plain mean over batches
                stream = BatchStream(
                    run.train_loader, limit=run.train_limit, feed=feed, name="training loader"
                )
                for batch in stream:
                    given = batch if run.transfer is None else run.transfer(batch, 0)
                    task(given[0] if isinstance(given, (list, tuple)) else given)
                stream.close()
        finally:
            feed.close()
            for norm, momentum in norms.items():
                norm.momentum = momentum
        run.strategy.ranks.average([b for n in norms for b in n.buffers() if b.is_floating_point()])


def _takes_x(task: nn.Module) -> bool:
    """Tells whether a task has a forward that one argument is enough for."""
    try:
        inspect.signature(task.forward).bind(None)
    except TypeError:
        return False
    return type(task).forward is not nn.Module.forward
