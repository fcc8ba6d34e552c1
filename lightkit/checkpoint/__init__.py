"""Checkpoints: what is in them, how they are written, checked and loaded."""

from __future__ import annotations

from lightkit.checkpoint.contents import collect, restore
from lightkit.checkpoint.files import (
    FORMAT,
    is_valid,
    latest,
    read_checkpoint,
    save_file,
    write_checkpoint,
)
from lightkit.checkpoint.rebuild import load_task
from lightkit.checkpoint.storable import storable, storable_hparams
from lightkit.checkpoint.weights import load_weights

__all__ = [
    "FORMAT",
    "collect",
    "is_valid",
    "latest",
    "load_task",
    "load_weights",
    "read_checkpoint",
    "restore",
    "save_file",
    "storable",
    "storable_hparams",
    "write_checkpoint",
]
