"""Which files of checkpoints stay: the best ones, the newest one, and nobody else's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor


@dataclass(slots=True)
class Retention:
    """The files that one callback wrote. Knows paths and scores, touches no file.

    Attributes:
        mode: "min" where a lower score is better.
        keep: So many best files stay; -1 all, 0 none.
        judged: Whether scores decide; without a monitor the newest counts as the best.
        keep_newest: Whether the newest file stays whatever its score.
        best: The files kept for their score.
        best_path: The best file ever, also of a run in another folder that this one continues.
        best_score: Its score.
        newest: The file written last.
        written: All files that stay, with their steps.
        garbage: Files that were replaced. They are removed when the next file is complete, or,
            after a crash in between, by the run that continues.
    """

    mode: Literal["min", "max"]
    keep: int
    judged: bool
    keep_newest: bool
    best: dict[str, Tensor] = field(default_factory=dict)
    best_path: str = ""
    best_score: Tensor | None = None
    newest: str = ""
    written: dict[str, int] = field(default_factory=dict)
    garbage: list[str] = field(default_factory=list)

    def better(self, score: Tensor | float, than: Tensor | float) -> bool:
        """Tells whether a score is truly better than another. The scores are on the CPU."""
        a, b = float(score), float(than)
        return a < b if self.mode == "min" else a > b

    @property
    def worst_path(self) -> str:
        """The worst of the files kept for their score; "" if there is none."""
        if not self.best:
            return ""
        worst = max if self.mode == "min" else min
        return worst(self.best, key=lambda path: float(self.best[path]))

    def enters(self, score: Tensor | None) -> bool:
        """Tells whether a file of this score stays as one of the best.

        Args:
            score: None where there is nothing new to judge by. Nan and infinities are never best.
        """
        if self.keep == -1:
            return True
        if self.keep == 0 or (self.judged and not _finite(score)):
            return False
        if not self.judged or len(self.best) < self.keep:
            return True
        assert score is not None
        return self.better(score, self.best[self.worst_path])

    def accept(self, path: str, step: int, score: Tensor | None, enters: bool) -> Retention:
        """Returns the files as they are once ``path`` is complete."""
        best, best_path, best_score = dict(self.best), self.best_path, self.best_score
        best.pop(path, None)  # a file of this name is replaced
        after = replace(self, best=best, newest=path, written={**self.written, path: step})
        after.garbage = [old for old in self.garbage if old != path]
        if best_path == path and self.judged:  # what was the best is replaced
            best_path = min(best, key=self._rank, default="")
            best_score = best.get(best_path)
        if not self.judged:
            best_path = path
        elif enters and score is not None and _finite(score):
            if 0 < self.keep <= len(best):
                del best[after.worst_path]
            best[path] = score
            if best_score is None or self.better(score, best_score):
                best_path, best_score = path, score
        after.best_path, after.best_score = best_path, best_score
        if self.keep != -1:
            stay = set(best)
            if self.keep_newest or not self.judged:
                stay.add(path)
            after.garbage += [old for old in after.written if old not in stay]
            after.written = {old: at for old, at in after.written.items() if old in stay}
        return after

    def state_dict(self) -> dict[str, Any]:
        """Returns the files; the settings are the callback's own."""
        return {name: getattr(self, name) for name in _FILES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        for name in _FILES:
            setattr(self, name, state[name])

    def adopt(self, folder: Path, *, same: bool, own: bool) -> None:
        """Compares a loaded state with the folder of this run.

        Files that are gone are forgotten. If the folder is another one (it was moved), files of the
        same names in it are taken as the ones meant, and those of the old one are never touched.
        A new run that continues another one's state owns none of its files, also where both write
        to one folder: they only tell how good the best was.

        Args:
            folder: The folder of this run.
            same: Whether it is the one in which the state was saved.
            own: Whether the state was saved by this run.
        """
        if not own:
            self.best, self.written, self.garbage, self.newest = {}, {}, [], ""

        def here(path: str) -> str:
            moved = path if same else str(folder / Path(path).name)
            return moved if Path(moved).exists() else ""

        self.best = {here(p): score for p, score in self.best.items() if here(p)}
        self.written = {here(p): step for p, step in self.written.items() if here(p)}
        self.newest = here(self.newest) if self.newest else ""
        self.garbage = [p for p in self.garbage if Path(p).exists()] if same else []
        if self.best_path:
            self.best_path = here(self.best_path) or self.best_path
            if not Path(self.best_path).exists():
                self.best_path = min(self.best, key=self._rank, default="")
                self.best_score = self.best.get(self.best_path)

    def _rank(self, path: str) -> float:
        """Returns a number that is smaller for a better file."""
        score = float(self.best[path])
        return score if self.mode == "min" else -score


_FILES = ("best", "best_path", "best_score", "newest", "written", "garbage")


def _finite(score: Tensor | None) -> bool:
    """Tells whether there is a score that can be compared."""
    return score is not None and math.isfinite(float(score))
