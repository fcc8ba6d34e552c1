"""Which device a process uses: the launcher decides how many processes there are."""

from __future__ import annotations

from typing import Any

import torch

from lightkit.distributed.env import LaunchEnv, torchrun_line
from lightkit.errors import ConfigError, did_you_mean

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_CPU_ADVICE = 'To run on the CPU: Trainer(gpus=0) or Trainer(accelerator="cpu").'


def resolve_device(
    accelerator: str | None = "auto",
    devices: Any = "auto",
    gpus: Any = None,
    *,
    env: LaunchEnv = LaunchEnv(),  # noqa: B008  it cannot be changed
    num_nodes: int | None = None,
) -> torch.device:
    """Chooses the device of this process: CUDA if there is any, else the CPU.

    Each process has one device. How many processes there are is the launcher's decision: under
    torchrun the process with local rank i takes card i, or the i-th of a list, and a number must
    be 1 (one for each process) or the number of processes on this machine.

    Args:
        accelerator: "auto", "cpu", "gpu" or "cuda" (the same), or "mps", which is taken only when
            named. None is "auto".
        devices: How many: "auto" or None or 1 for one, -1 for all, ``[i]`` or ``"i,"`` for card i.
        gpus: The short form: 0 is the CPU, 1 a GPU, ``[i]`` card i, -1 all, "auto" one if there is
            any. Excludes ``devices``.
        env: This process among those that were started.
        num_nodes: The number of machines, for the command that an error proposes.

    Raises:
        ConfigError: An unknown name, a device that is not there, contradictory arguments, or
            another number of devices than of processes.
    """
    kind, count, asked, present = _chosen(accelerator, devices, gpus)
    if kind == "mps":
        return _mps(count, asked, env)
    _check_count(count, asked, env, present, num_nodes or 1)
    return _card(count, asked, env, present) if kind == "cuda" else torch.device("cpu")


def processes(
    accelerator: str | None, devices: Any, gpus: Any, num_nodes: int | None = None
) -> int:
    """Returns how many processes these arguments of the Trainer ask for on this machine.

    Raises:
        ConfigError: As `resolve_device`; and for several machines, on each of which somebody has
            to start a launcher.
    """
    kind, count, _, present = _chosen(accelerator, devices, gpus)
    number = len(count) if isinstance(count, list) else 1 if count is None else count
    number = present if number == -1 else number
    if num_nodes is not None and num_nodes > 1:
        raise ConfigError(
            f"num_nodes={num_nodes}: a command starts processes on its own machine only. Run on "
            f"each of the {num_nodes} machines:\n  {torchrun_line(number, num_nodes)}"
        )
    return 1 if kind == "mps" else number


def _chosen(
    accelerator: Any, devices: Any, gpus: Any
) -> tuple[str, int | list[int] | None, str, int]:
    """Returns the kind of device, how many, the words that asked for them, and how many there are."""
    accelerator = _accelerator(accelerator)
    if gpus is not None and devices is not None and devices != "auto":
        raise ConfigError(
            f"gpus={gpus!r} and devices={devices!r} both say how many devices to use. Give one."
        )
    argument, given = ("devices", devices) if gpus is None else ("gpus", gpus)
    asked = f"{argument}={given!r}"
    count = _count(given, argument)
    kind, named = _kind(accelerator, count, gpus is not None, asked)
    if isinstance(count, list) and kind != "cuda":
        raise ConfigError(
            f'{asked} selects a card, but accelerator="{accelerator}" has none to select. '
            f"Give devices=1."
        )
    count = 1 if count == 0 else count  # the CPU, once for each process
    return kind, count, asked, _cards(named) if kind == "cuda" else 1


def _accelerator(given: Any) -> str:
    """Returns a valid accelerator name in small letters."""
    name = "auto" if given is None else given
    if not isinstance(name, str) or name.lower() not in _ACCELERATORS:
        raise ConfigError(
            f"accelerator={given!r} is unknown.{did_you_mean(str(given), _ACCELERATORS)} Give one "
            f"of {', '.join(_ACCELERATORS)}."
        )
    return name.lower()


def _count(given: Any, argument: str) -> int | list[int] | None:
    """Normalises a choice: a number (-1 for all), a list of indices, None for "auto"."""
    value = given
    if isinstance(value, str):
        text = value.strip()
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if text == "auto":
            value = None
        elif all(part.removeprefix("-").isdigit() for part in parts) and parts:
            value = [int(part) for part in parts] if "," in text else int(text)
    if value is None:
        return None
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value):
        return value
    if type(value) is int and value >= -1:
        return value
    raise ConfigError(
        f"{argument}={given!r} cannot be read. Give a number, a list with the index of one card, "
        f'-1 (all) or "auto".'
    )


def _kind(
    accelerator: str, count: int | list[int] | None, by_gpus: bool, asked: str
) -> tuple[str, str]:
    """Returns the kind of device, and the words that asked for it."""
    if by_gpus and count == 0:
        if accelerator not in ("auto", "cpu"):
            raise ConfigError(
                f'gpus=0 means the CPU, but accelerator="{accelerator}" does not. Remove one.'
            )
        return "cpu", asked
    if by_gpus and accelerator in ("cpu", "mps"):
        raise ConfigError(
            f'{asked} asks for a CUDA GPU, but accelerator="{accelerator}" does not. Remove one.'
        )
    if count == 0:
        raise ConfigError('devices=0 leaves nothing to run on. For the CPU: accelerator="cpu".')
    if accelerator in ("gpu", "cuda"):
        return "cuda", asked if count is not None else f'accelerator="{accelerator}"'
    wants_card = isinstance(count, list) or (by_gpus and count is not None)
    if accelerator == "auto" and (torch.cuda.is_available() or wants_card):
        return "cuda", asked
    return ("mps" if accelerator == "mps" else "cpu"), asked


def _check_count(
    count: int | list[int] | None, asked: str, env: LaunchEnv, present: int, nodes: int
) -> None:
    """Raises `ConfigError` unless there is one process for each device that is asked for."""
    number = len(count) if isinstance(count, list) else count
    if env.launched:
        here = env.local_world_size
        # One list for all processes; a list of one card would put all of them onto it.
        alone = 1 if not isinstance(count, list) else here
        if number not in (None, -1, alone, here):
            raise ConfigError(
                f"{asked} asks for {number} {_plural('device', number)}, but the launcher started "
                f"{here} {_plural('process', here)} on this machine (LOCAL_WORLD_SIZE), each with "
                f"one device. Start {number} (torchrun --nproc-per-node {number}), or leave the "
                f"number to the launcher: devices=1."
            )
        return
    number = present if number == -1 else number
    if number is not None and number > 1:
        raise ConfigError(
            f"{asked} asks for {number} devices, and each needs a process of its own. Start them "
            f"by torch's launcher:\n  {torchrun_line(number, nodes)}"
        )


def _cards(asked: str) -> int:
    """Returns how many CUDA cards this process sees, at least one."""
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present == 0:
        build = " (this torch is built without CUDA)" if torch.version.cuda is None else ""
        raise ConfigError(f"{asked} asks for a GPU, but torch sees none{build}. {_CPU_ADVICE}")
    return present


def _card(count: int | list[int] | None, asked: str, env: LaunchEnv, present: int) -> torch.device:
    """Returns the CUDA card of this process."""
    listed = isinstance(count, list)
    index = count[env.local_rank] if isinstance(count, list) else env.local_rank
    if listed and len(set(count)) < len(count):  # type: ignore[arg-type]
        raise ConfigError(f"{asked} names a card twice. Each process needs one of its own.")
    if index < present:
        return torch.device("cuda", index)
    if listed:
        raise ConfigError(
            f"{asked} selects card {index}, but there are only {present}: 0 to {present - 1}."
        )
    raise ConfigError(
        f"the launcher started {env.local_world_size} processes on this machine "
        f"(LOCAL_WORLD_SIZE), but torch sees {present} {_plural('GPU', present)}, and each process "
        f"needs one. Start {present} (torchrun --nproc-per-node {present}), or train on the CPU: "
        f'Trainer(accelerator="cpu").'
    )


def _mps(count: int | list[int] | None, asked: str, env: LaunchEnv) -> torch.device:
    """Returns the Apple GPU, which only one process can train on."""
    if not torch.backends.mps.is_available():
        raise ConfigError(
            f'accelerator="mps" asks for an Apple GPU, but torch sees none. {_CPU_ADVICE}'
        )
    if env.world_size > 1:
        raise ConfigError(
            f'accelerator="mps" trains in one process, but the launcher started {env.world_size}. '
            f"Start it by plain python. {_CPU_ADVICE}"
        )
    if count not in (None, 1, -1):
        raise ConfigError(f'{asked}, but accelerator="mps" has one device. Give devices=1.')
    return torch.device("mps")


def _plural(word: str, number: int | None) -> str:
    """Returns a word with the ending for so many."""
    return word if number == 1 else word + ("es" if word.endswith("s") else "s")
