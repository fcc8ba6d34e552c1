"""Devices, processes and how a task runs on them."""

from __future__ import annotations

from lightkit.distributed.choose import check_strategy, make_strategy
from lightkit.distributed.devices import processes, resolve_device
from lightkit.distributed.env import (
    LaunchEnv,
    check_nodes,
    job_id,
    launched,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    require_launcher,
    slurm_job,
    torchrun_line,
)
from lightkit.distributed.ranks import Ranks, join, report
from lightkit.distributed.strategies import SingleDevice, Strategy

__all__ = [
    "LaunchEnv",
    "Ranks",
    "SingleDevice",
    "Strategy",
    "check_nodes",
    "check_strategy",
    "job_id",
    "join",
    "launched",
    "make_strategy",
    "processes",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "report",
    "require_launcher",
    "resolve_device",
    "slurm_job",
    "torchrun_line",
]
