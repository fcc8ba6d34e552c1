"""The live objects of one call of an entry point. Data only; nothing here is "not yet" there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightkit import rng
from lightkit.data import (
    BatchStream,
    Feed,
    generators,
    loader_length,
    order_of,
    sample_counts,
    seed_from,
)
from lightkit.freezing import set_switches, switches

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from lightkit.agreement import Agreement
    from lightkit.checkpoint import Writer
    from lightkit.data import SampleCounts
    from lightkit.distributed import Strategy
    from lightkit.flow import Flow
    from lightkit.history import History
    from lightkit.hooks import Callback, HookTable
    from lightkit.limits import Cadence, Limits
    from lightkit.metrics import MetricLog
    from lightkit.optim import OptimizerPlan
    from lightkit.precision import Precision
    from lightkit.state import TrainState
    from lightkit.task import TaskModule

_log = logging.getLogger("lightkit")


@dataclass(slots=True)
class LoaderPlan:
    """One loader of an evaluation.

    Attributes:
        name: Prefix or suffix of its metrics; None where it is the only one.
        loader: The loader.
        limit: How many of its batches are used, by all ranks together; None for all.
        length: Batches it will give to this rank; None where unknown.
        feed: What begins passes over it.
        waited: Seconds spent waiting for it, in all passes.
    """

    name: str | None
    loader: Any
    limit: int | None
    length: int | None
    feed: Feed
    waited: float = 0.0

    def of_all(self) -> int:
        """Returns how many batches every rank has of it; 0 where that cannot be known."""
        full = loader_length(self.loader)
        if full is None or self.feed.own:
            return 0
        used = full if self.limit is None else min(full, self.limit)
        return used // self.feed.share.world


@dataclass(slots=True)
class EvalRun:
    """Everything that one evaluation needs, inside a fit or by itself.

    Attributes:
        stage: "validation", "test" or "predict": the middle of its hooks' names.
        step: The user's step.
        in_step: Takes and returns the batches of a loader; keeps ranks that share a model in step.
        arguments: How many of (batch, batch_idx, dataloader_idx) the step takes.
        prefix: What returned scalars are logged under ("val", "test"); None logs nothing.
        rename: For each loader, how the names logged there are changed; None leaves them.
        outputs: Where the outputs of the steps go, for each loader; None keeps none.
    """

    stage: str
    task: TaskModule
    step: Callable[..., Any]
    in_step: Callable[[Iterator[Any]], Iterator[Any]]
    arguments: int
    loaders: list[LoaderPlan]
    rename: list[Callable[[str], str] | None]
    prefix: str | None
    transfer: Callable[[Any, int], Any] | None
    autocast: AbstractContextManager[Any] | None
    metrics: MetricLog
    hooks: HookTable
    outputs: list[list[Any]] | None = None

    def close_feeds(self) -> None:
        """Ends what the loaders keep between passes."""
        for plan in self.loaders:
            plan.feed.close()


@dataclass(slots=True)
class FitRun:
    """Everything that one fit needs.

    Attributes:
        training_step: The user's step, bound by the strategy.
        sync: Is told before each batch of a group whether it is the last, after which gradients
            are averaged over ranks; None where nothing is to be told.
        agree: Makes the wishes of single ranks common, after every step; None with one process.
        weighted: With several ranks, whether the first step's losses had weights; else None.
        automatic: Whether the loop differentiates and steps.
        optimizer: The optimizer of automatic optimization, or None.
        update: Takes its step; None where there is none.
        differentiate: Differentiates a loss.
        scaled: Whether losses are scaled (fp16).
        autocast: The context of the user's step, or None.
        takes_index: Whether it takes ``batch_idx``.
        transfer: Brings a batch to the device; None where there is nothing to do.
        zero_grad: Called instead of clearing the gradients of a list of parameters; None for that.
        clip: Clips the gradients of a list of parameters; None for no clipping.
        optimizer_step: An ``optimizer_step`` of the user's; None where it is not overridden.
        keeps_batches: Whether the batches of a group are kept for a closure.
        counts: What is known about the samples in each training batch.
        train_limit: How many batches of the training loader an epoch uses, by all ranks together;
            None for all.
        train_length: Training batches of an epoch for each rank; None where unknown.
        reload: Makes the training loader anew for an epoch; None keeps it.
        validation: The evaluation within the fit; None where there is nothing to validate.
        cadence: When to validate.
        switches: What was frozen when the loop began.
        switched: What was frozen at the checkpoint that is continued, where hooks had changed it.
        resting: The modules in eval mode when the validation under way, or the last one, began.
        run_id: Name of the run in its record and in its checkpoints; "" where nothing is written.
        writer: Writes the checkpoints.
        feed: What begins passes over the training loader.
        data: What the order of the running epoch came from; empty between two epochs.
        early: Whether the pass of an epoch begins before the validation of the last one.
        next_data: What the order of the next epoch came from, where its pass has begun.
        next_stream: That pass; None also where it is to begin again.
        finished: What is known of the last pass, where the next one has begun.
        loaders_now: Where the loaders stood at the checkpoint that is continued.
        rng: Random states of the checkpoint that is continued; None once they are put back.
        generators_now: Likewise those of the loaders' own generators.
    """

    task: TaskModule
    state: TrainState
    flow: Flow
    limits: Limits
    cadence: Cadence
    hooks: HookTable
    callbacks: list[Callback]
    strategy: Strategy
    precision: Precision
    plan: OptimizerPlan
    metrics: MetricLog
    history: History
    device: torch.device
    training_step: Callable[..., Any]
    takes_index: bool
    automatic: bool
    optimizer: Optimizer | None
    update: Callable[[], Any] | None
    differentiate: Callable[[torch.Tensor], None]
    scaled: bool
    autocast: AbstractContextManager[Any] | None
    transfer: Callable[[Any, int], Any] | None
    zero_grad: Callable[[int], None] | None
    clip: Callable[[Any, list[Any]], None] | None
    optimizer_step: Callable[..., Any] | None
    keeps_batches: bool
    train_loader: Any
    feed: Feed
    train_limit: int | None
    train_length: int | None
    counts: SampleCounts | None
    reload: Callable[[FitRun], None] | None
    validation: EvalRun | None
    sanity_batches: int
    writer: Writer
    sync: Callable[[bool], None] | None = None
    agree: Agreement | None = None
    weighted: bool | None = None
    datamodule: Any = None
    run_id: str = ""
    switches: dict[str, list[str]] = field(default_factory=dict)
    switched: dict[str, list[str]] = field(default_factory=dict)
    resting: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    early: bool = False
    next_data: dict[str, Any] = field(default_factory=dict)
    next_stream: BatchStream | None = None
    finished: dict[str, Any] = field(default_factory=dict)
    rng: dict[str, Any] | None = None
    generators_now: list[torch.Tensor] = field(default_factory=list)
    loaders_now: list[dict[str, Any]] = field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether there are several ranks."""
        return self.strategy.world_size > 1

    def settle_switches(self) -> None:
        """Notes what is frozen when the loop begins, after the hooks of the start.

        What hooks of the run that is continued had changed by its checkpoint is put back: they
        are called once, at an epoch that may be long over.
        """
        self.switches = switches(self.task)
        if self.switched:
            set_switches(self.task, self.switched)

    def switched_now(self) -> dict[str, list[str]]:
        """Returns what is frozen now, if it is not what it was when the loop began; else {}."""
        if not self.switches:
            return self.switched
        now = switches(self.task)
        if self.flow.validating:  # all modules are in eval mode for now
            now["eval"] = self.resting
        return {} if now == self.switches else now

    def completed(self) -> dict[str, Any]:
        """Returns the counters of the last completed step, also in the middle of a group.

        The batches of a group that has not stepped yet are none: its gradients are in no file.
        """
        counters = self.state.state_dict()
        if self.flow.group_open and self.state.global_step == self.flow.group_step:
            counters["batch_idx"] = self.flow.group_start
        return counters

    def open_pass(self) -> BatchStream:
        """Begins the pass of the running epoch, or goes on with it."""
        state = self.state
        if state.batch_idx == 0 and self.next_data:
            if self.next_stream is None:
                self.begin_next()
            stream, self.data = self.next_stream, self.next_data
            self.next_stream, self.next_data, self.finished = None, {}, {}
            assert stream is not None
            return stream
        if state.batch_idx == 0:
            # Where an epoch is resumed, its order is drawn again from here.
            self.data = self.order_state(state.epoch)
        elif self.data:
            self.set_order_state(self.data)
        self.finished = {}
        stream = self._pass(self.data, state.epoch, state.batch_idx)
        self.set_rng()  # in the middle of an epoch: after its order was drawn again
        return stream

    def begin_next(self) -> None:
        """Begins the pass of the next epoch before its turn, so that its workers load meanwhile.

        In a run that goes on it begins where it has begun then, and random states stay.
        """
        done = self.state.batch_idx
        epoch = self.state.epoch + (done > 0)
        if done:  # the marks are those of the new pass from here on
            self.finished = {"done": self.feed.done(done), "hash": self.feed.mark(done)}
        if self.next_data:
            with rng.preserved(*self._generators()):
                self.set_order_state(self.next_data)
                self.next_stream = self._pass(self.next_data, epoch)
            return
        self.next_data = self.order_state(epoch)
        self.next_stream = self._pass(self.next_data, epoch)
        self.set_rng()

    def _pass(self, record: dict[str, Any], epoch: int, skip: int = 0) -> BatchStream:
        return BatchStream(
            self.train_loader,
            limit=self.train_limit,
            skip=skip,
            epoch=epoch,
            sizes=self.counts,
            feed=self.feed,
            record=record,
            name="training loader",
        )

    def order_state(self, epoch: int) -> dict[str, Any]:
        """Returns what the order of an epoch is about to be drawn from.

        With several ranks that share it, a collective: it is drawn from rank zero's random states.
        The others stand in these when it returns, until `set_rng` puts back their own.
        """
        if self.feed.share.offset:
            self.feed.share.offset = 0
            self._measure()
        state = rng.rng_state()
        own = [generator.get_state() for generator in generators(self.train_loader)]
        seed = seed_from(state["torch"], own, epoch)
        record = {"generators": self._generator_states(), **self.feed.record(seed)}
        if not self.several or self.feed.own:
            return {"rng": state, **record}
        ranks = self.strategy.ranks
        record = ranks.share(order_of(record), f"order of epoch {epoch}")
        if not ranks.is_zero:
            # What the loader's own generators draw belongs to the order, so it is not put back.
            self.rng, self.generators_now = state, []
            self.feed.take(record)
        return record

    def use_loader(self, loader: Any, feed: Feed, limit: int | None) -> None:
        """Trains on another loader from here on, in an epoch that is under way as in a new one."""
        feed.share.offset = self.feed.share.offset
        self.train_loader, self.feed, self.train_limit = loader, feed, limit
        self._measure()

    def _measure(self) -> None:
        """Notes how many batches this rank has in the running epoch, and how many samples."""
        self.train_length = self.feed.length(self.train_limit)
        self.counts = sample_counts(self.train_loader, self.feed.share)

    def reopen(self) -> None:
        """Puts the loaders where they stood at the checkpoint that this fit continues, once.

        Persistent workers that ran must run again before random states are put back, because the
        start of new ones draws.
        """
        now, self.loaders_now = self.loaders_now, []
        records = [self.data, *[{}] * len(now)]
        for feed, state, record in zip(self.feeds(), now, records, strict=False):
            if (record or state).get("open"):
                feed.reopen()
            feed.load(record, state, _name(feed is self.feed))

    def set_order_state(self, state: dict[str, Any]) -> None:
        """Puts back what `order_state` returned, so that the same order is drawn again."""
        rng.set_rng_state(state["rng"])
        self._set_generators(state.get("generators", []))

    def before_validation(self) -> dict[str, Any]:
        """Returns what a validation moves, for `undo_validation`; notes what is in eval mode."""
        self.resting = switches(self.task)["eval"]
        state = {"rng": rng.rng_state(), "generators": self._generator_states()}
        state["next"] = self.next_data
        return {**state, "loaders": [feed.now() for feed in self.feeds()[1:]]}

    def undo_validation(self, state: dict[str, Any]) -> None:
        """Puts back random states and validation loaders, as if a validation had not begun."""
        for feed, now in zip(self.feeds()[1:], state["loaders"], strict=True):
            if not now["open"]:
                feed.close()
            feed.load({}, now, _name(False))
        if self.next_stream is not None:
            self.next_stream.close()
        self.next_stream, self.next_data = None, state["next"]
        self.set_order_state(state)

    def set_rng(self) -> None:
        """Puts back the random states of the checkpoint that this fit continues, once."""
        if self.rng is not None:
            rng.set_rng_state(self.rng)
            self._set_generators(self.generators_now)
            self.rng = None

    def data_state(self) -> dict[str, Any]:
        """Returns what the order of the running epoch came from, and where the loaders stand.

        Also how many batches of it all ranks together have done ("done"), and how many ranks there
        are ("world"). No collective: each rank says what it knows.
        """
        train, *others = self.feeds()
        done = self.completed()["batch_idx"] if self.data else None
        state = {**self.data, "world": train.world}
        if self.next_data:
            state["next"] = self.next_data
        if done is not None:
            state["done"] = train.done(done)
        if self.loaders_now:  # nothing of a checkpoint was put back yet
            own = {"generators_now": self.generators_now, "loaders_now": self.loaders_now}
            return {**state, **own}
        now = [train.now(done), *(feed.now() for feed in others)]
        state |= {"generators_now": self._generator_states(), "loaders_now": now}
        if done is not None:
            state["hash"] = train.mark(done)
            state |= self.finished
        return state

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Takes back what `data_state` returned; `reopen` and `set_rng` put it into the loaders.

        Within an epoch it sets ``batch_idx``, which is another one on another number of ranks.

        Args:
            state: Rank zero's, and under "ranks" a list of all ranks' where there were several.
        """
        parts, rank = state.get("ranks", [state]), self.strategy.data_ranks[0]
        self.data = dict(parts[rank if rank < len(parts) else 0])
        self.data.pop("ranks", None)
        self.generators_now = self.data.pop("generators_now", [])
        self.loaders_now = self.data.pop("loaders_now", [])
        self.next_data = self.data.pop("next", {})
        world, done = self.data.pop("world", 1), self.data.pop("done", self.state.batch_idx)
        if not self.data:
            return
        batch_idx = self.feed.go_on(self.data, done, world, self.train_limit)
        self.state.load_state_dict({**self.state.state_dict(), "batch_idx": batch_idx})
        if self.feed.share.offset:
            self._measure()

    def close_feeds(self) -> None:
        """Ends what the loaders keep between passes."""
        if self.next_stream is not None:
            self.next_stream.close()
        for feed in self.feeds():
            feed.close()

    def feeds(self) -> list[Feed]:
        """Returns what begins passes over the loaders: the training's first."""
        plans = [] if self.validation is None else self.validation.loaders
        return [self.feed, *(plan.feed for plan in plans)]

    def _generators(self) -> list[torch.Generator]:
        """Returns the generators that the loaders have of their own, each once."""
        plans = [] if self.validation is None else self.validation.loaders
        loaders = [self.train_loader, *(plan.loader for plan in plans)]
        return list({id(g): g for loader in loaders for g in generators(loader)}.values())

    def _generator_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generators(self, states: list[torch.Tensor]) -> None:
        found = self._generators()
        if len(found) != len(states):
            if states:
                _log.warning(
                    "The checkpoint holds the states of %d generators of loaders, but the loaders "
                    "have %d: their order begins anew.",
                    len(states),
                    len(found),
                )
            return
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state.cpu())


def _name(train: bool) -> str:
    return "training loader" if train else "validation loader"
