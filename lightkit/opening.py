"""Builds a run from what the Trainer was told: device, loaders, optimizers, hooks, folder.

Everything that can be wrong is found here, before the first batch.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightkit import checkpoint
from lightkit.checks import check_loaders, check_parameters
from lightkit.data import (
    limited,
    loader_length,
    move_to_device,
    named_loaders,
    sample_counts,
)
from lightkit.errors import ConfigError, DataError, UsageError
from lightkit.hooks import HookTable, positional_arguments
from lightkit.limits import make_cadence
from lightkit.metrics import MetricLog
from lightkit.optim import ManualOptimizer, OptimizerPlan
from lightkit.run import EvalRun, FitRun, LoaderPlan
from lightkit.task import overrides

if TYPE_CHECKING:
    from lightkit.session import Session
    from lightkit.task import TaskModule
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
_STEPS = {"validation": "validation_step", "test": "test_step", "predict": "predict_step"}
_PREFIX = {"validation": "val", "test": "test", "predict": None}
_LOADERS = {"validation": "val", "test": "test", "predict": "predict"}


def build_fit(trainer: Trainer, session: Session, train: Any, val: Any) -> FitRun:
    """Returns the run of a fit. The task is on its device, its data and hooks are set up."""
    task, options, flow = session.task, trainer.options, session.flow
    loader, reload = _train_loader(trainer, session, train)
    limit, length = _train_length(trainer, loader)
    plans = _loader_plans(trainer, session, "validation", val)
    has_val = bool(plans) and overrides(task, "validation_step")
    if plans and not has_val:
        _log.warning(
            "%s defines no validation_step: the validation loader is not used.", type(task).__name__
        )
    session.train_length = length
    session.lengths["validation"] = [p.length for p in plans] if has_val else []
    plan = OptimizerPlan.build(task, fused=options.fused, device=session.device)
    session.plan = plan
    if has_val:
        named = [(p.name or "val", p.loader) for p in plans]
        for text in check_loaders(session.given_train, named):
            _log.warning("%s", text)
    for text in check_parameters(task, plan):
        _log.warning("%s", text)
    _check_manual(trainer, plan)
    transfer = make_transfer(session)
    metrics, hooks = session.metrics, session.hooks
    assert metrics is not None and hooks is not None
    step = session.strategy.bind(task, "training_step")
    optimizer = plan.optimizer if plan.automatic else None
    run = FitRun(
        task=task,
        state=session.state,
        flow=flow,
        limits=trainer.limits,
        cadence=make_cadence(
            options.val_check_interval, options.check_val_every_n_epoch, length
        ),
        hooks=hooks,
        callbacks=session.callbacks,
        strategy=session.strategy,
        precision=session.precision,
        plan=plan,
        metrics=metrics,
        history=session.history,
        device=session.device,
        training_step=step,
        takes_index=positional_arguments(step, 2) == 2,
        transfer=transfer,
        zero_grad=_zero_grad(task, session, optimizer),
        clip=_clip(trainer, session),
        optimizer_step=_optimizer_step(task, session),
        keeps_batches=overrides(task, "optimizer_step") or plan.needs_closure,
        train_loader=loader,
        train_limit=limit,
        train_length=length,
        counts=sample_counts(loader),
        reload=reload,
        validation=_eval_run(session, "validation", plans, transfer) if has_val else None,
        sanity_batches=trainer.sanity_batches,
        datamodule=session.datamodule,
    )
    task._link.manual = [
        ManualOptimizer(o, session.precision, lambda o: _before_manual_step(run, o))
        for o in plan.optimizers
    ]
    task._link.precision = session.precision
    return run


def build_eval(trainer: Trainer, session: Session, stage: str, given: Any) -> EvalRun:
    """Returns the run of ``validate``, ``test`` or ``predict``."""
    plans = _loader_plans(trainer, session, stage, given)
    if not plans:
        what = f"{_LOADERS[stage]}_dataloader"
        raise DataError(
            f"There is no loader to run {stage} on. Pass dataloaders=, or a data module (or a "
            f"task) whose {what} returns one."
        )
    session.lengths[stage] = [p.length for p in plans]
    run = _eval_run(session, stage, plans, make_transfer(session))
    if stage == "predict":
        run.outputs = [[] for _ in plans]
    return run


def _eval_run(
    session: Session, stage: str, plans: list[LoaderPlan], transfer: Callable[[Any, int], Any] | None
) -> EvalRun:
    step = session.strategy.bind(session.task, _STEPS[stage])
    metrics, hooks = session.metrics, session.hooks
    assert metrics is not None and hooks is not None
    return EvalRun(
        stage=stage,
        task=session.task,
        step=step,
        arguments=positional_arguments(step, 3),
        loaders=plans,
        rename=[_rename(p, session.named_by_user) for p in plans],
        prefix=_PREFIX[stage],
        transfer=transfer,
        autocast=session.precision.autocast,
        metrics=metrics,
        hooks=hooks,
    )


def _rename(plan: LoaderPlan, by_user: bool) -> Callable[[str], str] | None:
    """Names of a dict of loaders come before a metric's; the field's index of a list behind."""
    name = plan.name
    if name is None:
        return None
    return (lambda metric: f"{name}/{metric}") if by_user else (lambda metric: f"{metric}/{name}")


# --- loaders -------------------------------------------------------------------------------------


def _source(session: Session, given: Any, name: str) -> tuple[Any, Callable[[], Any] | None]:
    """Returns a loader and how to make it anew: given to the call, of the data module or task."""
    if given is not None:
        return given, None
    for owner in (session.datamodule, session.task):
        make = getattr(owner, f"{name}_dataloader", None)
        if make is not None:
            loader = make()
            if loader is not None:
                return loader, make
    return None, None


def _train_loader(
    trainer: Trainer, session: Session, given: Any
) -> tuple[Any, Callable[[FitRun], None] | None]:
    options = trainer.options
    given, make = _source(session, given, "train")
    if given is None:
        raise DataError(
            "There is no training loader. Pass it: trainer.fit(task, train_loader), or pass "
            "datamodule= (or define train_dataloader in the task)."
        )
    session.given_train = given
    loader = _single(given)
    every = options.reload_dataloaders_every_n_epochs
    reload = None
    if every and make is None:
        raise ConfigError(
            f"reload_dataloaders_every_n_epochs={every} needs a data module or a task with "
            f"train_dataloader: a loader that is passed to fit cannot be made anew."
        )
    if options.overfit_batches:
        return _first_batches(options.overfit_batches, loader), None
    if every:

        def reload(run: FitRun) -> None:
            if run.state.epoch and run.state.epoch % every == 0:
                assert make is not None
                run.train_loader = _single(make())
                run.counts = sample_counts(run.train_loader)
                run.train_limit, run.train_length = _train_length(trainer, run.train_loader)
                session.train_length = run.train_length
                if run.validation is not None:
                    run.validation.loaders = _loader_plans(trainer, session, "validation", None)

    return loader, reload


def _single(given: Any) -> Any:
    loaders = named_loaders(given, "training loader")
    if len(loaders) != 1:
        raise DataError(
            f"Training takes one loader, got {len(loaders)}. Combine the data sets into one "
            f"loader, for example with torch.utils.data.ConcatDataset or StackDataset."
        )
    return loaders[0][1]


def _first_batches(overfit: int | float, loader: Any) -> list[Any]:
    """Returns the batches that ``overfit_batches`` trains on: the same ones in every epoch."""
    count = limited(loader_length(loader), overfit, "overfit_batches")
    batches = list(itertools.islice(loader, count))
    _log.info("overfit_batches: the same %d batches in every epoch", len(batches))
    return batches


def _train_length(trainer: Trainer, loader: Any) -> tuple[int | None, int | None]:
    full = loader_length(loader)
    limit = limited(full, trainer.limit("train"), "limit_train_batches")
    if limit == 0:
        raise ConfigError("limit_train_batches=0 leaves nothing to train on. Give at least 1.")
    return limit, _shorter(full, limit)


def _shorter(full: int | None, limit: int | None) -> int | None:
    if full is None or limit is None:
        return full
    return min(full, limit)


def _loader_plans(trainer: Trainer, session: Session, stage: str, given: Any) -> list[LoaderPlan]:
    short = _LOADERS[stage]
    given, _ = _source(session, given, short)
    session.named_by_user = isinstance(given, Mapping)
    argument = f"limit_{short}_batches"
    found = []
    for name, loader in named_loaders(given, f"{stage} loader"):
        full = loader_length(loader)
        limit = limited(full, trainer.limit(short), argument)
        if limit != 0:
            found.append(LoaderPlan(name, loader, limit, _shorter(full, limit)))
    return found


def make_transfer(session: Session) -> Callable[[Any, int], Any] | None:
    """Returns what brings a batch to the device, or None where there is nothing to do."""
    task, datamodule, device = session.task, session.datamodule, session.device
    dtype = session.precision.dtype
    own: dict[str, Callable[..., Any]] = {}
    for name in (
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    ):
        if overrides(task, name):
            own[name] = getattr(task, name)
        elif datamodule is not None and _redefined(datamodule, name):
            own[name] = getattr(datamodule, name)
    if not own and device.type == "cpu" and dtype is None:
        return None
    before, move, after = (
        own.get("on_before_batch_transfer"),
        own.get("transfer_batch_to_device"),
        own.get("on_after_batch_transfer"),
    )
    non_blocking = device.type == "cuda"

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        if move is not None:
            batch = move(batch, device, dataloader_idx)
        else:
            batch = move_to_device(batch, device, non_blocking=non_blocking, dtype=dtype)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer


def _redefined(datamodule: Any, name: str) -> bool:
    method = getattr(type(datamodule), name, None)
    return method is not None and method.__module__ != "lightkit.data.module"


# --- optimization --------------------------------------------------------------------------------


def _check_manual(trainer: Trainer, plan: OptimizerPlan) -> None:
    if not plan.automatic and trainer.options.accumulate_grad_batches > 1:
        raise ConfigError(
            "accumulate_grad_batches works in automatic optimization only. In manual optimization "
            "call optimizer.step() and zero_grad() in training_step every so many batches."
        )


def _zero_grad(
    task: TaskModule, session: Session, optimizer: Any
) -> Callable[[int], None] | None:
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
    task, strategy, metrics = session.task, session.strategy, session.metrics
    assert metrics is not None
    if overrides(task, "configure_gradient_clipping"):
        return lambda optimizer, _: task.configure_gradient_clipping(optimizer, most, how)
    if most is None:
        return None
    if how == "value":
        return lambda _, parameters: strategy.clip_grad_value(parameters, most)

    def clip(optimizer: Any, parameters: list[Any]) -> None:
        norm = strategy.clip_grad_norm(parameters, most)
        metrics.log("grad_norm", norm, batch_size=1)  # the norm before clipping costs nothing

    return clip


def _optimizer_step(task: TaskModule, session: Session) -> Callable[..., Any] | None:
    """Returns the user's ``optimizer_step``, given an optimizer that knows the scaler."""
    if not overrides(task, "optimizer_step"):
        return None
    precision = session.precision
    if not precision.has_scaler:
        return task.optimizer_step

    def step(epoch: int, index: int, optimizer: Any, closure: Any) -> Any:
        scaled: Any = ManualOptimizer(optimizer, precision, lambda _: None)
        return task.optimizer_step(epoch, index, scaled, closure)

    return step


def _before_manual_step(run: FitRun, optimizer: Any) -> None:
    for hook in run.hooks.on_before_optimizer_step:
        hook(optimizer)
    if run.clip is not None:
        run.clip(optimizer, [p for group in optimizer.param_groups for p in group["params"]])


# --- folder, checkpoint, first lines ----------------------------------------------------------------


def run_folder(trainer: Trainer, session: Session) -> Path | None:
    """Returns the folder of a fit, made; None where nothing shall be left behind."""
    if trainer.options.fast_dev_run or not (session.loggers or trainer.options.enable_checkpointing):
        return None
    for logger in session.loggers:
        if logger.log_dir is not None:  # the folder that the user chose
            folder = Path(logger.log_dir)
            break
    else:
        folder = _next_version(Path(trainer.default_root_dir) / type(session.task).__name__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The run folder {folder} cannot be made: {error.strerror}. Give another one with "
            f"Trainer(default_root_dir=...)."
        ) from None
    return folder


def _next_version(parent: Path) -> Path:
    taken = [p.name[8:] for p in parent.glob("version_*") if p.name[8:].isdigit()]
    return parent / f"version_{max(map(int, taken), default=-1) + 1}"


def open_loggers(trainer: Trainer, session: Session) -> None:
    """Opens the loggers and writes what is known before the first step."""
    folder = session.run_dir
    if folder is None:
        return
    if trainer.config_text is not None:
        (folder / "config.yaml").write_text(trainer.config_text, encoding="utf-8")
    hparams: dict[str, Any] = {}
    for owner in (session.datamodule, session.task):
        if getattr(owner, "_log_hparams", True):
            hparams |= checkpoint.storable_hparams(getattr(owner, "hparams", None) or {})
    if hparams:
        text = json.dumps(hparams, indent=2, default=repr)
        (folder / "hparams.json").write_text(text + "\n", encoding="utf-8")
    for logger in session.loggers:
        logger.open(folder)
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(session.task)


def say_start(trainer: Trainer, run: FitRun, resumed: str | None) -> None:
    """Logs what will happen, in a few lines."""
    limits, session = trainer.limits, trainer.session
    parts = [f"{run.device}", f"precision {run.precision.name}"]
    if run.plan.fused:
        parts.append(f"fused {', '.join(type(o).__name__ for o in run.plan.fused)}")
    if trainer.options.seed is not None:
        parts.append(f"seed {trainer.options.seed}")
    _log.info("device: %s", "  ".join(parts))
    length = []
    if limits.max_epochs >= 0:
        default = " (default; set max_epochs=)" if trainer.default_epochs else ""
        length.append(f"{limits.max_epochs} epochs{default}")
    if limits.max_steps >= 0:
        length.append(f"at most {limits.max_steps} steps")
    if limits.seconds is not None:
        length.append(f"at most {limits.seconds:g} s")
    batches = "batches of unknown number" if run.train_length is None else _plural(run.train_length)
    _log.info("training: %s, %s per epoch", ", ".join(length) or "without end", batches)
    for line in run.plan.describe(*planned(trainer)):
        _log.info("schedule: %s", line)
    if resumed is not None:
        state = run.state
        _log.info(
            "resumed: %s (step %d, %d epochs done)", resumed, state.global_step, state.epoch
        )
    if session.run_dir is not None:
        _log.info("folder: %s", _short(session.run_dir))


def say_end(trainer: Trainer) -> None:
    """Logs where the results are and how to look at them."""
    folder = trainer.session.run_dir
    if folder is None:
        return
    _log.info("results: %s", _short(folder))
    if any(type(logger).__name__ == "TensorBoardLogger" for logger in trainer.loggers):
        _log.info("curves:  tensorboard --logdir %s", _short(folder))


def _plural(batches: int) -> str:
    return f"{batches} batch{'es' if batches != 1 else ''}"


def _short(folder: Path) -> Path:
    """Returns a folder relative to the current one where it lies below it."""
    try:
        return folder.absolute().relative_to(Path.cwd())
    except ValueError:
        return folder


def planned(trainer: Trainer) -> tuple[int | None, int | None]:
    """Returns the optimizer steps and epochs from 0 to the end of the run, None if unknown."""
    steps = trainer.estimated_stepping_batches
    epochs = trainer.limits.max_epochs
    known = steps is not None and steps != math.inf
    return int(steps) if known and steps is not None else None, epochs if epochs >= 0 else None


def resume(trainer: Trainer, run: FitRun, given: str | Path) -> str:
    """Restores a run from a checkpoint and returns its path."""
    path = find_checkpoint(trainer, given)
    saved = checkpoint.read_checkpoint(path)
    checkpoint.restore(run, saved)
    run.rng = saved["rng"][0]
    if run.limits.reached(run.state):
        _log.warning(
            "%s is at step %d of epoch %d, where this run already ends: nothing to train. Raise "
            "max_epochs or max_steps.",
            path,
            run.state.global_step,
            run.state.epoch,
        )
    run.flow.validated_step, run.flow.validated_at = run.state.global_step, time.perf_counter()
    return str(path)


def find_checkpoint(trainer: Trainer, given: str | Path) -> Path:
    """Returns the file that ``ckpt_path`` means: a path, "last" or "best"."""
    if given not in ("last", "best"):
        if given == "auto":
            raise ConfigError(
                "ckpt_path='auto' is not in this version. Allowed: a path, 'last' or 'best'."
            )
        return Path(given)
    for callback in trainer.checkpoint_callbacks:
        path = callback.last_model_path if given == "last" else callback.best_model_path
        if path and Path(path).exists():
            return Path(path)
    root = Path(trainer.default_root_dir) / type(trainer.session.task).__name__
    folders = [p for p in root.glob("version_*") if p.name[8:].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name[8:]), reverse=True):
        path = folder / "checkpoints" / f"{given}.ckpt"
        if path.exists():
            return path
    raise UsageError(
        f"ckpt_path={given!r}: there is no {given}.ckpt, neither of this trainer's last fit nor in "
        f"a run below {root}. Give the path of a checkpoint."
    )
