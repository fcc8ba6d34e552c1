"""Batches on their way from a loader to the step."""

import typing

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

if typing.TYPE_CHECKING:
    from lightkit.data.comparing import batch_of_all, compared, how_divided
    from lightkit.data.feed import Feed, order_of
    from lightkit.data.planning import seed_from
    from lightkit.data.shares import Share
    from lightkit.data.stream import END, BatchStream
else:
    _ROOMS = {
        "comparing": ("batch_of_all", "compared", "how_divided"),
        "feed": ("Feed", "order_of"),
        "planning": ("seed_from",),
        "shares": ("Share",),
        "stream": ("END", "BatchStream"),
    }

    def __getattr__(name: str) -> object:
        """Imports what only a running loop needs when it is first asked for."""
        import importlib

        room = next((room for room, names in _ROOMS.items() if name in names), None)
        if room is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{room}"), name)


__all__ = [
    "DATA_NAMES",
    "END",
    "BatchStream",
    "DataModule",
    "Feed",
    "SampleCounts",
    "Share",
    "batch_of_all",
    "batch_size_of",
    "compared",
    "generators",
    "how_divided",
    "limited",
    "loader_length",
    "move_to_device",
    "named_loaders",
    "order_of",
    "sample_counts",
    "seed_from",
]
