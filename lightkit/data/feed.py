"""A loader of a run: how its passes begin, and how they are continued from a checkpoint."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightkit import rng
from lightkit.data.comparing import compare_first, compare_orders
from lightkit.data.loaders import (
    ends,
    generators,
    has_state,
    loader_length,
    own_randoms,
    parts,
    takes_turns,
)
from lightkit.data.planning import CHANGED, Plan, fingerprint, seed_from
from lightkit.data.prefetch import Ahead, Lane
from lightkit.data.shares import Reading, Share, Together, check_divider, divider
from lightkit.data.tensor_loader import TensorPass
from lightkit.data.workers import WorkerStart, watch
from lightkit.distributed.ranks import Ranks
from lightkit.errors import DataError

if TYPE_CHECKING:
    from lightkit.data.stream import BatchStream

_log = logging.getLogger("lightkit")


class Feed:
    """One loader of a run, and how to begin a pass over it where a checkpoint left one.

    The user's loader stays as it is. Where something must be put around its sampler, the passes
    are over a shallow copy, which has workers of its own; `close` ends them.

    A pass is continued in one of three ways. A map-style DataLoader or a `TensorLoader` is *walked*:
    indices only, no sample is loaded. What has a ``state_dict`` (an iterable dataset in one process, a
    StatefulDataLoader, any other loader) is put where it was. Everything else is *read* again.

    With several processes a pass has one order, that of rank zero, and each process takes its share
    of it. Where the order is walked, nobody loads what is not his; everything else is read as a
    whole by each process. A loader that divides its data by itself is taken as it is.

    Args:
        loader: The user's, asked for everything but batches.
        resumable: Whether a pass may be begun in the middle, as in training; then all processes get
            equally many batches, too.
        salt: Makes the seeds of its workers others than those of another loader.
        ranks: The processes of the run. Default: this one is alone.
        place: Which share of how many this process takes. Default: its rank among all.
        divided: Whether the user says that the loader divides its data by itself.

    Attributes:
        view: What the passes are over.
        stream: The pass that was begun last.
        share: Which batches are this process's.
        divided: Whether the user says so.
        own: Whether the loader divides its data by itself, between several processes.
        data: A hash of what the indices of its data set mean.
        reads: Whether each of several processes reads everything.
        lane: Brings each batch to the device before its turn; None for nothing. May be set.
        wrap: Put around the fetching of each batch, for a profiler; None for nothing.

    Raises:
        DataError: A sampler that divides the data between other processes than there are.
    """

    def __init__(
        self,
        loader: Any,
        *,
        resumable: bool = False,
        salt: int = 0,
        ranks: Ranks | None = None,
        place: tuple[int, int] | None = None,
        divided: bool = False,
    ) -> None:
        self.loader = self.view = loader
        self._salt = salt
        self._plan: Plan | None = None
        self._pass: TensorPass | None = None
        self.ranks = ranks = Ranks() if ranks is None else ranks
        self._place = rank, world = (ranks.rank, ranks.world_size) if place is None else place
        part = divider(loader) if ranks.world_size > 1 else None
        if part is not None:
            check_divider(part, rank, world)
        self.divided = divided
        self.own = ranks.world_size > 1 and (divided or part is not None)
        self._common = ranks.world_size > 1 and not self.own
        self.share = Share(rank, world, resumable) if self._common else Share(even=resumable)
        self.reads, self._by_workers = self._common, False
        self._reading: Reading | None = None
        self._random: dict[str, Any] | None = None
        self._fetcher: Any = None
        self.stream: BatchStream | None = None
        self.wrap: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
        self.lane: Lane | None = None
        self._ahead: Ahead | None = None
        self._before: dict[str, Any] | None = None
        self._compared = self._walkable = False
        self._walks = self._persistent = self._iterable = self._placed = self._over = False
        self.data = fingerprint(getattr(loader, "dataset", None))
        self._tensors = takes_turns(loader)
        if self._tensors:
            self._walks, self._walkable, self.reads = True, True, False
        if isinstance(loader, DataLoader):
            self._plan_walks(loader, resumable)

    def _plan_walks(self, loader: DataLoader[Any], resumable: bool) -> None:
        """Puts a plan around the sampler of a DataLoader where one is needed."""
        workers = bool(loader.num_workers)
        self._iterable = isinstance(loader.dataset, IterableDataset)
        self._persistent = workers and loader.persistent_workers
        replay = resumable and not self._iterable
        # One that iterates in its own way may look ahead, so it draws when nobody can tell, or may
        # not ask the sampler at all.
        kind = type(loader)
        owners = {f.__module__.partition(".")[0] for f in (kind.__iter__, kind._get_iterator)}
        walkable = self._walkable = not self._iterable and owners <= {"torch", "torchdata"}
        shared = self._common and walkable
        self._walks = walkable and (replay or shared)
        self.reads = self._common and not walkable
        # All that a plain loader does for an iterable dataset is done in the workers.
        self._by_workers = self._iterable and workers and owners <= {"torch", "torchdata"}
        if not workers and not replay and not shared:
            return
        batched = loader.batch_sampler is not None
        inner: Any = loader.batch_sampler if batched else loader.sampler
        share = self.share if shared else None
        self._plan = Plan(inner, workers=workers, replay=replay, share=share)
        self.view = copy.copy(loader)
        # Not by setattr: DataLoader refuses.
        vars(self.view)["batch_sampler" if batched else "sampler"] = self._plan
        self.view._iterator = None
        if workers:
            self.view.worker_init_fn = WorkerStart(loader.worker_init_fn)

    def fresh(self) -> Feed:
        """Returns another one over the same loader, whose passes leave this one's alone."""
        how: dict[str, Any] = {"place": self._place, "divided": self.divided}
        return Feed(self.loader, ranks=self.ranks, **how)

    def at_most(self, batches: int, limit: int | None) -> int:
        """Returns a limit that leaves so many batches to each process, if ``limit`` does."""
        batches *= self.share.world
        return batches if limit is None else min(batches, limit)

    @property
    def world(self) -> int:
        """Between how many processes the data are divided."""
        return self._place[1]

    @property
    def steady(self) -> bool:
        """Whether giving a batch draws nothing in this process."""
        return self._tensors or bool(getattr(self.loader, "num_workers", 0))

    @property
    def may_look_ahead(self) -> bool:
        """Whether a batch can be fetched before its turn, and the pass still be continued."""
        return self._walkable or (self._by_workers and self._placer() is None)

    @property
    def may_begin_early(self) -> bool:
        """Whether there are workers that load while something else runs, in a known order."""
        return self._walkable and not self._tensors and self.steady

    def done(self, batches: int) -> int:
        """Returns how many batches all processes have done when each has done so many."""
        return batches * self.world if self.own else self.share.before(batches)

    def go_on(self, record: dict[str, Any], done: int, world: int, limit: int | None) -> int:
        """Gets ready for the rest of a pass that perhaps another number of processes began.

        Args:
            record: What `record` returned at its beginning; what cannot hold here is taken out.
            done: How many batches all of them had done.
            world: How many they were.
            limit: How many of the loader's batches are used at most; None for all.

        Returns:
            As how many batches of this process that counts.
        """
        if self.own:
            if world != self.world:  # each has another part of the data than anybody had
                record.pop("hash", None)
                record.pop("length", None)
                if done % self.world:
                    _log.warning(
                        "%d processes had done %d batches of the epoch together, which %d do not "
                        "divide, and the loader divides its data by itself: up to %d batches of "
                        "this epoch are left out.",
                        world,
                        done,
                        self.world,
                        self.world - done % self.world,
                    )
            return -(-done // self.world)
        rounds = self.share.move(done)
        full = loader_length(self.loader)
        if world != self.world and full is not None:
            left = (full if limit is None else min(full, limit)) - done
            _log.info(
                "%d of %d batches of the epoch were done by %s; %s: %d left out at its end",
                done,
                left + done,
                _processes(world),
                f"{_processes(self.world)} take the rest"
                if self.world > 1
                else "one takes the rest",
                max(left, 0) % self.world,
            )
        return rounds

    def length(self, limit: int | None = None) -> int | None:
        """Returns how many batches a pass gives to this process; None where nobody knows.

        Args:
            limit: How many of the loader's batches are used at most; None for all.
        """
        full = loader_length(self.loader)
        return self.share.length(full if full is None or limit is None else min(full, limit))

    def global_index(self, index: int) -> int | None:
        """Returns the number that this process's batch ``index`` has in the order of all processes.

        None where the loader divides its data by itself.
        """
        return None if self.own else self.share.number(index)

    @property
    def open(self) -> bool:
        """Whether persistent workers wait for the next pass."""
        return self._persistent and self.view._iterator is not None

    def reopen(self) -> None:
        """Starts persistent workers that were running; nothing is drawn or loaded."""
        if not self._persistent or self.open:
            return
        if self._iterable and has_state(self.loader.dataset):
            _log.warning(
                "%s has a state, which its persistent workers keep from epoch to epoch where it "
                "cannot be read: after this resume it starts anew. Use persistent_workers=False.",
                type(self.loader.dataset).__name__,
            )
        assert self._plan is not None
        self._plan.silent = True
        try:
            with rng.preserved(*generators(self.loader)):
                self.view._iterator = self.view._get_iterator()
        finally:
            self._plan.silent = False
        watch(self.view._iterator)

    def close(self) -> None:
        """Ends persistent workers."""
        if self.open:
            iterator, self.view._iterator = self.view._iterator, None
            iterator._shutdown_workers()

    def record(self, seed: int) -> dict[str, Any]:
        """Returns what a pass that is about to begin can be begun from again, but random states."""
        return {
            "seed": seed,
            "length": loader_length(self.loader),
            "open": self.open,
            "states": {
                name: part.state_dict()
                for name, part in self._keepers(within=False).items()
                if not (self._walks and name.startswith("dataset"))  # which loads nothing then
            },
        }

    def now(self, done: int | None = None) -> dict[str, Any]:
        """Returns where the loader stands.

        Args:
            done: How many batches of the pass under way are completed; None between two passes.
        """
        within = done is not None
        # Else batches that were fetched must come again: those of a step that failed.
        settled = self.stream is not None and self.stream.fetched == done
        keepers = self._keepers(within=within)
        if within and not settled:
            keepers.pop(self._placer() or "", None)
        if self._over:
            keepers.pop("loader", None)
        states = {name: part.state_dict() for name, part in keepers.items()}
        # A dataset that ended stands at its start again, though nobody asked for the end yet.
        ended = [*ends(states.get("loader"))] or [getattr(self._fetcher, "ended", False)]
        if any(ended):  # a worker that ended would begin again
            states.pop("loader", None)
        over = within and settled and (self._over or all(ended))
        now = {"open": self.open, "states": states, "over": over, "data": self.data}
        if within and settled and self._reading is not None:
            now["random"] = self._reading.state
        if within and settled and self._ahead is not None:
            now["ahead"] = self._ahead.before
        return now

    def load(self, record: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
        """Puts the parts of the loader that have a state where they were.

        Args:
            record: What `record` returned, if a pass is to be continued; else empty.
            now: What `now` returned where the checkpoint was written.
            name: What to call the loader in messages.

        Raises:
            DataError: In the middle of a pass over other data.
        """
        if now.get("data") not in (None, self.data):
            if record:
                raise DataError(f"The {name} has other data than it had. {CHANGED}")
            _log.warning(
                "The %s has other data than in the run that is continued: more, fewer, or split "
                "in another way. If that is not meant: split them from a fixed seed, for example "
                "random_split(data, lengths, generator=torch.Generator().manual_seed(0)).",
                name,
            )
        begun, current = record.get("states", {}), now.get("states", {})
        placer = self._placer() if record else None
        self._over = placer is not None and now.get("over", False)
        self._placed = self._over or placer in current
        states = {**begun, **current} if self._placed else {**current, **begun}
        self._random = now.get("random") if self._placed else None
        self._before = now.get("ahead") if record else None
        if placer == "loader":  # which holds the dataset's
            states.pop("dataset" if self._placed and not self._over else "loader", None)
        for name, part in self._keepers(within=bool(record)).items():
            if name in states:
                part.load_state_dict(states[name])

    def iterate(
        self, record: Mapping[str, Any] | None = None, skip: int = 0, limit: int | None = None
    ) -> tuple[Iterator[Any], int]:
        """Begins a pass.

        Args:
            record: What `record` returned at its beginning, where all random states are now those
                of that moment. None: it is not to be continued; with several processes that share
                an order a collective then.
            skip: How many batches of it are done.
            limit: How many of the loader's batches are used; None for all.

        Returns:
            The iterator, and how many batches of it the caller has to read and drop.
        """
        if record is not None or not self._common:
            return self._begin(record, skip, limit)
        own = generators(self.loader)
        seed = seed_from(torch.get_rng_state(), (g.get_state() for g in own), self._salt)
        begun = order_of({"generators": [g.get_state() for g in own], **self.record(seed)})
        begun = self.ranks.share(begun, "order of an evaluation")  # a collective, on the CPU
        if self.ranks.is_zero:
            return self._begin(begun, skip, limit)
        with rng.preserved():
            self.take(begun)
            return self._begin(begun, skip, limit)

    def take(self, record: Mapping[str, Any]) -> None:
        """Puts this process where rank zero was when it recorded the order of a pass."""
        rng.set_rng_state(record["rng"])
        # Their generators come first where the record has those of other loaders, too.
        for generator, state in zip(generators(self.loader), record["generators"], strict=False):
            generator.set_state(state)
        for name, part in self._keepers(within=False).items():
            if name in record["states"]:
                part.load_state_dict(record["states"][name])

    def _begin(
        self, record: Mapping[str, Any] | None, skip: int, limit: int | None
    ) -> tuple[Iterator[Any], int]:
        """Begins a pass in the random states of this moment; see `iterate`."""
        placed, self._placed = self._placed, False
        self._over = self._over and skip > 0
        if self._over:
            self.reopen()
            return iter(()), 0
        plan, left = self._plan, 0 if placed else skip
        iterator: Any
        if self._tensors:
            self._pass = TensorPass(self.loader, self.share, skip, limit)
            iterator, left = iter(self._pass), 0
            if self._common:
                compare_orders(self.ranks, self.loader, self._pass.mark(1))
        elif plan is None:
            iterator = iter(self.view)
            self._fetcher = getattr(iterator, "_dataset_fetcher", None)
        else:
            seed = None if record is None else record.get("seed")
            if seed is None:
                own = (generator.get_state() for generator in generators(self.loader))
                seed = seed_from(torch.get_rng_state(), own, self._salt)
            plan.begin(seed, skip if self._walks else 0, limit)
            iterator = iter(self.view)
            watch(iterator)
            left = 0 if plan.walked() else left
            if plan.share is not None:
                compare_orders(self.ranks, self.loader, plan.first)
        if self.reads:
            first = None
            if not (self._compared or placed or skip or isinstance(self.loader, (list, tuple))):
                self._compared, kind = True, type(self.loader).__name__
                first = partial(compare_first, self.ranks, kind)
            state, self._random = self._random, None
            draws = not isinstance(self.loader, (list, tuple)) and not self._by_workers
            if draws and state is None and (placed or not self.ranks.is_zero):
                state = rng.rng_state()  # its own come back, while rank zero begins in those it has
            iterator = self._reading = Reading(
                iterator, self.share, skip - left, limit, state, draws, first
            )
        elif self.own and self.share.even and loader_length(self.loader) is None:
            iterator = Together(iterator, self.ranks)
        self._ahead, before, self._before = None, self._before, None
        if self.lane is not None:
            most = None if limit is None else (self.share.length(limit) or 0) - skip + left
            drawing = None if self.steady else self.loader
            self._ahead = iterator = Ahead(iterator, self.lane, most, drawing)
            if skip and not left and (self.steady or before is not None):
                self._ahead.begin(before)  # the random states that are put back know of its draws
        return iterator, left

    def mark(self, done: int) -> int | None:
        """Returns the hash of the first ``done`` indices of this pass; None where none is known."""
        plan, before = self._plan, self.share.before(done)
        if self._pass is not None:
            return self._pass.mark(before) if before else None
        if plan is None or not plan.replay:
            return None
        counted = self._counted(done)
        return plan.marks[counted - 1] if 0 < counted <= len(plan.marks) else None

    def _counted(self, done: int) -> int:
        """Returns how many marks there are after so many batches of this process."""
        walked = self._plan is not None and self._plan.share is not None
        return done if walked else self.share.before(done)

    def check(self, record: Mapping[str, Any], done: int, name: str) -> None:
        """Raises `DataError` unless the first ``done`` batches are those of the recorded pass."""
        length, saved = loader_length(self.loader), record.get("length")
        if saved is not None and length is not None and length != saved:
            raise DataError(f"The {name} has {length} batches, it had {saved}. {CHANGED}")
        if self._plan is not None and self._plan.replay:
            self._plan.check(self._counted(done), name)
        elif self._pass is None:
            return
        if record.get("hash") not in (None, self.mark(done)):
            raise DataError(f"The {name} gives other samples than it gave. {CHANGED}")

    def _keepers(self, *, within: bool) -> dict[str, Any]:
        """Returns the parts that have a state of their own; that of a DataLoader is a position."""
        found = {**parts(self.loader), "loader": self.view}
        if isinstance(self.loader, DataLoader):
            placed = self._iterable and within and has_state(self.loader.dataset)
            if not placed:  # else a StatefulDataLoader would only read as well
                del found["loader"]
        keepers = {name: part for name, part in found.items() if has_state(part)}
        for name, part in found.items():
            if name not in keepers:
                keepers |= own_randoms(name, part)
        return keepers

    def _placer(self) -> str | None:
        """Returns which part can be put in the middle of a pass; None where none can."""
        keepers = self._keepers(within=True)
        if "loader" in keepers:
            return "loader"
        alone = self._iterable and not self.loader.num_workers
        return "dataset" if alone and "dataset" in keepers else None


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def order_of(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with the random states of this moment that may decide an order of batches.

    Not those of cards, whose number may be another one elsewhere.
    """
    states = {k: v for k, v in rng.rng_state().items() if k not in ("cuda", "mps")}
    return {"rng": states, **record}
