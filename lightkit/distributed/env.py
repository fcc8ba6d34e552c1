"""How this process was started. The only reader of environment variables."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from lightkit.errors import ConfigError

_log = logging.getLogger("lightkit")
P = ParamSpec("P")
R = TypeVar("R")


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
        has_error_file: Whether the launcher wants to be told of an error in a file.
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
    has_error_file: bool = False


def launched() -> LaunchEnv:
    """Reads what torchrun says about this process; one process of one where it was not used.

    Raises:
        ConfigError: A variable that holds no number, or several processes without their numbers.
    """
    world_size = _number("WORLD_SIZE", 1)
    if world_size > 1 and "RANK" not in os.environ:
        raise ConfigError(
            f"The environment says WORLD_SIZE={world_size}, but not which of these processes this "
            f"is (RANK). Start the program by torchrun, which sets both, or unset WORLD_SIZE."
        )
    return LaunchEnv(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=world_size,
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        node=_number("GROUP_RANK", 0),
        restart=_number("TORCHELASTIC_RESTART_COUNT", 0),
        launched="RANK" in os.environ,
        master_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number("MASTER_PORT", 29500),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        has_error_file=os.environ.get("TORCHELASTIC_ERROR_FILE", "") != "",
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


def environment(*, without: Sequence[str]) -> dict[str, str]:
    """Returns the variables for a process to start, without some of them."""
    return {name: value for name, value in os.environ.items() if name not in without}


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


def require_launcher(env: LaunchEnv) -> None:
    """Raises `ConfigError` where srun started several processes that know nothing of each other.

    Without the variables of torchrun each of them would train by itself, and write the same files.
    """
    # A batch script has SLURM_NTASKS too; only srun makes a step.
    tasks = _number("SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_STEP_ID" in os.environ:
        tasks = _number("SLURM_STEP_NUM_TASKS", _number("SLURM_NTASKS", 1))
    if env.launched or tasks < 2:
        return
    nodes = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
    raise ConfigError(
        f"srun started {tasks} processes, but not by torchrun, so they would train without knowing "
        f"of each other. Give srun one task for each machine (--ntasks-per-node=1), which starts:\n"
        f"  {torchrun_line(max(1, tasks // nodes), nodes)}"
    )


def check_nodes(num_nodes: int | None, env: LaunchEnv) -> None:
    """Raises `ConfigError` unless as many machines take part as ``Trainer(num_nodes=)`` says.

    Args:
        num_nodes: The number that was given; None leaves it to the launcher.
        env: This process among those that were started.
    """
    there = env.world_size // env.local_world_size
    if num_nodes in (None, there):
        return
    if not env.launched:
        raise ConfigError(
            f"num_nodes={num_nodes}, but plain python starts one process on one machine. Run on "
            f"each of the {num_nodes} machines:\n  {torchrun_line(1, num_nodes)}"
        )
    raise ConfigError(
        f"num_nodes={num_nodes}, but the launcher started {env.world_size} processes, "
        f"{env.local_world_size} of them on this machine: that is num_nodes={there}. Start it with "
        f"torchrun --nnodes {num_nodes}, or leave num_nodes out."
    )


def rank_zero_info(message: object, *args: object) -> None:
    """Says a line by the logger "lightkit", on rank zero alone; ``args`` are put into it."""
    if launched().rank == 0:
        _log.info(message, *args)


def rank_zero_warn(
    message: object, *, category: type[Warning] = UserWarning, stacklevel: int = 1
) -> None:
    """Warns on rank zero alone: of the line that calls, or of one ``stacklevel`` - 1 calls above."""
    if launched().rank == 0:
        warnings.warn(str(message), category, stacklevel=stacklevel + 1)


def rank_zero_only(call: Callable[P, R]) -> Callable[P, R | None]:
    """Makes a function that only rank zero of several processes runs; the others get None.

    For what prints or writes in the user's own code::

        @lk.rank_zero_only
        def report(text): ...
    """

    @functools.wraps(call)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return call(*args, **kwargs) if launched().rank == 0 else None

    return alone


def torchrun_line(processes: int, nodes: int = 1) -> str:
    """Returns the command that starts this very program in several processes.

    Args:
        processes: How many on each machine.
        nodes: On how many machines; one line that is right for each of them.
    """
    import shlex  # only where an error or a command says it

    where = f"--nproc-per-node {processes}"
    if nodes > 1:
        where = f"--nnodes {nodes} {where} --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500"
    return f"torchrun {where} {shlex.join(_program())}"


def _program() -> list[str]:
    """Returns the words after ``torchrun`` that start what this process runs."""
    script, arguments = sys.argv[0], sys.argv[1:]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m
        return ["-m", spec.name.removesuffix(".__main__"), *arguments]
    if os.path.basename(script) == "lightkit":  # the installed command
        return ["-m", "lightkit", *arguments]
    if not os.path.isfile(script) or "ipykernel" in script:
        return ["train.py"]  # a notebook or a line of code: what torchrun needs is a file
    return [script, *arguments]
