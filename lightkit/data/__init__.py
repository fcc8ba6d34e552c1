"""Batches on their way from a loader to the step."""

from __future__ import annotations

from lightkit.data.feed import Feed
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
from lightkit.data.stream import END, BatchStream

__all__ = [
    "DATA_NAMES",
    "END",
    "BatchStream",
    "DataModule",
    "Feed",
    "Group",
    "SampleCounts",
    "batch_size_of",
    "generators",
    "groups",
    "limited",
    "loader_length",
    "move_to_device",
    "named_loaders",
    "sample_counts",
    "seed_from",
]
