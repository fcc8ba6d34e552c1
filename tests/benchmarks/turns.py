"""Turns of contenders: each in a fresh process, interleaved in rounds."""

from __future__ import annotations

import hashlib
import resource
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from tests.benchmarks import fresh

#: By contender: what each of its turns returned, in the order of the rounds.
Results = dict[str, list[dict[str, Any]]]


def train(
    work: str, level: str, contender: str, steps: int | None = None, epochs: int | None = None
) -> dict[str, Any]:
    """One turn, in this process: trains, and returns what it took.

    Returns:
        ``cpu`` and ``wall``: microseconds a step (all threads of the process together, and by the
        clock); ``peak``: MiB of memory at most; ``weights``: a digest of the trained weights.
    """
    import torch

    from tests.benchmarks.contenders import CONTENDERS
    from tests.benchmarks.works import make_job

    torch.set_num_threads(1)
    run = CONTENDERS[contender].load()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(work, level, folder, steps=steps, epochs=epochs)
        run(job)
    marks = job.net.marks
    (cpu, wall), (cpu_end, wall_end) = marks.read
    counted = (job.epochs - 2) * len(job.train)
    return {
        "cpu": (cpu_end - cpu) / counted * 1e6,
        "wall": (wall_end - wall) / counted * 1e6,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "weights": digest(job.net),
    }


def digest(net: Any) -> str:
    """Returns a digest of the bits of a network's state."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def rounds(
    target: str,
    contenders: Iterable[str],
    count: int,
    say: Callable[[str], None] = lambda text: None,
    **arguments: Any,
) -> Results:
    """Lets the contenders take turns: every second round in reverse, so that none always follows.

    One whose turn fails is left out from then on, with all its turns; `failed` says so. The first
    one is the reference: without it there is nothing to say.

    Args:
        target: ``module:function``; called with ``contender`` and ``arguments`` in fresh processes.
        contenders: Their names.
        count: Rounds.
        say: Told of each turn.
        arguments: What else the function gets.
    """
    order = list(contenders)
    results: Results = {name: [] for name in order}
    for number in range(count):
        there = [name for name in order if name in results]
        for name in there if number % 2 == 0 else reversed(there):
            say(f"round {number + 1} of {count}: {name}")
            try:
                results[name].append(fresh.call(target, contender=name, **arguments))
            except fresh.FailedError as error:
                if name == order[0]:
                    raise
                say(str(error))
                del results[name]
    return results


def failed(contenders: Iterable[str], results: Results) -> list[str]:
    """Returns a note that names the contenders without results; none where all have some."""
    names = [name for name in contenders if name not in results]
    return [f"Failed here, and so left out: {', '.join(names)}."] if names else []
