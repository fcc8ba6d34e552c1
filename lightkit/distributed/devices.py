"""Which device a run uses."""

from __future__ import annotations

from typing import Any

import torch

from lightkit.errors import ConfigError, did_you_mean

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_CPU_ADVICE = 'To run on the CPU: Trainer(gpus=0) or Trainer(accelerator="cpu").'


def resolve_device(
    accelerator: str | None = "auto", devices: Any = "auto", gpus: Any = None
) -> torch.device:
    """Chooses the one device of a run: CUDA if there is any, else the CPU.

    Args:
        accelerator: "auto", "cpu", "gpu" or "cuda" (the same), or "mps", which is taken only when
            named. None is "auto".
        devices: How many: "auto" or None or 1 for one, -1 for all (if there is one), ``[i]`` or
            ``"i,"`` for card i.
        gpus: The short form: 0 is the CPU, 1 a GPU, ``[i]`` card i, -1 all (if there is one),
            "auto" one if there is any. Excludes ``devices``.

    Raises:
        ConfigError: An unknown name, a device that is not there, contradictory arguments, or more
            than one device, which this version does not do.
    """
    accelerator = _accelerator(accelerator)
    if gpus is None:
        return _by_devices(accelerator, _count(devices, "devices"), devices)
    if devices is not None and devices != "auto":
        raise ConfigError(
            f"gpus={gpus!r} and devices={devices!r} both say how many devices to use. Give one."
        )
    return _by_gpus(accelerator, _count(gpus, "gpus"), gpus)


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


def _by_gpus(accelerator: str, count: int | list[int] | None, given: Any) -> torch.device:
    """Resolves the argument ``gpus``."""
    if count == 0:
        if accelerator not in ("auto", "cpu"):
            raise ConfigError(
                f'gpus=0 means the CPU, but accelerator="{accelerator}" does not. Remove one.'
            )
        return torch.device("cpu")
    if accelerator in ("cpu", "mps"):
        raise ConfigError(
            f'gpus={given!r} asks for a CUDA GPU, but accelerator="{accelerator}" does not. '
            f"Remove one."
        )
    if count is None:
        return _by_devices(accelerator, None, None)
    return _cuda(count, f"gpus={given!r}")


def _by_devices(accelerator: str, count: int | list[int] | None, given: Any) -> torch.device:
    """Resolves the arguments ``accelerator`` and ``devices``."""
    asked = f"devices={given!r}"
    if count == 0:
        raise ConfigError('devices=0 leaves nothing to run on. For the CPU: accelerator="cpu".')
    if accelerator in ("gpu", "cuda"):
        if count is None:
            return _cuda(1, f'accelerator="{accelerator}"')
        return _cuda(count, asked)
    if accelerator == "auto" and (torch.cuda.is_available() or isinstance(count, list)):
        return _cuda(1 if count is None else count, asked)
    _check_single(count, asked)
    if isinstance(count, list):
        raise ConfigError(
            f'{asked} selects a card, but accelerator="{accelerator}" has none to select. '
            f"Give devices=1."
        )
    if accelerator == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                f'accelerator="mps" asks for an Apple GPU, but torch sees none. {_CPU_ADVICE}'
            )
        return torch.device("mps")
    return torch.device("cpu")


def _check_single(count: int | list[int] | None, asked: str) -> None:
    """Raises `ConfigError` where more than one device is asked for."""
    if (isinstance(count, list) and len(count) > 1) or (isinstance(count, int) and count > 1):
        raise ConfigError(
            f"{asked} asks for more than one device, which this version of lightkit does not do. "
            f"Give 1, or a list with the index of one card."
        )


def _cuda(count: int | list[int], asked: str) -> torch.device:
    """Returns the CUDA card that is asked for."""
    _check_single(count, asked)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present == 0:
        build = " (this torch is built without CUDA)" if torch.version.cuda is None else ""
        raise ConfigError(f"{asked} asks for a GPU, but torch sees none{build}. {_CPU_ADVICE}")
    if count == -1 and present > 1:
        raise ConfigError(
            f"{asked} asks for all {present} GPUs, but this version of lightkit uses one device. "
            f"Give 1, or a list with the index of one card."
        )
    index = count[0] if isinstance(count, list) else 0
    if index >= present:
        raise ConfigError(
            f"{asked} selects card {index}, but there are only {present}: 0 to {present - 1}."
        )
    return torch.device("cuda", index)
