"""Looks at the loaders of all ranks before a run starts, and says how they are divided."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, uint8

from lightkit.data.loaders import loader_length, sample_counts
from lightkit.data.move import members_of
from lightkit.errors import DataError

if TYPE_CHECKING:
    from lightkit.data.feed import Feed
    from lightkit.distributed import Ranks

_log = logging.getLogger("lightkit")
_LOOK = 1_000_000  # elements of a tensor that are compared at most
_BY_ITSELF = (
    "Trainer(use_distributed_sampler=False) if each process's loader gives its own part of the data"
)


def compared(ranks: Ranks, named: Sequence[tuple[str, Feed]]) -> list[int | None]:
    """Checks that all ranks have loaders over the same data, of the same batch size.

    With several ranks one collective, on the CPU.

    Args:
        ranks: The processes of the run.
        named: Loaders and what to call them.

    Returns:
        For each loader that divides its data by itself how many batches the rank with the fewest
        has; None for all others, and where it is not known.

    Raises:
        DataError: On all ranks, where they differ.
    """
    if ranks.world_size == 1:
        return [None] * len(named)
    found = ranks.gather([_likeness(feed) for _, feed in named], "comparison of the loaders")
    if len({len(each) for each in found}) > 1:
        counts = ", ".join(f"{len(each)} on rank {rank}" for rank, each in enumerate(found))
        raise DataError(f"The ranks have different numbers of loaders: {counts}.")
    shortest: list[int | None] = []
    for (name, feed), each in zip(named, zip(*found, strict=True), strict=True):
        _compare(name, each)
        lengths = [one["length"] for one in each]
        shortest.append(min(lengths) if feed.own and None not in lengths else None)
        if feed.own and feed.share.even and len(set(lengths)) > 1:
            _log.info(
                "The %s has %s batches on ranks 0 to %d; each takes the first %s of an epoch.",
                name,
                ", ".join(map(str, lengths)),
                ranks.world_size - 1,
                min(lengths),
            )
    return shortest


def _likeness(feed: Feed) -> dict[str, Any]:
    """Returns what should be the same on all ranks."""
    loader, length = feed.loader, loader_length(feed.loader)
    return {
        "kind": type(loader).__name__,
        "own": feed.own,
        "sized": length is not None,
        "length": length,
        "data": None if feed.divided else feed.data,
        "samples": loader_length(getattr(loader, "dataset", None)),
        "batch size": getattr(loader, "batch_size", None),
    }


def _compare(name: str, each: Sequence[dict[str, Any]]) -> None:
    """Raises `DataError` for one loader that is not alike on all ranks."""
    for rank, one in enumerate(each):
        first = each[0]
        who = f"The {name} of rank {rank}"
        for key, words in (("kind", "is a {}"), ("batch size", "has batch size {}")):
            if one[key] != first[key]:
                raise DataError(
                    f"{who} {words.format(one[key])}, that of rank 0 {words.format(first[key])}. "
                    f"Give all ranks the same loader."
                )
        for key, what in (("own", "a DistributedSampler"), ("sized", "a length")):
            if one[key] != first[key]:
                has = "has" if one[key] else "does not have"
                raise DataError(
                    f"{who} {has} {what}, unlike that of rank 0. Give all ranks the same loader."
                )
        if one["data"] != first["data"] or (not one["own"] and one["length"] != first["length"]):
            raise DataError(
                f"{who} has other data than that of rank 0 ({one['samples']} and "
                f"{first['samples']} samples), so that samples would be missed and seen twice. Split "
                f"them from a fixed seed, for example random_split(data, lengths, generator="
                f"torch.Generator().manual_seed(0)), or Trainer(seed=1) before they are made. Or "
                f"say {_BY_ITSELF}."
            )


def compare_first(ranks: Ranks, kind: str, batch: Any) -> None:
    """Warns where ranks that all read the same data began with different batches. A collective.

    Args:
        ranks: The processes of the run.
        kind: What to call the loader.
        batch: The first batch that this rank read, before any is given to a rank; None for none.
    """
    told = ranks.exchange([_content(batch)], "comparison of the first batches")
    others = [str(rank) for rank, mark in enumerate(told) if mark != told[0]]
    if others:
        _log.warning(
            "A loader (%s) gives other batches on rank %s than on rank 0. Each rank uses one in %d "
            "of them: if the loader gives each rank its own part of the data, most are never seen, "
            "so say Trainer(use_distributed_sampler=False). Otherwise its data draw from a random "
            "state that they do not show.",
            kind,
            ", ".join(others),
            ranks.world_size,
        )


def compare_orders(ranks: Ranks, loader: Any, first: int) -> None:
    """Raises `DataError` on all ranks where they begin with different batches. A collective.

    Args:
        ranks: The processes of the run.
        loader: The loader, whose order each of them has drawn.
        first: The hash of its first indices.
    """
    told = ranks.exchange([first], "comparison of the order of batches")
    others = [str(rank) for rank, mark in enumerate(told) if mark != told[0]]
    if others:
        raise DataError(
            f"The sampler of a loader ({type(loader).__name__}) gives other samples on rank "
            f"{', '.join(others)} than on rank 0, though it began in the same random states: its "
            f"weights or its lists differ, or it draws from a random state that it does not show. "
            f"Make it from the same numbers on all ranks, and from a fixed seed."
        )


def _content(batch: Any, before: int = 0) -> int:
    """Returns a hash of a batch, as far as it is cheap to tell: of plain types and tensors."""
    if isinstance(batch, Tensor):
        before = zlib.crc32(f"{batch.dtype}{tuple(batch.shape)}".encode(), before)
        if type(batch) is not Tensor or batch.is_sparse or batch.device.type != "cpu":
            return before
        some = batch.detach().reshape(-1)[:_LOOK].resolve_conj()
        return zlib.crc32(some.contiguous().view(uint8).numpy().data, before)
    inner = members_of(batch)
    if inner is None:
        text = repr(batch) if isinstance(batch, (int, float, str, bytes)) else type(batch).__name__
        return zlib.crc32(text.encode(), before)
    for key, item in inner:
        before = _content(item, zlib.crc32(str(key).encode(), before))
    return before


def how_divided(feed: Feed, limit: int | None) -> str:
    """Returns a line on how the batches of a training loader are divided between processes."""
    world, total = feed.world, loader_length(feed.loader)
    if total is not None and limit is not None:
        total = min(total, limit)
    if feed.own:
        why = "use_distributed_sampler=False" if feed.divided else "it has a DistributedSampler"
        return f"each process takes its training loader as it is ({why})"
    left = "whole rounds only"
    if total is not None:
        left = f"{feed.length(limit)} of {total} for each"
        if total % world:
            left += f", the last {total % world} of an epoch left out"
    how = f"batches of the training loader go to {world} processes in turn: {left}"
    if feed.reads and not isinstance(feed.loader, (list, tuple)):
        how += (
            f". Each process reads all of them, because the order is known to the loader alone; let "
            f"it read its part only, by rank, and say {_BY_ITSELF}"
        )
    return how


def batch_of_all(feed: Feed, accumulate: int) -> int | None:
    """Returns the samples in an optimizer step of all processes; None where nobody knows."""
    counts = sample_counts(feed.loader)
    return None if counts is None else counts.batch_size * feed.world * accumulate
