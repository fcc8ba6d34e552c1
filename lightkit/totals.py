"""Logged columns over several ranks: one exchange makes their sums those of all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightkit.columns import NOTHING, Column
from lightkit.distributed import Ranks
from lightkit.errors import LoggingError, ranks_named

#: How a rank that had no batch takes in a column of the others, given its description.
Adopt = Callable[[dict[str, Any]], Column]
Row = tuple[str, str, float]
_OPTIONS = ("reduce", "on_step", "on_epoch")


class Totals:
    """Adds up what the ranks have of their columns.

    All ranks send as many numbers as there is room for, whatever they logged, so that no rank waits
    for numbers that do not come. The first two are how many columns there are and a hash of their
    names and options. Only where these differ are the names themselves gathered.

    Args:
        ranks: The processes of the run.
        silent: Whether another rank sees the same batches, so that this one does not count.
    """

    def __init__(self, ranks: Ranks, *, silent: bool = False) -> None:
        self._ranks, self._silent, self._room = ranks, silent, 16

    def settle(
        self,
        columns: Sequence[Column],
        what: str,
        *,
        adopt: Adopt | None = None,
        seen: Iterable[int] = (),
        names: Callable[[], Mapping[int, str]] = dict,
    ) -> list[Column]:
        """Gives columns the sums of all ranks over what was folded since the last time. Collective.

        Args:
            columns: Those of this rank.
            what: What they are, for messages.
            adopt: Makes a column that others have and this rank has not, because it had no batch;
                None where every rank has batches.
            seen: The loaders of which this rank had a batch.
            names: Returns the names of metric objects that are modules of the task, by their id.

        Returns:
            The columns that got new values on any rank.

        Raises:
            LoggingError: On all ranks, if they logged different names or with different options.
        """
        own = [column for column in columns if not column.alone]
        found = self._exchanged(own, what)
        if len({(row[0], row[1]) for row in found}) > 1:
            own += self._missing(own, what, adopt, seen, names())
            found = self._exchanged(own, what)
        last = self._last(own, what)
        new = []
        for number, column in enumerate(_in_order(own)):
            at = 2 + 3 * number
            parts = [(row[at], row[at + 1], row[at + 2]) for row in found]
            if column.settle(parts, [values.get(column.name, []) for values in last]):
                new.append(column.name)
        return [column for column in own if column.name in new]

    def _last(self, columns: Sequence[Column], what: str) -> list[dict[str, Any]]:
        """Returns the last values of all ranks, of the columns that are about these."""
        own = {column.name: column.fresh for column in columns if column.length}
        if not own:  # on all ranks alike
            return []
        # Collective, for those rare names only.
        return self._ranks.gather({} if self._silent else own, f"last values of {what}")

    def reduced(
        self, column: Column | None, last: tuple[float, float], here: int, name: str
    ) -> float | None:
        """Returns the last value of one name over all ranks; see `MetricLog.reduced`. Collective.

        Args:
            column: The column of this rank; None without one.
            last: Its last value and the weight of that.
            here: 2 with a last value, 1 where only an earlier mean is known, 0 for neither.
            name: The name.

        Returns:
            The reduced value; None unless all ranks have a last value.

        Raises:
            LoggingError: On all ranks, if only some of them have it.
        """
        part = NOTHING if column is None or self._silent else column.last_part(*last)
        found = self._ranks.exchange([here, *part], f"the monitored value {name!r}")
        if len({row[0] for row in found}) > 1:
            with_it = [rank for rank, row in enumerate(found) if row[0]]
            raise LoggingError(
                f"{name!r} is monitored, but it was logged on {ranks_named(with_it)} only, or not in the "
                f"same epoch on all ranks. Log it on every rank, and without rank_zero_only=True."
            )
        if column is None or here != 2:
            return None
        if column.length:  # a batch of the last rank is the last of its round
            return [row[1] for row in found if row[3]][-1]
        probe = Column(name, reduce=column.reduce)
        probe.settle([(row[1], row[2], row[3]) for row in found])
        return probe.window

    def _exchanged(self, columns: Sequence[Column], what: str) -> list[list[float]]:
        """Returns the numbers of all ranks, of at least as many columns as any rank has."""
        while True:
            ordered = _in_order(columns)[: self._room]
            numbers = [float(len(columns)), _mark(columns)]
            if not self._silent:
                numbers += [number for column in ordered for number in column.part]
            numbers += [0.0] * (2 + 3 * self._room - len(numbers))
            found = self._ranks.exchange(numbers, what)  # collective: one for all names
            most = int(max(row[0] for row in found))
            if most <= self._room:
                return found
            while self._room < most:  # on all ranks alike
                self._room *= 2

    def _missing(
        self,
        columns: Sequence[Column],
        what: str,
        adopt: Adopt | None,
        seen: Iterable[int],
        names: Mapping[int, str],
    ) -> list[Column]:
        """Returns columns for the names that only ranks without a batch lack, where that is allowed.

        Raises:
            LoggingError: On all ranks, for every other difference.
        """
        own = {column.name: _described(column, names) for column in columns}
        # Collective, only where ranks differ.
        found = self._ranks.gather((own, sorted(seen)), f"names of {what}")
        known, batches = [one for one, _ in found], [set(loaders) for _, loaders in found]
        loaders = set().union(*batches)

        def excused(rank: int, loader: int) -> bool:
            """Tells whether a rank lacks a name because it had no batch that could bring it."""
            return adopt is not None and not batches[rank].issuperset(
                loaders if loader < 0 else {loader}
            )

        union: dict[str, dict[str, Any]] = {}
        for one in known:
            union |= {name: described for name, described in one.items() if name not in union}
        text = []
        for name, described in union.items():
            lack = [r for r, one in enumerate(known) if name not in one]
            lack = [r for r in lack if not excused(r, described["loader"])]
            have = [r for r, one in enumerate(known) if name in one]
            if lack:
                text.append(
                    f"{ranks_named(lack)} did not log {name!r}, but {ranks_named(have)} did"
                )
            ways = [[r for r in have if _way(known[r][name]) == way] for way in _ways(known, name)]
            if len(ways) > 1:
                text.append(
                    f"{name!r} was logged in different ways: "
                    + "; ".join(f"{ranks_named(way)} {_way(known[way[0]][name])}" for way in ways)
                )
        if text or adopt is None:
            raise LoggingError(
                f"The ranks logged different names ({what}): {'. '.join(text)}. Log the same names "
                f"on all ranks, in the same way (a mean with batch_size=0 counts for nothing), or "
                f"use self.log(..., rank_zero_only=True) for what rank 0 alone has."
            )
        return [adopt(described) for name, described in union.items() if name not in own]


def in_turn(lists: Sequence[list[Row]]) -> list[Row]:
    """Returns rows of all ranks in the order of batches: those of one name come in turn."""
    names = dict.fromkeys(row[0] for one in lists for row in one)
    rows = []
    for name in names:
        of_name = [[row for row in one if row[0] == name] for one in lists]
        for turn in itertools.zip_longest(*of_name):
            rows += [row for row in turn if row is not None]
    return rows


def _in_order(columns: Sequence[Column]) -> list[Column]:
    return sorted(columns, key=lambda column: column.name)


def _mark(columns: Sequence[Column]) -> float:
    """Returns a hash of names and options that a float holds exactly."""
    text = repr([(c.name, c.reduce, c.on_step, c.on_epoch, c.loader) for c in _in_order(columns)])
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big"))


def _described(column: Column, names: Mapping[int, str]) -> dict[str, Any]:
    """Returns what another rank needs to know to have the column too."""
    described = {name: getattr(column, name) for name in ("name", "prog_bar", "logger", *_OPTIONS)}
    described |= {"loader": column.loader, "returned": column.returned}
    return {**described, "by_metric": column.by_metric, "metric": names.get(id(column.metric))}


def _way(described: dict[str, Any]) -> str:
    return ", ".join(f"{name}={described[name]!r}" for name in (*_OPTIONS, "loader"))


def _ways(known: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Returns the different ways in which the ranks log a name."""
    return list(dict.fromkeys(_way(one[name]) for one in known if name in one))
