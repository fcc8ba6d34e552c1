"""Proves on this machine what lightkit promises: ``lightkit prove``."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lightkit
from lightkit import rng, trials
from lightkit.distributed import launched, resolve_device
from lightkit.errors import ConfigError, did_you_mean
from lightkit.proofs import (
    Found,
    cost_of_a_step,
    equal_to_a_loop_by_hand,
    killed_and_resumed,
    no_syncs_between_rows,
    plain_checkpoints,
    two_ranks_equal_one,
)

PROOFS: dict[str, tuple[str, Callable[[Path], Found]]] = {
    "by-hand": ("equal to a loop by hand, bit for bit", equal_to_a_loop_by_hand),
    "checkpoints": ("checkpoints are plain data", plain_checkpoints),
    "syncs": ("no waiting for the device between rows of the log", no_syncs_between_rows),
    "cost": ("the host time of a step", cost_of_a_step),
    "resume": ("kill -9 and resume, bit for bit", killed_and_resumed),
    "ranks": ("two ranks equal one process", two_ranks_equal_one),
}


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        name: What it is called on the command line.
        claim: What was promised.
        ok: Whether that holds.
        found: The figure, in words.
        numbers: The same for programs.
        seconds: How long it took.
    """

    name: str
    claim: str
    ok: bool
    found: str
    numbers: Mapping[str, float]
    seconds: float


def prove(names: Sequence[str] = ()) -> Iterator[Proof]:
    """Gives one proof after the other; one that raises has failed.

    Threads, random states and logging are as before when all are done, and no file is left.

    Args:
        names: Which of `PROOFS`; by default all.

    Raises:
        ConfigError: An unknown name, or a process of several.
    """
    if wrong := [name for name in names if name not in PROOFS]:
        allowed = f"{', '.join(PROOFS)}\n {did_you_mean(wrong[0], PROOFS)}".rstrip()
        raise ConfigError(f"prove: no proof {wrong[0]!r}\n  allowed: {allowed}")
    if launched().launched:
        raise ConfigError("prove: it starts two processes itself; run it without torchrun")
    return map(_proved, names or PROOFS)


def _proved(name: str) -> Proof:
    (claim, call), began = PROOFS[name], time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that are compared with this one
    try:
        with rng.preserved(), trials.silent(), tempfile.TemporaryDirectory() as folder:
            found = call(Path(folder))
    except Exception as error:  # noqa: BLE001  whatever it is, the others go on
        found = (False, f"{type(error).__name__}: {error}", {})
    finally:
        torch.set_num_threads(threads)
    return Proof(name, claim, *found, seconds=time.perf_counter() - began)


def report(names: Sequence[str] = (), *, as_data: bool = False) -> int:
    """Proves, and writes what was found: a line for each as it ends, or JSON.

    Returns:
        0, or 1 where a proof has failed.
    """
    wanted = prove(names)
    began, device = time.perf_counter(), resolve_device(devices=1)
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {"lightkit": lightkit.__version__, "torch": torch.__version__}
    about |= {"python": platform.python_version(), "system": platform.system()}
    about["device"] = f"{device.type} ({here})"
    if not as_data:
        _write("  ".join(f"{name} {value}" for name, value in about.items()))
    proofs = []
    for proof in wanted:
        proofs.append(proof)
        if not as_data:
            state = "OK    " if proof.ok else "FAILED"
            _write(f"{state}  {proof.claim} ({proof.seconds:.1f} s)", f"        {proof.found}")
    seconds, held = time.perf_counter() - began, sum(proof.ok for proof in proofs)
    ok = held == len(proofs)
    if as_data:
        found = {"ok": ok, "seconds": seconds, **about, "proofs": [asdict(p) for p in proofs]}
        _write(json.dumps(found, indent=2))
    else:
        _write(f"{held} of {len(proofs)} hold; {seconds:.0f} s, and no file is left")
    return 0 if ok else 1


def _write(*lines: str) -> None:
    """Writes lines, folded to a terminal."""
    for line in lines:
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, subsequent_indent=" " * 8, break_long_words=False)
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
