"""Proof that several processes train as one does."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from lightkit import rng
from lightkit.checkpoint import read_any
from lightkit.distributed import launched
from lightkit.errors import UsageError
from lightkit.testing import member
from lightkit.testing.given import patterns, quiet

_FEWEST, _SHOWN, _LINES = 2, 6, 40
_LAUNCHER = "torch/distributed/elastic/"  # with it begins what torchrun says at an end
_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False),
    **dict.fromkeys(("hints", "logger", "rehearse", "fused"), False),
    "num_sanity_val_steps": 0,
    "max_epochs": 2,
    "precision": "64",
}
_WHY = (
    "What usually causes it: random numbers that the step draws, which differ over ranks (dropout: set "
    "p to 0 for the proof); values that are kept or averaged in the task instead of by self.log or a "
    "metric, which know of the other ranks; what depends on the rank or on the number of batches. "
    "Running means of batch norms are those of each rank's own batches: ignore=['val_*'] leaves out "
    "what is computed with them."
)


def assert_same_on_ranks(
    make: Callable[[], Sequence[Any]],
    *,
    ranks: int = 2,
    tolerance: float = 1e-6,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    limit: float = 120.0,
    **options: Any,
) -> None:
    """Asserts that several processes give the losses, the means and the weights of one.

    Starts real processes with torchrun, on the CPU, and trains there what ``make`` returns; then trains
    it here, with as many batches in each step as all ranks have together. The means of each epoch and
    the parameters at the end must be equal, on each rank, but for rounding. It computes with 64 bits,
    so that rounding is small; ``precision=32`` where a task cannot.

    Args:
        make: A function at the top level of a module, which each process imports; it returns the
            task and its data, as ``fit`` takes them: ``(task, train_loader, val_loader)``.
        ranks: Processes.
        tolerance: By how much numbers may differ: absolutely, and as a part of them.
        seed: Seeds each process before ``make`` is called.
        ignore: Names that may differ, as patterns of `fnmatch`: of means ("val_*"), of parameters.
        limit: Seconds after which the processes are ended.
        options: Arguments of the Trainer, as plain values. ``max_epochs`` is 2 by default.

    Raises:
        AssertionError: Something differs, or a process failed; it says what.
        UsageError: What was given cannot be tried like this.
    """
    ignore = patterns(ignore)
    order = _order(make, ranks, seed, options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "order.json").write_text(order, encoding="utf-8")
        _run(ranks, folder, limit)
        files = [folder / f"rank_{rank}.pt" for rank in range(ranks)]
        found = [read_any(file) for file in files]
        own = dict(options)
        own["accumulate_grad_batches"] = ranks * own.get("accumulate_grad_batches", 1)
        for name in ("limit_val_batches", "val_check_interval"):  # whole numbers are of each rank
            if type(own.get(name)) is int:
                own[name] *= ranks
        own["limit_train_batches"] = ranks * found[0].pop("batches")
        with rng.preserved(), quiet():
            alone = train(make, seed, folder, own)
    apart: dict[str, str] = {}  # each name once, on the first rank
    for rank, there in enumerate(found):
        apart = {**dict(_apart(alone, there, rank, tolerance, ignore)), **apart}
    if apart:
        lines = [f"  {name}: {how}" for name, how in apart.items()]
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        head = f"{ranks} processes do not train as one does:"
        raise AssertionError("\n".join([head, *lines[:_SHOWN], *more, _WHY]))


def train(
    make: Callable[[], Sequence[Any]], seed: int, folder: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains what ``make`` returns, and returns what is compared."""
    from lightkit.trainer import Trainer

    rng.seed_everything(seed, verbose=False)
    trainer = Trainer(**{**_OPTIONS, **options}, accelerator="cpu", default_root_dir=folder)
    made = make()
    made = made if isinstance(made, (list, tuple)) else (made,)
    history = trainer.fit(*made)
    return {
        "batches": trainer.num_training_batches,
        "means": [{k: v for k, v in row.items() if k != "time"} for row in history],
        "parameters": {n: p.detach() for n, p in made[0].named_parameters()},
    }


def _order(make: Any, ranks: int, seed: int, options: Mapping[str, Any]) -> str:
    """Returns what the processes are told.

    Raises:
        UsageError: They cannot be told it.
    """
    if launched().launched:
        raise UsageError(
            "assert_same_on_ranks starts processes itself: call it outside of torchrun, and in a "
            "script below if __name__ == '__main__', which its processes pass over."
        )
    if not isinstance(ranks, int) or ranks < _FEWEST:
        raise UsageError(f"ranks={ranks!r}; it must be a number of processes, from 2 on.")
    name = getattr(make, "__qualname__", "<object>")
    file = inspect.getsourcefile(inspect.unwrap(make)) if inspect.isfunction(make) else None
    if "<" in name or file is None or not Path(file).is_file():
        raise UsageError(
            f"{name} cannot be imported by other processes. Give a function that is defined at the top "
            f"level of a file, and returns the task and its loaders."
        )
    try:
        function = (make.__module__, file, name)
        told = {"function": function, "seed": seed, "options": options, "path": sys.path}
        return json.dumps(told)
    except TypeError as error:
        raise UsageError(
            f"Options go to other processes as plain values ({error}). Callbacks can be returned by "
            f"the task's configure_callbacks."
        ) from error


def _run(ranks: int, folder: Path, limit: float) -> None:
    """Runs torchrun until its end.

    Raises:
        AssertionError: It failed, or was not done after ``limit`` seconds.
    """
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words += [str(Path(member.__file__)), str(folder)]
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603  this very Python
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        with ended(process):
            try:
                code = process.wait(limit)
                told = f"ended with code {code}"
            except subprocess.TimeoutExpired:
                code, told = 1, f"did not end within {limit:g} s"
        if code:
            output.seek(0)
            errors = [file.read_text("utf-8") for file in sorted(folder.glob("error_*.txt"))]
            own = output.read().partition(_LAUNCHER)[0].rpartition("\n")[0].splitlines()
            text = errors[0] if errors else "\n".join(own[-_LINES:])
            raise AssertionError(f"The {ranks} processes {told}:\n{text}")


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Sees to it that torchrun and its processes have ended."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its own processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            process.kill()
            process.wait()


def _apart(
    alone: Mapping[str, Any],
    there: Mapping[str, Any],
    rank: int,
    tolerance: float,
    ignore: Sequence[str],
) -> Iterator[tuple[str, str]]:
    """Yields what differs on a rank from one process: a name, and how."""
    pairs: list[tuple[str, Any, Any]] = [("epochs", len(alone["means"]), len(there["means"]))]
    for epoch, (one, two) in enumerate(zip(alone["means"], there["means"], strict=False), 1):
        pairs += [
            (f"{name} of epoch {epoch}", one.get(name), two.get(name)) for name in {**one, **two}
        ]
    for name, one in alone["parameters"].items():
        pairs.append((name, one, there["parameters"].get(name)))
    for name, one, two in pairs:
        if any(fnmatchcase(name.partition(" of ")[0], pattern) for pattern in ignore):
            continue
        if one is None or two is None:
            yield name, f"only {'in one process' if two is None else f'on rank {rank}'}"
        elif isinstance(one, torch.Tensor):
            most = float((one - two).abs().max()) if one.numel() else 0.0
            if not torch.allclose(one, two, rtol=tolerance, atol=tolerance):
                yield name, f"apart by up to {most:.3g} on rank {rank}"
        elif not abs(one - two) <= tolerance * (1 + abs(one)):
            yield name, f"{one:.9g} in one process, {two:.9g} on rank {rank}"
