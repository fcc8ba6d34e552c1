"""Devices, processes and how a task runs on them."""

from __future__ import annotations

from lightkit.distributed.devices import resolve_device
from lightkit.distributed.env import LaunchEnv, launched, require_single_process
from lightkit.distributed.strategies import SingleDevice, Strategy

__all__ = [
    "LaunchEnv",
    "SingleDevice",
    "Strategy",
    "launched",
    "require_single_process",
    "resolve_device",
]
