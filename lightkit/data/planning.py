"""The order of batches: recorded where an epoch begins, walked again where it is continued."""

from __future__ import annotations

import logging
import marshal
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightkit import rng
from lightkit.data.loaders import loader_length
from lightkit.data.shares import Share
from lightkit.data.workers import mix, seed_process, seeded
from lightkit.errors import DataError

_log = logging.getLogger("lightkit")

_LONG = 1_000_000  # samples: more take too long, and too much memory, before the first batch
_PIECE = 100  # indices or batches: less often, as changing random states takes 0.1 ms

#: What follows where a run cannot go on in the middle of a pass.
CHANGED = (
    "The order of its batches cannot be replayed, so the run cannot go on exactly where it was: "
    "the data, their split, the batch size or the sampler changed, or the sampler draws from a random state "
    "that it does not show (give it state_dict and load_state_dict, or a torch.Generator as its "
    "attribute `generator`). Resume with the loader of that run, resume from a checkpoint of an "
    "epoch's end, or begin a new run from its weights: task.load_weights(path)."
)

#: Samplers that draw from the global random state at their first ``next`` only, or never.
_DRAW_AT_START = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
)


def seed_from(state: Tensor, own: Iterable[Tensor], *numbers: int) -> int:
    """Returns a seed that hashes random states of torch on the CPU; nothing is drawn from them.

    Args:
        state: The global state.
        own: States of a loader's own generators. What is no state of a CPU's is passed over.
        numbers: What else makes the seed another one.
    """
    size, drawn = state.numel(), []
    for one in (state, *own):
        if one.numel() == size:
            generator = torch.Generator()
            generator.set_state(one.cpu())
            drawn.append(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))
    return mix(*drawn, *numbers)


class Plan(Sampler[Any]):
    """Stands where a DataLoader has its sampler or batch sampler, and gives what that gives.

    Args:
        inner: The user's.
        workers: Whether the indices go to workers, and so carry a seed each.
        replay: Whether a pass is begun in the middle: then a sampler that may draw at any time is
            drawn up to the end of the pass at the first ``next`` (a very long one from random
            states of its own, in pieces), and what was given is hashed.
        share: Which of the indices are given, where several processes walk over all of them; they
            draw what decides the order when a pass begins. None gives all.

    Attributes:
        seed: What the seeds of the next pass are made of.
        skip: Indices that the next pass only walks over; rounds, where there is a share.
        limit: How many of all indices the next pass has; None for the sampler's own end.
        silent: Gives nothing and leaves the inner sampler alone.
        walk: The pass under way.
        marks: The hash of all indices up to each one given, or up to the end of its round.
        first: The hash of the first of all indices, where there is a share; -1 before it is known.
    """

    def __init__(
        self, inner: Any, *, workers: bool, replay: bool, share: Share | None = None
    ) -> None:
        self.inner, self.workers, self.replay, self.share = inner, workers, replay, share
        self.seed, self.skip, self.silent, self.first = 0, 0, False, -1
        self.limit: int | None = None
        self.walk: Iterator[Any] | None = None
        self.marks = array("I")

    def begin(self, seed: int, skip: int, limit: int | None = None) -> None:
        """Gets ready for a pass that a loader is about to begin."""
        self.seed, self.skip, self.limit = seed, skip, limit
        self.walk, self.marks, self.first = None, array("I"), -1

    def walked(self) -> bool:
        """Walks to where the pass goes on, before random states are put back.

        Returns:
            Whether the loader need not read what is skipped: False for one that never asked.
        """
        skip, self.skip = self.skip, 0
        if self.walk is None or not (skip or self.share):
            return False
        if not self.workers:  # which ask for the first indices at once
            next(self.walk, None)
        return True

    def check(self, counted: int, name: str) -> None:
        """Raises `DataError` where a loader asked for fewer indices than are done.

        Args:
            counted: How many marks there should be.
            name: What to call the loader in messages.
        """
        given = len(self.marks)
        if given < counted:
            raise DataError(
                f"The {name} ended after {given} batches, but the run that is resumed had "
                f"completed {counted} of them. {CHANGED}"
            )
        if given > counted and not self.workers:
            _log.warning(
                "The %s looks %d batch%s ahead in the main process: the order is as it was, but "
                "what its data set draws from random states for them cannot be repeated. Use "
                "num_workers=1 or more.",
                name,
                given - counted,
                "es"[: 2 * (given - counted > 1)],
            )

    def __iter__(self) -> Iterator[Any]:
        if self.silent:
            return iter(())
        walk = self._walk if self.share is None else self._walk_in_rounds
        self.walk = walk(iter(self.inner), self.skip)
        return self.walk

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _walk(self, source: Iterator[Any], skip: int) -> Iterator[Any]:
        seed, workers = self.seed, self.workers
        if not self.replay:
            for number, index in enumerate(source):
                yield seeded(mix(seed, number), index)
            return
        marks = self.marks = array("I")
        mark = 0
        indices = self._steady(source)
        for index in islice(indices, skip):
            mark = _checksum(index, mark)
            marks.append(mark)
        if skip and not workers:
            yield None  # to `walked`
        for number, index in enumerate(indices, skip):
            mark = _checksum(index, mark)
            marks.append(mark)
            yield seeded(mix(seed, number), index) if workers else index

    def _walk_in_rounds(self, source: Iterator[Any], skip: int) -> Iterator[Any]:
        """Walks over the indices of all processes and gives those of one."""
        seed, workers, share, replay = self.seed, self.workers, self.share, self.replay
        assert share is not None
        marks = self.marks = array("I")
        mark = 0
        indices = self._steady(source)
        if self.limit is not None:
            indices = islice(indices, self.limit)
        begun = list(islice(indices, 1))  # draws now
        self.first = _checksum(begun, 0)
        indices = chain(begun, indices)
        for number in count():
            if number == skip and not workers:
                yield None  # to `walked`
            width = share.width(number)
            given = list(islice(indices, width))
            if len(given) < (width if share.even else 1):
                return
            for index in given if replay else ():
                mark = _checksum(index, mark)
            marks.append(mark)
            if number >= skip and share.rank < len(given):
                index = given[share.rank]
                yield seeded(mix(seed, share.number(number)), index) if workers else index

    def _steady(self, source: Iterator[Any]) -> Iterator[Any]:
        """Returns the indices in a way that draws the same whatever else is drawn in between."""
        if _draws_at_start(self.inner):
            return source
        length = loader_length(self.inner)
        if length is None:
            return self._in_own_state(source, 1)
        # By the sampler alone: another limit must not make another order.
        if length * (getattr(self.inner, "batch_size", None) or 1) > _LONG:
            return self._in_own_state(source, _PIECE)
        return chain(list(islice(source, self.limit or length)), source)

    def _in_own_state(self, source: Iterator[Any], size: int) -> Iterator[Any]:
        """Lets a sampler draw from random states of its own, so many indices at a time."""
        own: dict[str, Any] | None = None
        while True:
            with rng.preserved():
                if own is None:
                    seed_process(mix(self.seed, -1))
                else:
                    rng.set_rng_state(own)
                piece = list(islice(source, size))
                own = rng.rng_state()
            if not piece:
                return
            yield from piece


def _draws_at_start(sampler: Any) -> bool:
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) is RandomSampler and sampler.generator is not None:
        # It draws again and again, but for the usual case, where that does not touch the order.
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) in _DRAW_AT_START


def fingerprint(dataset: Any) -> int | None:
    """Returns a hash of what the indices of a data set mean, as far as it is cheap to tell.

    That is the number of samples, and how it was split; None where it has no length.
    """
    length = loader_length(dataset)
    if length is None:
        return None
    mark = _checksum(length, 0)
    if isinstance(dataset, Subset):
        mark = _checksum(dataset.indices, fingerprint(dataset.dataset) or mark)
    for part in getattr(dataset, "datasets", ()) if isinstance(dataset, ConcatDataset) else ():
        mark = _checksum(fingerprint(part), mark)
    return mark


def checksum(indices: Tensor, before: int) -> int:
    """Returns the hash of a batch whose indices are a tensor: that of the same list."""
    return _checksum(indices.tolist(), before)  # in the memory of the CPU


def _checksum(index: Any, before: int) -> int:
    try:
        data = marshal.dumps(index, 0)  # a third of the time of anything else; stays as it is
    except ValueError:
        data = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(index)).encode()
    return zlib.crc32(data, before)
