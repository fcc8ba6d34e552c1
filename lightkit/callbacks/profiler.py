"""A table of where the time of a call went."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

from lightkit import screen
from lightkit.hooks import Callback
from lightkit.instruments import instrument

if TYPE_CHECKING:
    from lightkit.task import TaskModule
    from lightkit.timing import Part
    from lightkit.trainer import Trainer

_log = logging.getLogger("lightkit")
_clock = time.perf_counter
#: Rows below this share of the time are counted, not shown.
_LEAST = 0.001


class SimpleProfiler(Callback):
    """Shows how long each part of a fit or an evaluation took, when it ends.

    The parts are the loaders, the user's steps, backward, the optimizers, checkpoints, and each
    hook of the task and of each callback by name. Time in a part within another one counts for the
    inner one, so the shares add up. The table is logged, and written to ``profile.txt`` (of an
    evaluation: ``profile_test.txt`` and the like) in the folder of the run, if there is one.

    All times are the host's. A CUDA device computes on meanwhile, and what has to wait for it takes
    long: `TraceProfiler` shows both sides.

    Measures on every rank, shows and writes on rank zero. It costs some microseconds per step.
    """

    order: ClassVar[int] = 120
    measured: ClassVar[bool] = False

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None
        self._began = 0.0
        self._before: dict[Part, tuple[float, int]] = {}  # what was measured before

    def on_fit_start(self, trainer: Trainer, task: TaskModule) -> None:
        """Begins to measure; not at a validation within a fit."""
        self._begin(trainer)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def teardown(self, trainer: Trainer, task: TaskModule, stage: str) -> None:
        """Shows the table, also after an exception."""
        undo, self._undo = self._undo, None
        if undo is None:
            return
        took = _clock() - self._began
        undo()
        if not trainer.is_global_zero:
            return
        rows: dict[str, tuple[float, int]] = {}
        times = trainer.session.flow.times
        for part in times.parts:
            name = "validation, the rest" if part is times.validation else part.name
            before, calls_before = self._before.get(part, (0.0, 0))
            seconds, calls = rows.get(name, (0.0, 0))
            calls += part.calls - calls_before
            rows[name] = seconds + part.seconds - before, calls
        text = table(stage, rows, took)
        _log.info("%s", text)
        if trainer.run_dir is not None and not trainer.fast_dev_run:
            name = "profile.txt" if stage == "fit" else f"profile_{stage}.txt"
            try:
                trainer.run_dir.joinpath(name).write_text(text + "\n", encoding="utf-8")
            except OSError as error:  # no reason to end a fit that went well with an error
                _log.warning("%s could not be written: %s", name, error)

    def _begin(self, trainer: Trainer) -> None:
        if self._undo is None and trainer._run is not None:
            times = trainer.session.flow.times
            self._before = {part: (part.seconds, part.calls) for part in times.parts}
            self._undo = instrument(trainer._run, times)
            self._began = _clock()


def table(what: str, parts: Mapping[str, tuple[float, int]], took: float) -> str:
    """Returns the table as text, without a line break at the end.

    Args:
        what: What took the time.
        parts: Seconds and calls of each part of it.
        took: Seconds of all.
    """
    rows = [(seconds, name, calls) for name, (seconds, calls) in parts.items() if calls]
    rows.sort(key=lambda row: -row[0])
    rest = max(0.0, took - sum(row[0] for row in rows))
    shown = [("part", "calls", "total", "mean", "share")]
    small = [row for row in rows if row[0] < _LEAST * took]
    for seconds, name, calls in rows[: len(rows) - len(small)]:
        mean = screen.brief(seconds / calls)
        shown.append((name, str(calls), screen.brief(seconds), mean, _share(seconds, took)))
    if small:
        seconds = sum(row[0] for row in small)
        name = f"{len(small)} smaller part{'s' if len(small) > 1 else ''}"
        shown.append((name, "", screen.brief(seconds), "", _share(seconds, took)))
    shown.append(("the rest", "", screen.brief(rest), "", _share(rest, took)))
    widths = [max(len(row[i]) for row in shown) for i in range(5)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in shown
    ]
    return "\n".join(
        [f"{what} took {screen.brief(took)}", lines[0], "-" * len(lines[0]), *lines[1:]]
    )


def _share(seconds: float, took: float) -> str:
    return f"{100 * seconds / took:.1f} %" if took else ""
