"""Devices, processes and how a task runs on them."""

from __future__ import annotations

from lightkit.distributed.choose import check_strategy, make_strategy
from lightkit.distributed.devices import resolve_device
from lightkit.distributed.env import LaunchEnv, job_id, launched, require_single_process, slurm_job
from lightkit.distributed.ranks import Ranks, join
from lightkit.distributed.strategies import SingleDevice, Strategy

__all__ = [
    "LaunchEnv",
    "Ranks",
    "SingleDevice",
    "Strategy",
    "check_strategy",
    "job_id",
    "join",
    "launched",
    "make_strategy",
    "require_single_process",
    "resolve_device",
    "slurm_job",
]
