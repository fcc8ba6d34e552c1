"""The loaders of a run: where they come from, how much of them is used, how batches are moved."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightkit.data import (
    BatchStream,
    Feed,
    compared,
    how_divided,
    limited,
    loader_length,
    move_to_device,
    named_loaders,
)
from lightkit.data.prefetch import lane_of
from lightkit.errors import ConfigError, DataError
from lightkit.hooks import positional_arguments
from lightkit.limits import Cadence, make_cadence
from lightkit.run import LoaderPlan
from lightkit.task import overrides

if TYPE_CHECKING:
    from lightkit.options import Options
    from lightkit.run import FitRun
    from lightkit.session import Session
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
_SHORT = {"validation": "val", "test": "test", "predict": "predict"}
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class NoData:
    """What is trained on where there is no data: None, in each step.

    Args:
        steps: Steps of an epoch; None for an epoch without end.
    """

    def __init__(self, steps: int | None) -> None:
        self._steps = steps

    def __len__(self) -> int:
        if self._steps is None:
            raise TypeError("an epoch without data has no length but that of the fit")
        return self._steps

    def __iter__(self) -> Iterator[None]:
        steps = self._steps
        return itertools.repeat(None) if steps is None else itertools.repeat(None, steps)


def no_data(trainer: Trainer) -> NoData:
    """Returns what stands for the training loader of a fit without data.

    Raises:
        ConfigError: Nothing says how long an epoch, or the fit, is, or a part of data is asked for.
    """
    steps, limits = trainer.limit("train"), trainer.limits
    if trainer.options.overfit_batches:
        raise ConfigError(
            f"overfit_batches={trainer.options.overfit_batches} is about training data, but there "
            f"are none. Give limit_train_batches, the steps of an epoch."
        )
    if isinstance(steps, float):
        raise ConfigError(
            f"limit_train_batches={steps} is a part of the training data, but there are none. Give "
            f"a number of steps."
        )
    if steps is None and limits.max_steps < 0 and limits.seconds is None:
        raise ConfigError(
            "Without data an epoch has no end of its own. Say how long to train: "
            "trainer.fit(task, max_steps=1000); or how many steps an epoch has: "
            "Trainer(limit_train_batches=100, max_epochs=10)."
        )
    if steps is None and limits.max_steps > 0:  # the fit is one whole epoch, with all of its end
        steps = limits.max_steps * trainer.accumulate_grad_batches
    return NoData(steps)


def source(session: Session, given: Any, name: str) -> tuple[Any, Callable[[], Any] | None]:
    """Returns a loader and how to make it anew: given to the call, of the data module or task."""
    if given is not None:
        return given, None
    for owner in (session.datamodule, session.task):
        make = getattr(owner, f"{name}_dataloader", None)
        loader = None if make is None else make()
        if loader is not None:
            return loader, make
    return None, None


def train_loader(
    trainer: Trainer, session: Session, given: Any
) -> tuple[Any, Callable[[], Any] | None]:
    """Returns the training loader, and what makes it anew between epochs (None keeps it)."""
    options, alone = trainer.options, not positional_arguments(session.task.training_step, 1)
    given, make = source(session, given, "train")
    if given is None and (alone or (session.bare and session.datamodule is None)):
        return no_data(trainer), None
    if given is None:
        raise DataError(
            "There is no training loader. Pass it: trainer.fit(task, train_loader), or pass "
            "datamodule= (or define train_dataloader in the task). To train without data say how "
            "long: trainer.fit(task, max_steps=1000)."
        )
    if alone:
        raise DataError(
            "training_step takes no batch, but there is a training loader. Write "
            "training_step(self, batch), or leave the loader out."
        )
    session.given_train = given
    every = options.reload_dataloaders_every_n_epochs
    if every and make is None:
        raise ConfigError(
            f"reload_dataloaders_every_n_epochs={every} needs a data module or a task with "
            f"train_dataloader: a loader that is passed to fit cannot be made anew."
        )
    loader = _single(given)
    if options.overfit_batches:
        return _first_batches(trainer, session, loader), None
    return loader, make if every else None


def reloader(
    trainer: Trainer, session: Session, make: Callable[[], Any] | None, given_val: Any
) -> Callable[[FitRun], None] | None:
    """Returns what the loop calls before each epoch to have its loaders made anew; None: never."""
    if make is None:
        return None
    every = trainer.options.reload_dataloaders_every_n_epochs

    def reload(run: FitRun) -> None:
        """Makes the loaders anew where an epoch begins that needs new ones, or goes on."""
        if run.state.epoch == session.loaded_at or (
            run.state.epoch % every and not run.state.batch_idx
        ):
            return
        loader = _single(make())
        run.feed.close()
        feed, limit, session.train_length = open_training(trainer, session, loader)
        run.use_loader(loader, feed, limit)
        if isinstance(trainer.options.val_check_interval, float):  # a part of the epoch's length
            run.cadence = cadence(trainer.options, session.train_length)
        if run.validation is not None and given_val is None:
            run.validation.close_feeds()
            run.validation.loaders = loader_plans(trainer, session, "validation", None)
            run.validation.rename = renames(session, run.validation.loaders)
            session.lengths["validation"] = [p.length for p in run.validation.loaders]

    return reload


def _single(given: Any) -> Any:
    loaders = named_loaders(given, "training")
    if not loaders:
        raise DataError("The training loader is empty: there is no loader and no batch in it.")
    if len(loaders) > 1:
        raise DataError(
            f"Training takes one loader, got {len(loaders)}. Combine the data sets into one "
            f"loader, for example with torch.utils.data.ConcatDataset or StackDataset, or write a "
            f"class that goes over all of them, as in docs/migrate-from-lightning.md."
        )
    return loaders[0][1]


def _first_batches(trainer: Trainer, session: Session, loader: Any) -> list[Any]:
    """Returns the batches that ``overfit_batches`` trains on: the same ones in every epoch.

    With several ranks each gets its own of them.
    """
    overfit, argument = trainer.options.overfit_batches, "overfit_batches"
    if session.strategy.ranks.world_size > 1:
        feed = _feed(trainer, session, loader, resumable=True)
        limit = _limit(feed, overfit, argument)
        return list(BatchStream(loader, limit=limit, feed=feed, name="training loader"))
    batches = list(itertools.islice(loader, limited(loader_length(loader), overfit, argument)))
    if not batches:
        raise DataError("overfit_batches: the training loader gave no batch at all.")
    return batches


def _feed(trainer: Trainer, session: Session, loader: Any, **options: Any) -> Feed:
    """Returns what begins passes over a loader, divided between the ranks."""
    strategy = session.strategy
    options.setdefault("divided", not trainer.options.use_distributed_sampler)
    feed = Feed(loader, ranks=strategy.ranks, place=strategy.data_ranks, **options)
    wish, overfit = trainer.options.prefetch, trainer.options.overfit_batches
    lane = None if wish is False or overfit else lane_of(session.device)
    if lane is not None:
        why_not = _why_not_ahead(session, feed)
        if wish is True and why_not and options.get("resumable"):
            raise ConfigError(f"prefetch=True, but {why_not}")
        if not why_not and (wish is True or feed.steady):
            feed.lane = lane
    return feed


def _why_not_ahead(session: Session, feed: Feed) -> str:
    """Returns why batches of a loader cannot be on their way before their turn; "" if they can."""
    kind = type(feed.loader).__name__
    own = [name for name in TRANSFER[:2] if _transfer_of(session, name) is not None]
    if own:
        return f"{own[0]} is to get each batch as the loader gave it. Remove one of the two."
    if not feed.may_look_ahead:
        return (
            f"the training loader ({kind}) keeps its place by itself, and a run that goes on would "
            f"find it one batch too far. Leave prefetch out, or give a DataLoader over a data set "
            f"with indices."
        )
    if not getattr(feed.loader, "pin_memory", False):
        return (
            f"the batches are not in pinned memory. Give the {kind} pin_memory=True. If its data "
            f"are on the device already, leave prefetch out."
        )
    return ""


def _limit(feed: Feed, limit: int | float | None, argument: str) -> int | None:
    """Returns how many batches of a loader all ranks together use, None for all.

    A number limits each rank's batches; a fraction is one of the whole loader.
    """
    if type(limit) is int:
        limit *= feed.share.world
    return limited(loader_length(feed.loader), limit, argument)


def open_training(
    trainer: Trainer, session: Session, loader: Any
) -> tuple[Feed, int | None, int | None]:
    """Gets the training loader ready. With several ranks a collective.

    Returns:
        What begins passes over it, how many of its batches all ranks together use (None for all),
        and how many of them will come to this rank (None where unknown).

    Raises:
        ConfigError: The limit of its batches is 0.
        DataError: The ranks have different data, or there are more ranks than batches.
    """
    given = trainer.limit("train")
    whole = bool(trainer.options.overfit_batches) or isinstance(loader, NoData)
    how = {"divided": True} if whole else {}  # each process has all that it needs
    feed = _feed(trainer, session, loader, resumable=True, **how)
    shortest = compared(session.strategy.ranks, [("training loader", feed)])[0]
    limit = _limit(feed, given, "limit_train_batches")
    if limit == 0:
        raise ConfigError("limit_train_batches=0 leaves nothing to train on. Give at least 1.")
    if shortest is not None:
        limit = shortest if limit is None else min(limit, shortest)
    length = feed.length(limit)
    world = feed.world
    if length == 0:
        full = loader_length(loader) if limit is None else limit
        raise DataError(
            f"The training loader gives {full} batch{'es' if full != 1 else ''}, but there are "
            f"{world} processes, and each needs one. Use a smaller batch size, more data, or "
            f"fewer processes."
        )
    if world > 1 and not whole:
        _log.info("%s", how_divided(feed, limit))
    return feed, limit, length


def begins_early(options: Options, feed: Feed) -> bool:
    """Returns whether the pass of an epoch begins before the validation of the last one.

    Raises:
        ConfigError: It is asked for, and there are no workers that could begin.
    """
    if options.prefetch != "epoch" or options.overfit_batches:  # whose batches are there already
        return False
    if options.reload_dataloaders_every_n_epochs:
        raise ConfigError(
            "prefetch='epoch' begins an epoch with the loader of the last one, but "
            "reload_dataloaders_every_n_epochs asks for a new one. Leave one of the two out."
        )
    if not feed.may_begin_early:
        raise ConfigError(
            f"prefetch='epoch' lets the workers of the next epoch load during the validation, but "
            f"the training loader ({type(feed.loader).__name__}) has none that know the order. Give "
            f"a DataLoader over a data set with indices num_workers=1 or more, or leave it out."
        )
    return True


def cadence(options: Options, length: int | None) -> Cadence:
    """Returns when a fit validates whose epochs have ``length`` batches."""
    if options.fast_dev_run:
        return make_cadence(None, 1, length)
    return make_cadence(options.val_check_interval, options.check_val_every_n_epoch, length)


def loader_plans(trainer: Trainer, session: Session, stage: str, given: Any) -> list[LoaderPlan]:
    """Returns the loaders of an evaluation with their names and lengths; none with a limit of 0."""
    short = _SHORT[stage]
    if trainer.limit(short) == 0:
        return []
    given, _ = source(session, given, short)
    session.given[stage] = given
    session.named_by_user = isinstance(given, Mapping)
    found: list[LoaderPlan] = []
    for name, loader in named_loaders(given, stage):
        feed = _feed(trainer, session, loader, salt=len(found))
        limit = _limit(feed, trainer.limit(short), f"limit_{short}_batches")
        found.append(LoaderPlan(name, loader, limit, feed.length(limit), feed))
    called = [f"{stage} loader" + (f" {p.name!r}" if p.name else "") for p in found]
    compared(session.strategy.ranks, [(c, p.feed) for c, p in zip(called, found, strict=True)])
    return found


def renames(session: Session, plans: list[LoaderPlan]) -> list[Callable[[str], str] | None]:
    """Returns for each loader how the metrics of its steps are called; None leaves their names."""
    return [_rename(plan.name, session.named_by_user) for plan in plans]


def _rename(name: str | None, by_user: bool) -> Callable[[str], str] | None:
    """Names of a dict of loaders come before a metric's; the field's index of a list behind."""
    if name is None:
        return None
    return (lambda metric: f"{name}/{metric}") if by_user else (lambda metric: f"{metric}/{name}")


def required_plans(trainer: Trainer, session: Session, stage: str, given: Any) -> list[LoaderPlan]:
    """Returns the loaders of ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigError: The limit of its batches is 0.
        DataError: There is no loader.
    """
    short = _SHORT[stage]
    if trainer.limit(short) == 0:
        raise ConfigError(
            f"limit_{short}_batches=0 leaves nothing to run {stage} on. Give at least 1."
        )
    plans = loader_plans(trainer, session, stage, given)
    if not plans:
        raise DataError(
            f"There is no loader to run {stage} on. Pass dataloaders=, or a data module (or a "
            f"task) whose {short}_dataloader returns one."
        )
    return plans


def make_transfer(session: Session, memory_format: str | None) -> Callable[[Any, int], Any] | None:
    """Returns what brings a batch to the device, or None where there is nothing to do."""
    device, dtype, layout = session.device, session.precision.dtype, None
    if memory_format is not None:
        layout = getattr(torch, memory_format)
    own: dict[str, Callable[..., Any]] = {}
    for name in TRANSFER:
        function = _transfer_of(session, name)
        if function is not None:
            own[name] = function
    if not own and device.type == "cpu" and dtype is None and layout is None:
        return None
    before, move, after = (own.get(name) for name in TRANSFER)
    non_blocking = device.type == "cuda"

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        if move is not None:
            batch = move(batch, device, dataloader_idx)
        if move is None or dtype is not None:  # a move of the user's knows nothing of precision
            batch = move_to_device(batch, device, non_blocking=non_blocking, dtype=dtype)
        if after is not None:
            batch = after(batch, dataloader_idx)
        # Behind the user's functions, which may make other tensors.
        return batch if layout is None else move_to_device(batch, device, memory_format=layout)

    return transfer


def _transfer_of(session: Session, name: str) -> Callable[..., Any] | None:
    """Returns the user's function of one of the names of `TRANSFER`: the task's comes first."""
    task, datamodule = session.task, session.datamodule
    if overrides(task, name):
        return getattr(task, name)  # type: ignore[no-any-return]
    if datamodule is not None and redefined(datamodule, name):
        return getattr(datamodule, name)  # type: ignore[no-any-return]
    return None


def redefined(datamodule: Any, name: str) -> bool:
    """Tells whether a data module defines ``name`` itself."""
    method = getattr(type(datamodule), name, None)
    return method is not None and method.__module__ != "lightkit.data.module"
