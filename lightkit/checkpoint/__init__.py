"""Checkpoints: what is in them, how they are written, checked and loaded."""

from __future__ import annotations

from lightkit.checkpoint.contents import collect, restore
from lightkit.checkpoint.files import (
    FORMAT,
    is_valid,
    read_any,
    read_checkpoint,
    save_file,
    settle,
    write_checkpoint,
)
from lightkit.checkpoint.newest import latest
from lightkit.checkpoint.rebuild import load_task
from lightkit.checkpoint.spread import on_every_rank, random_states, saved_ranks
from lightkit.checkpoint.storable import storable, storable_hparams
from lightkit.checkpoint.weights import load_weights
from lightkit.checkpoint.writer import Writer

__all__ = [
    "FORMAT",
    "Writer",
    "collect",
    "is_valid",
    "latest",
    "load_task",
    "load_weights",
    "on_every_rank",
    "random_states",
    "read_any",
    "read_checkpoint",
    "restore",
    "save_file",
    "saved_ranks",
    "settle",
    "storable",
    "storable_hparams",
    "write_checkpoint",
]
