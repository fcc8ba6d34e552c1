"""The random states of a process: seed them, take them, put them back.

Python's ``random``, NumPy's global state, torch on the CPU and on every CUDA device. NumPy is
optional: a process that never imported it has no state of it to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import operator
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lightkit.errors import ConfigError

_log = logging.getLogger("lightkit")

#: The largest seed that NumPy takes; the others take more.
MAX_SEED = 2**32 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seeds Python's ``random``, NumPy (if installed) and torch on all devices.

    Args:
        seed: From 0 to 4294967295 (``2**32 - 1``). ``None`` draws one from the operating system.
        workers: Accepted for ported code. Worker processes of a loader need no more than this
            call: torch derives their seeds from the random state that is seeded here.
        verbose: Say the seed, so that a run with a drawn seed can be repeated.

    Returns:
        The seed that was used.

    Raises:
        ConfigError: ``seed`` is not an integer or is out of range.
    """
    seed = _checked(seed)
    random.seed(seed)
    # Imported here even if nobody did yet: NumPy that is imported later must not start unseeded.
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed(seed)
    torch.manual_seed(seed)
    if verbose:
        _log.info("seed: %d", seed)
    return seed


def rng_state() -> dict[str, Any]:
    """Returns all random states of this process as plain types and tensors.

    A file that holds them loads with ``weights_only=True``. CUDA states are included once CUDA is
    in use; reading them waits for no kernel.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, key, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "key": torch.from_numpy(key.astype("int64")),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned.

    States of devices that this machine does not have are left out, so that a run from a GPU can
    go on without one.
    """
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        with contextlib.suppress(ImportError):
            import numpy

            s = state["numpy"]
            key = s["key"].cpu().numpy().astype("uint32")
            numpy.random.set_state((s["name"], key, s["position"], s["has_gauss"], s["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, device_state in zip(
            range(torch.cuda.device_count()), state["cuda"], strict=False
        ):
            torch.cuda.set_rng_state(device_state.cpu(), device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


def for_rank(rank: int) -> None:
    """Puts this process on random streams of its own, made of torch's present one and its number.

    Rank zero stays on the present ones, as the only process does. Where all ranks stand at the same
    state before, their streams are the same at every repetition, and another one on each rank.

    Args:
        rank: The number of this process, from 0.
    """
    if not rank:
        return
    present = torch.get_rng_state().numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(present + b" rank %d" % rank).digest()[:8], "big")
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & MAX_SEED)
    torch.manual_seed(seed)


def derived(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Returns what `rng_state` is in a process that `for_rank` put on its own from ``state``."""
    with preserved():
        set_rng_state(state)
        for_rank(rank)
        return rng_state()


@contextlib.contextmanager
def preserved(*generators: torch.Generator) -> Iterator[None]:
    """Puts all random states back at its end, whatever was drawn in between.

    Args:
        generators: Generators beside the global ones whose states are put back too.
    """
    state, own = rng_state(), [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, before in zip(generators, own, strict=True):
            generator.set_state(before)
        set_rng_state(state)
        if "cuda" not in state and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # CUDA woke up in between, so before it stood at the start of its seed.
            for generator in torch.cuda.default_generators:
                generator.manual_seed(generator.initial_seed())


def _checked(seed: int | None) -> int:
    """Returns ``seed`` as an int in range, drawn if it is None."""
    if seed is None:
        return int.from_bytes(os.urandom(4), "big")
    allowed = f"an integer from 0 to {MAX_SEED} (2**32 - 1), or None to draw one"
    try:
        number = operator.index(seed)
    except TypeError:
        raise ConfigError(
            f"seed={seed!r} is a {type(seed).__name__}; it must be {allowed}."
        ) from None
    if not 0 <= number <= MAX_SEED:
        raise ConfigError(f"seed={number} is out of range; it must be {allowed}.")
    return number
