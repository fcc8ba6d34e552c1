"""How this process was started. The only reader of environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """This process among those that a launcher started together.

    Attributes:
        rank: Number of this process, from 0.
        local_rank: Number of this process on its machine, from 0.
        world_size: Number of processes.
        local_world_size: Number of processes on this machine.
        node: Number of this machine, from 0.
        restart: How often the launcher has started all processes again.
        launched: Whether a launcher started this process, be it as the only one.
        master_address: Where the processes meet.
        master_port: Likewise.
        agent_store: Whether the launcher serves there, and not rank zero.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: int = 0
    restart: int = 0
    launched: bool = False
    master_address: str = "127.0.0.1"
    master_port: int = 29500
    agent_store: bool = False


def launched() -> LaunchEnv:
    """Reads what torchrun says about this process; one process of one where it was not used.

    Raises:
        ConfigError: A variable that holds no number.
    """
    return LaunchEnv(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        node=_number("GROUP_RANK", 0),
        restart=_number("TORCHELASTIC_RESTART_COUNT", 0),
        launched="RANK" in os.environ,
        master_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number("MASTER_PORT", 29500),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def job_id() -> str:
    """Returns the job of torchrun or SLURM that started this process; "" for none.

    A job that is started again after a failure keeps its name.
    """
    for word, name in (("torchrun", "TORCHELASTIC_RUN_ID"), ("slurm", "SLURM_JOB_ID")):
        value = os.environ.get(name, "")
        if value not in ("", "none"):  # torchrun's default says nothing
            return f"{word} {value}"
    return ""


def slurm_job() -> str:
    """Returns the SLURM job of this process as ``scontrol`` knows it; "" for none."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{word}_ID", "") for word in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _number(name: str, default: int) -> int:
    """Returns the environment variable ``name`` as a number."""
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"The environment variable {name} is {text!r}, but it must hold a number. Unset it, or "
            f"start the program by torchrun, which sets it."
        ) from None


def require_single_process(env: LaunchEnv) -> None:
    """Raises `ConfigError` where several processes were started: they would train unsynchronised."""
    if env.world_size > 1:
        raise ConfigError(
            f"started by torchrun with WORLD_SIZE={env.world_size}, but this version of lightkit "
            f"trains in one process: start it with plain python"
        )
