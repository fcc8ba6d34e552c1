"""What torch.compile did in a fit, told in words: each graph break and recompilation in one line."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("lightkit")
#: Why torchmetrics objects break graphs, which is not told: it is meant so.
MEANT = "torchmetrics objects count outside of graphs"
#: Whose lines are not the user's.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
#: Names that torch gives to graph breaks without a text.
_PLAIN = {
    "generic_jump": "an if or while that depends on the value of a tensor",
    "step_unsupported": "something in a try or with block that cannot be traced",
}
#: What an operation that cannot work says of itself, behind all that it was given.
_FAILED = re.compile(r"(?:with fake tensors: |Failed running )call_.+\):(?: got |\n)(.+)")
_WIDTH = 240
#: Lines about the recompilations of one function, after which no more are shown.
_MOST_LINES = 3


class Report:
    """Tells of graph breaks, recompilations and functions that stay uncompiled, each once."""

    def __init__(self) -> None:
        self._dynamo: Any = None
        self._attempts = 0
        self._last: Any = None  # the last record of torch's that was told
        self._breaks = 0
        self._latest = ""  # the function that was compiled again last
        self._lines: dict[str, int] = {}

    def begin(self) -> None:
        """Passes over what was compiled before."""
        import torch._dynamo.utils as dynamo

        self._dynamo = dynamo
        self._attempts = dynamo.counters["frames"]["total"]
        records: list[Any] = dynamo.get_compilation_metrics()
        self._last = records[-1] if records else None
        self._breaks = len(getattr(dynamo, "graph_break_reasons", ()))

    def is_due(self) -> bool:
        """Tells whether something was compiled since the last call of `say`."""
        return bool(self._dynamo.counters["frames"]["total"] != self._attempts)

    def say(self) -> None:
        """Logs what is new, a line for each."""
        self._attempts = self._dynamo.counters["frames"]["total"]
        records = self._new_records()
        first = [r for r in records if r.co_name and not _reason(r) and not r.fail_reason]
        parts = dict(_function(r) for r in reversed(first))  # of one function its beginning
        names = [f"{name} ({place})" for name, place in reversed(parts.items())]
        if names:
            seconds = sum(r.entire_frame_compile_time_s or 0.0 for r in first)
            _log.info("compiled %s in %.1f s", ", ".join(names), seconds)
        reasons = getattr(self._dynamo, "graph_break_reasons", [])
        # Somebody may have emptied the list meanwhile.
        new = reasons[self._breaks if self._breaks <= len(reasons) else 0 :]
        self._breaks = len(reasons)
        for reason in new:
            self._break(reason.reason, reason.user_stack)
        for record in records:
            if record.fail_reason:
                self._failed(record)
            elif _reason(record):
                self._again(record)

    def _new_records(self) -> list[Any]:
        records = list(self._dynamo.get_compilation_metrics())
        for i, record in enumerate(records):
            if record is self._last:
                records = records[i + 1 :]
                break
        if records:
            self._last = records[-1]
        return records

    def _once(self, key: str, most: int = 1) -> bool:
        """Tells whether a line was logged less often than it may be, and counts it."""
        self._lines[key] = self._lines.get(key, 0) + 1
        return self._lines[key] <= most

    def _break(self, reason: str, stack: Sequence[Any]) -> None:
        place = user_line([(frame.filename, frame.lineno) for frame in stack])
        if MEANT not in reason and self._once(f"break {reason} {place}"):
            _log.warning("graph break at %s: %s", place, summary(reason))

    def _failed(self, record: Any) -> None:
        reason = str(record.fail_reason)
        if reason.startswith("Observed exception"):
            return  # the user's code has raised it, and it comes to be seen as such
        if record.co_name is None:  # torch's limit, which it tells without the name
            if self._once(f"limit {self._latest}"):
                _log.warning(
                    "%s was compiled as often as torch allows and is not compiled further: each "
                    "time another value made it new. The last: %s",
                    self._latest,
                    summary(_reason(record)),
                )
        elif self._once(f"failed {record.co_name}"):
            name, place = _function(record)
            if record.fail_user_frame_filename:
                place = _shown(record.fail_user_frame_filename, record.fail_user_frame_lineno)
            _log.warning("%s is not compiled, because of %s: %s", name, place, summary(reason))

    def _again(self, record: Any) -> None:
        self._latest, place = _function(record)
        if not self._once(f"again {self._latest}", _MOST_LINES):
            return
        place = user_line(frames_in(_reason(record))) or place
        reason, hint = summary(_reason(record)), ""
        if "size mismatch" in reason:
            if not self._once(f"size {self._latest}"):
                return
            hint = ". A shorter last batch does that once; drop_last=True avoids it"
        elif self._lines[f"again {self._latest}"] == _MOST_LINES:
            hint = '. Later ones are not shown; TORCH_LOGS="recompiles" shows all'
        seconds = record.entire_frame_compile_time_s or 0.0
        _log.info(
            "compiled %s again in %.1f s, at %s: %s%s", self._latest, seconds, place, reason, hint
        )


def _reason(record: Any) -> str:
    """Returns why a function was compiled again; "" for the first time, and for older torch."""
    return getattr(record, "recompile_reason", None) or ""


def _function(record: Any) -> tuple[str, str]:
    """Returns the name of a function that was compiled, and where it is.

    What follows a graph break is compiled as a function of its own, which is named by the first.
    """
    rest = re.fullmatch(r"torch_dynamo_resume_in_(.+)_at_\d+", record.co_name)
    name = rest[1] if rest else record.co_name
    return name, _shown(record.co_filename, record.co_firstlineno)


def frames_in(text: str) -> list[tuple[str, int]]:
    """Returns files and lines of the tracebacks in a text of torch's."""
    return [(file, int(line)) for file, line in re.findall(r'File "(.+?)", line (\d+)', text)]


def user_line(frames: Sequence[tuple[str, int]]) -> str:
    """Returns the innermost line that is not of a library, or of all the innermost one."""
    own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    return _shown(*(own or frames)[-1]) if frames else ""


def _shown(file: str, line: int) -> str:
    with contextlib.suppress(ValueError):
        file = str(Path(file).relative_to(Path.cwd()))
    return f"{file}:{line}"


def summary(text: str) -> str:
    """Returns what torch says in many lines as one: without its hints, stacks and numbers."""
    text = re.sub(r"^\d+/\d+: ", "", text)
    for key, words in _PLAIN.items():
        if text.startswith(key):
            return words
    failed = _FAILED.search(text)
    if failed is not None:
        return failed[1]
    kept = []
    for line in text.splitlines():
        line = line.split("  # ")[0].strip()
        if not line or line.startswith(
            ("Hint:", "Developer debug", "User stack", "from user code")
        ):
            break
        kept.append(line.removeprefix("Explanation: ").rstrip(":."))
    words = ": ".join(kept)
    return words if len(words) <= _WIDTH else f"{words[:_WIDTH]} ..."
