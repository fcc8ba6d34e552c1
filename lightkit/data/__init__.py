"""Batches on their way from a loader to the step."""

from __future__ import annotations

from lightkit.data.comparing import batch_of_all, compared, how_divided
from lightkit.data.feed import Feed, order_of
from lightkit.data.groups import Group, groups
from lightkit.data.loaders import (
    SampleCounts,
    generators,
    limited,
    loader_length,
    named_loaders,
    sample_counts,
)
from lightkit.data.module import DATA_NAMES, DataModule
from lightkit.data.move import batch_size_of, move_to_device
from lightkit.data.planning import seed_from
from lightkit.data.shares import Share
from lightkit.data.stream import END, BatchStream

__all__ = [
    "DATA_NAMES",
    "END",
    "BatchStream",
    "DataModule",
    "Feed",
    "Group",
    "SampleCounts",
    "Share",
    "batch_of_all",
    "batch_size_of",
    "compared",
    "generators",
    "groups",
    "how_divided",
    "limited",
    "loader_length",
    "move_to_device",
    "named_loaders",
    "order_of",
    "sample_counts",
    "seed_from",
]
