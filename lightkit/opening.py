"""Builds a run from what the Trainer was told: device, listeners, loaders, optimizers, hooks.

Everything that can be wrong is found here, before the first batch.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from lightkit import hints
from lightkit.advice import Advice
from lightkit.agreement import Agreement
from lightkit.alarms import Alarms
from lightkit.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightkit.checkpoint import Writer
from lightkit.checks import check_loaders, check_modes, check_parameters
from lightkit.data import sample_counts
from lightkit.distributed import (
    check_nodes,
    join,
    launched,
    make_strategy,
    require_launcher,
    resolve_device,
)
from lightkit.errors import ConfigError, UsageError
from lightkit.feeds import (
    begins_early,
    cadence,
    loader_plans,
    make_transfer,
    open_training,
    reloader,
    renames,
    required_plans,
    train_loader,
)
from lightkit.fused import check_gradients
from lightkit.hooks import Callback, HookTable, positional_arguments
from lightkit.metrics import MetricLog
from lightkit.optim import ManualOptimizer, OptimizerPlan
from lightkit.options import Options, listed
from lightkit.precision import resolve_precision
from lightkit.run import EvalRun, FitRun, LoaderPlan
from lightkit.state import Stage
from lightkit.task import overrides, require_steps

if TYPE_CHECKING:
    from lightkit.session import Session
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
_STEPS = {"validation": "validation_step", "test": "test_step", "predict": "predict_step"}
_PREFIX = {"validation": "val", "test": "test", "predict": None}


# --- what every entry point has ------------------------------------------------------------------


def check_task(task: Any, needs: dict[str, str]) -> None:
    """Raises unless ``task`` is an object that defines the steps that are needed."""
    if isinstance(task, type):
        raise UsageError(f"{task.__name__} is a class. Pass an object of it: {task.__name__}(...).")
    require_steps(task, needs)


def as_datamodule(loader: Any, datamodule: Any) -> tuple[Any, Any]:
    """Takes a data module that was passed in the place of a loader."""
    if datamodule is not None and loader is not None:
        raise UsageError("Pass either loaders or datamodule=, not both.")
    if isinstance(datamodule, type):
        name = datamodule.__name__
        raise UsageError(f"datamodule={name} is a class. Pass an object of it: {name}(...).")
    makes = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
    if loader is not None and any(callable(getattr(loader, name, None)) for name in makes):
        return as_datamodule(None, loader)
    return loader, datamodule


def task_of(trainer: Trainer, stage: str, task: Any, ckpt_path: Any) -> tuple[Any, Any]:
    """Returns the task of an evaluation, and the checkpoint whose weights it is to have."""
    old = trainer.session
    if task is not None:
        return task, ckpt_path
    if old.task is None:
        raise UsageError(f"Pass the task: this trainer has none yet that it could {stage}.")
    saver = trainer.checkpoint_callback  # as in the field: no task named, the best weights
    known = saver is not None and saver.best_model_path and old.callbacks
    return old.task, "best" if ckpt_path is None and known else ckpt_path


def meet(trainer: Trainer, session: Session) -> None:
    """Chooses the device and meets the other processes, before anything is decided for all."""
    options, env = trainer.options, launched()
    require_launcher(env)
    nodes = options.num_nodes
    session.device = resolve_device(
        options.accelerator, options.devices, options.gpus, env=env, num_nodes=nodes or 1
    )
    check_nodes(nodes, env)
    strategy = make_strategy(options.strategy, env, sync_batchnorm=options.sync_batchnorm)
    strategy.begin(session.device, join(env, session.device, strategy.timeout))
    session.strategy = strategy


def equip(trainer: Trainer, session: Session) -> None:
    """Chooses precision and listeners. Nothing of it needs to be closed."""
    options, task = trainer.options, session.task
    precision = resolve_precision(options.precision, session.device)
    session.precision = session.strategy.adapt(precision)
    session.precision.stop_on_nan = options.terminate_on_nan
    session.metrics = MetricLog(
        session.state,
        session.loggers,
        session.history,
        every=options.log_every_n_steps,
        stop_on_nan=options.terminate_on_nan,
        scaled=session.precision.has_scaler,
        results=session.results,
        ranks=session.strategy.ranks,
        share=session.strategy.data_ranks,
    )
    session.metrics.note = session.precision.note
    session.metrics.epoch_time = lambda: time.perf_counter() - session.flow.epoch_started
    if session.device.type != "cpu":  # where the host runs ahead and waits when it reads
        session.metrics.waiting = session.flow.times.waiting
    if options.compile is not False and session.stage is Stage.FIT:
        from lightkit import compiling

        how = compiling.settings(options.compile)
        if how is not None:
            session.compilation = compiling.Compilation(how, task, session.flow, session.device)
    session.callbacks = all_callbacks(trainer, session)
    session.assembled = tuple(session.callbacks)
    listeners = [*session.callbacks, *trainer._handlers, session.metrics, Advice()]
    if session.stage is Stage.FIT:
        listeners.append(Alarms())
    session.hooks = HookTable(trainer, task, listeners, session.flow.times)


def all_callbacks(trainer: Trainer, session: Session) -> list[Callback]:
    """Returns the user's callbacks, the task's and the default ones, in order."""
    options, old = trainer.options, session.callbacks
    needed = listed(session.task.configure_callbacks(), Callback, "configure_callbacks")
    kinds = {type(c) for c in needed}  # the task's replace those of one kind, as in the field
    found = [*(c for c in trainer._callbacks if type(c) not in kinds), *needed]
    fit = session.stage is Stage.FIT

    def add(kind: type[Callback], make: Callable[[], Callback]) -> None:
        if not any(isinstance(c, kind) for c in found):
            found.append(make())

    if not options.enable_checkpointing and any(isinstance(c, ModelCheckpoint) for c in found):
        raise ConfigError(
            "enable_checkpointing=False, but there is a ModelCheckpoint among the callbacks. "
            "Remove one of the two."
        )
    if options.profiler is not None:
        profiler = _profiler(options.profiler)
        add(type(profiler), lambda: profiler)
    if options.enable_progress_bar:
        add(ProgressBar, ProgressBar)
    if fit and options.enable_model_summary:
        add(ModelSummary, ModelSummary)
    if fit and options.enable_checkpointing:
        add(ModelCheckpoint, ModelCheckpoint.default)
    elif not fit:  # what the last fit wrote stays known: trainer.checkpoint_callback, "best"
        found += [c for c in old if isinstance(c, ModelCheckpoint) and c not in found]
    return sorted(found, key=lambda callback: callback.order)


def _profiler(given: str | Callback) -> Callback:
    """Returns the callback that ``Trainer(profiler=given)`` asks for."""
    from lightkit.callbacks import SimpleProfiler, TraceProfiler

    if isinstance(given, Callback):
        return given
    return SimpleProfiler() if given == "simple" else TraceProfiler()


def set_up(session: Session, memory_format: str | None) -> None:
    """Lets data, task and callbacks prepare themselves, and brings the task to its device."""
    assert session.hooks is not None
    assert session.stage is not None
    stage, task, datamodule = str(session.stage.value), session.task, session.datamodule
    task._link.metrics = session.metrics
    ranks = session.strategy.ranks
    for owner in (datamodule, task):
        # Downloads and the like are for one process of each machine.
        if hasattr(owner, "prepare_data") and ranks.env.local_rank == 0:
            owner.prepare_data()
    ranks.wait("prepare_data")
    if hasattr(datamodule, "setup"):
        datamodule.setup(stage)
    for hook in session.hooks.setup:
        hook(stage)
    task.configure_model()
    session.precision.convert_module(task)
    if session.compilation is not None:
        session.compilation.begin()
    session.strategy.setup(task)
    if memory_format is not None:
        session.strategy.to_channels_last(task)


@contextlib.contextmanager
def numerics(options: Options) -> Iterator[None]:
    """Sets torch's switches for one call and puts them back."""
    cudnn: Any = torch.backends.cudnn
    with contextlib.ExitStack() as stack:
        if options.deterministic is not None:
            switch = torch.use_deterministic_algorithms
            mode = torch.are_deterministic_algorithms_enabled()
            warn = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(switch, mode, warn_only=warn)
            switch(bool(options.deterministic), warn_only=options.deterministic == "warn")
        if options.benchmark is not None:
            stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
            cudnn.benchmark = options.benchmark
        if options.detect_anomaly:
            stack.callback(torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled())
            torch.autograd.set_detect_anomaly(True)
        yield


# --- the run of a fit ----------------------------------------------------------------------------


def build_fit(trainer: Trainer, session: Session, train: Any, val: Any) -> FitRun:
    """Returns the run of a fit. The task is on its device, its data and hooks are set up."""
    task, options = session.task, trainer.options
    metrics, hooks = session.metrics, session.hooks
    assert metrics is not None
    assert hooks is not None
    loader, make = train_loader(trainer, session, train)
    feed, limit, length = open_training(trainer, session, loader)
    session.train_length = length
    plans = _validation_plans(trainer, session, val)
    plan = _optimizers(trainer, session)
    optimizer = plan.optimizer if plan.automatic else None
    transfer = make_transfer(session, options.memory_format)
    strategy = session.strategy
    step, validation = _bound(session, plan, plans, transfer)
    run = FitRun(
        task=task,
        state=session.state,
        flow=session.flow,
        limits=trainer.limits,
        cadence=cadence(options, length),
        hooks=hooks,
        callbacks=session.callbacks,
        strategy=strategy,
        sync=strategy.sync_gradients,
        agree=Agreement(session.flow, strategy.ranks) if strategy.world_size > 1 else None,
        precision=session.precision,
        plan=plan,
        metrics=metrics,
        history=session.history,
        device=session.device,
        training_step=step,
        takes_index=positional_arguments(task.training_step, 2) == 2,
        automatic=plan.automatic,
        optimizer=optimizer,
        update=None if optimizer is None else session.precision.bind_update(optimizer),
        differentiate=_differentiate(session),
        scaled=session.precision.has_scaler,
        autocast=session.precision.autocast,
        transfer=transfer,
        zero_grad=_zero_grad(session, optimizer),
        clip=_clip(trainer, session),
        optimizer_step=_optimizer_step(session),
        keeps_batches=overrides(task, "optimizer_step") or plan.needs_closure,
        train_loader=loader,
        feed=feed,
        train_limit=limit,
        train_length=length,
        counts=sample_counts(loader, feed.share),
        reload=reloader(trainer, session, make, val),
        early=begins_early(options, feed),
        validation=validation,
        # A loader that is its own iterator would miss these batches afterwards.
        sanity_batches=0 if any(_gives_once(p.loader) for p in plans) else trainer.sanity_batches,
        datamodule=session.datamodule,
        writer=Writer(),
    )
    _tie(session, run)
    return run


def _with_batch(task: TaskModule, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step to be called with the batch, also where it takes none."""
    return step if positional_arguments(task.training_step, 1) else lambda batch: step()


def _bound(
    session: Session,
    plan: OptimizerPlan,
    plans: list[LoaderPlan],
    transfer: Callable[[Any, int], Any] | None,
) -> tuple[Callable[..., Any], EvalRun | None]:
    """Returns the training step as the loop calls it, compiled or not, and the validation."""
    task, compilation, strategy = session.task, session.compilation, session.strategy
    validation = _eval_run(session, "validation", plans, transfer) if plans else None
    if compilation is None:
        step = strategy.bind_training(task, automatic=plan.automatic)
        return _with_batch(task, step), validation
    compilation.check(automatic=plan.automatic, sharded=strategy.sharded)
    step = strategy.bind_training(task, automatic=plan.automatic, compiled=compilation.compiled)
    if validation is not None:
        validation.step = compilation.eager(validation.step)
    return _with_batch(task, compilation.around(step)), validation


def _tie(session: Session, run: FitRun) -> None:
    """Gives the task what it optimizes with by itself."""
    link, optimizers = run.task._link, run.plan.optimizers
    link.precision, session.precision.optimizers = run.precision, optimizers
    link.after_backward = run.strategy.after_backward(run.task)
    fused = {id(optimizer) for optimizer in run.plan.fused}

    def before_step(optimizer: Optimizer) -> None:
        if id(optimizer) in fused:  # at its first step; code that puts gradients there goes on so
            fused.remove(id(optimizer))
            check_gradients(optimizer)
        _before_manual_step(run, optimizer)

    link.manual = [ManualOptimizer(o, run.precision, before_step) for o in optimizers]


def _validation_plans(trainer: Trainer, session: Session, given: Any) -> list[LoaderPlan]:
    """Returns the loaders to validate on; none, with a word, where the task has no step for them."""
    plans = loader_plans(trainer, session, "validation", given)
    if plans and not overrides(session.task, "validation_step"):
        _log.warning(
            "%s defines no validation_step: the validation loader is not used.",
            type(session.task).__name__,
        )
        plans = []
    session.lengths["validation"] = [p.length for p in plans]
    every, epochs = trainer.options.check_val_every_n_epoch or 1, trainer.limits.max_epochs
    if plans and 0 < epochs < every and not trainer.options.fast_dev_run:
        _log.warning(
            "check_val_every_n_epoch=%d is more than max_epochs=%d: validation never runs.",
            every,
            epochs,
        )
    named = [(p.name or "val", p.loader) for p in plans]
    for name, text in check_loaders(session.given_train, named):
        hints.say(trainer, name, text, warn=True)
    return plans


def _gives_once(loader: Any) -> bool:
    """Tells whether a loader gives its batches only once, as a generator does."""
    return hasattr(type(loader), "__next__")


def _optimizers(trainer: Trainer, session: Session) -> OptimizerPlan:
    """Returns what ``configure_optimizers`` made, checked."""
    task, options = session.task, trainer.options
    plan = OptimizerPlan.build(task, fused=options.fused, device=session.device)
    session.strategy.check_optimizers(plan.optimizers)
    session.plan = plan
    for name, text in [*check_parameters(task, plan), *check_modes(session.callbacks)]:
        hints.say(trainer, name, text, warn=True)
    require_automatic(plan, session.flow.accumulate)
    return plan


def require_automatic(plan: OptimizerPlan, accumulate: int) -> None:
    """Raises `ConfigError` for accumulation in manual optimization."""
    if not plan.automatic and accumulate > 1:
        raise ConfigError(
            "accumulate_grad_batches works in automatic optimization only. In manual optimization "
            "call optimizer.step() and zero_grad() in training_step every so many batches."
        )


# --- the run of an evaluation --------------------------------------------------------------------


def build_eval(
    trainer: Trainer, session: Session, stage: str, given: Any, *, keep: bool
) -> EvalRun:
    """Returns the run of ``validate``, ``test`` or ``predict``; ``keep`` collects the outputs."""
    plans = required_plans(trainer, session, stage, given)
    session.lengths[stage] = [p.length for p in plans]
    run = _eval_run(session, stage, plans, make_transfer(session, trainer.options.memory_format))
    if keep:
        run.outputs = [[] for _ in plans]
    return run


def _eval_run(
    session: Session,
    stage: str,
    plans: list[LoaderPlan],
    transfer: Callable[[Any, int], Any] | None,
) -> EvalRun:
    own_test = stage != "test" or overrides(session.task, "test_step")
    name = _STEPS[stage if own_test else "validation"]
    metrics, hooks = session.metrics, session.hooks
    assert metrics is not None
    assert hooks is not None
    return EvalRun(
        stage=stage,
        task=session.task,
        step=session.strategy.bind(session.task, name),
        in_step=session.strategy.in_step,
        arguments=positional_arguments(getattr(session.task, name), 3),
        loaders=plans,
        rename=renames(session, plans),
        prefix=_PREFIX[stage],
        transfer=transfer,
        autocast=session.precision.autocast,
        metrics=metrics,
        hooks=hooks,
    )


# --- optimization --------------------------------------------------------------------------------


def _zero_grad(session: Session, optimizer: Any) -> Callable[[int], None] | None:
    task = session.task
    if optimizer is None:
        return None
    if overrides(task, "optimizer_zero_grad"):
        state = session.state
        return lambda index: task.optimizer_zero_grad(state.epoch, index, optimizer)
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        return lambda index: optimizer.zero_grad()
    return None


def _clip(trainer: Trainer, session: Session) -> Callable[[Any, list[Any]], None] | None:
    """Returns what clips the gradients before a step; None where nothing does."""
    most, how = trainer.options.gradient_clip_val, trainer.options.gradient_clip_algorithm
    task, strategy, metrics, plan = session.task, session.strategy, session.metrics, session.plan
    assert metrics is not None
    assert plan is not None
    if overrides(task, "configure_gradient_clipping"):
        return lambda optimizer, _: task.configure_gradient_clipping(optimizer, most, how)
    if most is None:
        return None
    if how == "value":
        return lambda _, parameters: strategy.clip_grad_value(parameters, most)
    several = len(plan.optimizers) > 1
    names = {
        id(o): f"grad_norm_{i}" if several else "grad_norm" for i, o in enumerate(plan.optimizers)
    }

    def clip(optimizer: Any, parameters: list[Any]) -> None:
        norm = strategy.clip_grad_norm(parameters, most)
        # The norm before clipping costs nothing more.
        metrics.log(names[id(optimizer)], norm, batch_size=1)

    return clip


def _differentiate(session: Session) -> Callable[[torch.Tensor], None]:
    """Returns what differentiates a loss: the user's ``backward`` where there is one."""
    task, precision = session.task, session.precision
    if overrides(task, "backward"):
        return lambda loss: task.backward(precision.scaled(loss))
    return precision.bind_backward()


def _optimizer_step(session: Session) -> Callable[..., Any] | None:
    """Returns the user's ``optimizer_step``, given an optimizer that knows the scaler."""
    task, precision = session.task, session.precision
    if not overrides(task, "optimizer_step"):
        return None
    if not precision.has_scaler:
        return task.optimizer_step

    def step(epoch: int, index: int, optimizer: Any, closure: Any) -> Any:
        scaled: Any = ManualOptimizer(optimizer, precision, lambda _: None)
        return task.optimizer_step(epoch, index, scaled, closure)

    return step


def _before_manual_step(run: FitRun, optimizer: Any) -> None:
    run.strategy.before_manual_step(run.task)  # over ranks perhaps a collective
    for hook in run.hooks.on_before_optimizer_step:
        hook(optimizer)
    if run.clip is not None:
        run.clip(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
