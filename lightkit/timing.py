"""Where the time goes: the seconds of a run by part, each second in one part only.

What is short and frequent is not measured: the step is what is left of an epoch when the other
parts are known. So the loop reads no clock for it, and nobody pays for a callback that is not there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_clock = time.perf_counter
#: The parts of an epoch, in the order in which they are shown.
KINDS = ("data", "step", "validation", "checkpoint", "callbacks")


class Part:
    """One thing whose time is taken, as a ``with`` block or by `Times.timed`.

    Attributes:
        name: What it is called.
        kind: The part of an epoch that it belongs to, one of `KINDS`, or "device".
        seconds: Seconds in it, without those in other parts within it.
        calls: How often it was entered.
    """

    __slots__ = ("_times", "calls", "kind", "name", "seconds")

    def __init__(self, times: Times, name: str, kind: str) -> None:
        self._times, self.name, self.kind = times, name, kind
        self.seconds, self.calls = 0.0, 0

    def __enter__(self) -> None:
        self._times.enter(self)

    def __exit__(self, *error: object) -> None:
        self._times.leave(self)


class Times:
    """The times of one call of an entry point. All of it is the host's time.

    Parts that lie within each other are told apart: what a callback saves is the checkpoint's time,
    what it does in a validation is its own.

    Attributes:
        parts: All parts, in the order in which they were made.
        validation: The validations of a fit.
        checkpoint: What the loop waits for a checkpoint; not the thread that writes it.
        device: Waiting for a device that has more to do, where logged values are read; it belongs
            to the step.
        spent: Seconds of all epochs before this one, by kind.
        label: Makes a label of a profiler for each part that is entered, while one records.
        instrumented: Whether a profiler has made all pieces of the run parts.
    """

    __slots__ = (
        "_before",
        "_began",
        "_labels",
        "_last",
        "_open",
        "_since",
        "checkpoint",
        "device",
        "instrumented",
        "label",
        "parts",
        "spent",
        "validation",
    )

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.validation = self.part("validation", "validation")
        self.checkpoint = self.part("checkpoint", "checkpoint")
        self.device = self.part("waiting for the device", "device")
        self.spent = dict.fromkeys(KINDS, 0.0)
        self.label: Callable[[str], AbstractContextManager[Any]] | None = None
        self.instrumented = False
        self._open: list[Part] = []  # the innermost last
        # Those of open parts, each with how many parts were open.
        self._labels: list[tuple[int, AbstractContextManager[Any]]] = []
        self._since = 0.0  # when the innermost was entered, or gone back to
        self._began: float | None = None  # the epoch; None outside of one
        self._last = dict.fromkeys(KINDS, 0.0)  # the epoch that was the last one
        self._before: dict[Part, float] = {}  # seconds of the parts when it began

    def part(self, name: str, kind: str) -> Part:
        """Returns a new part."""
        made = Part(self, name, kind)
        self.parts.append(made)
        return made

    def timed(self, function: Callable[P, R], part: Part) -> Callable[P, R]:
        """Returns ``function`` with its time taken. What looks at it sees the user's own."""
        inside = self._open

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # `enter` and `leave`, written out: this runs for every hook of the user's in a step.
            if self.label is not None or inside:
                with part:
                    return function(*args, **kwargs)
            inside.append(part)
            part.calls += 1
            self._since = _clock()
            try:
                return function(*args, **kwargs)
            finally:
                now = _clock()
                part.seconds += now - self._since
                self._since = now
                inside.clear()  # also what an exception has left open

        return call

    def waiting(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a function that waits for the device, and takes its time as `device`.

        Not within a validation and the like, whose time it is.
        """
        if self._open and self._open[-1].kind != "step":
            return function(*args, **kwargs)
        with self.device:
            return function(*args, **kwargs)

    def enter(self, part: Part) -> None:
        """Begins a part; time counts for no other until `leave`."""
        now, inside = _clock(), self._open
        if inside:
            inside[-1].seconds += now - self._since
        again = bool(inside) and inside[-1] is part
        part.calls += not again
        inside.append(part)
        if self.label is not None and not again:
            label = self.label(part.name)
            self._labels.append((len(inside), label))
            label.__enter__()
        self._since = now

    def leave(self, part: Part) -> None:
        """Ends a part, and what an exception that somebody caught has left open within it."""
        now = _clock()
        while self._open:
            depth = len(self._open)
            ended = self._open.pop()
            ended.seconds += now - self._since
            self._since = now
            if self._labels and self._labels[-1][0] == depth:
                self._labels.pop()[1].__exit__(None, None, None)
            if ended is part:
                return

    def begin_epoch(self, now: float, waited: float) -> None:
        """Begins an epoch at ``now``; ``waited`` is that of the epoch before, as for `epoch`."""
        for kind, seconds in self.epoch(now, waited).items():
            self.spent[kind] += seconds
        self._began = now
        self._before = {part: part.seconds for part in self.parts}

    def end(self, now: float, waited: float) -> None:
        """Ends the last epoch; see `begin_epoch`."""
        self._last = self.epoch(now, waited)
        self._began = None

    def epoch(self, now: float, waited: float) -> dict[str, float]:
        """Returns the seconds of the running epoch by kind; together they are all that it took.

        Args:
            now: The end of it, as ``perf_counter`` counts.
            waited: Seconds spent waiting for the training loader. What the device still had to do
                meanwhile is no waiting: it counts for the step.
        """
        found = dict.fromkeys((*KINDS, "device"), 0.0)
        if self._began is None:
            return dict(self._last)
        self._settle(now)
        for part in self.parts:
            found[part.kind] += part.seconds - self._before.get(part, 0.0)
        found["data"] = max(0.0, waited - found.pop("device"))
        found["step"] = 0.0
        found["step"] = max(0.0, now - self._began - sum(found.values()))
        return found

    def all_epochs(self, now: float, waited: float) -> dict[str, float]:
        """Returns the seconds of all epochs of the fit so far, the running one included."""
        running = self.epoch(now, waited)
        return {kind: seconds + running[kind] for kind, seconds in self.spent.items()}

    def _settle(self, now: float) -> None:
        """Counts what belongs to the part that is open."""
        if self._open:
            self._open[-1].seconds += now - self._since
            self._since = now
