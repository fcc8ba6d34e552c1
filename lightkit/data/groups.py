"""Groups: the batches of one optimizer step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightkit.data.stream import END, BatchStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger("lightkit")


class Group:
    """The batches of one optimizer step. It is reused for the next group.

    Attributes:
        size: How many batches the group has; each loss is divided by it before backward.
        last: Whether it is known to be the last group of the pass. Where a loader has no
            ``len()``, the last group may be a full one, which nothing tells apart.
        fetch: Returns the next batch, to be called ``size`` times; `END` where the loader ended
            before its ``len()``, to be told with `say_torn`.
    """

    __slots__ = ("fetch", "last", "size")

    def __init__(self, stream: BatchStream) -> None:
        self.fetch: Callable[[], Any] = stream.fetch
        self.size = 0
        self.last = False

    def say_torn(self, given: int) -> None:
        """Warns that a loader ended within the group, after ``given`` of its batches."""
        if given:
            _log.warning(
                "The loader ended after %d of the %d batches of an accumulated step, because it "
                "has fewer batches than its len() says. Correct its __len__, or remove it.",
                given,
                self.size,
            )


def groups(stream: BatchStream, accumulate: int, start: int | None = None) -> Iterator[Group]:
    """Cuts one pass into groups of ``accumulate`` batches, the ragged tail included.

    Where ``stream.length`` is known, the sizes are planned from it and each batch is fetched just
    before its turn. Where it is not, the batches of a group are fetched when the group is asked
    for, and none beyond them; the same is done with batches that come after the ``len()`` of a
    loader. When a loader ends before its ``len()``, the group in which it ends gives fewer batches
    than ``size``, possibly none, and is the last to come.

    Args:
        stream: The pass.
        accumulate: Batches per optimizer step, at least 1.
        start: How many batches of the pass are done already. Default: ``stream.fetched``.
    """
    group = Group(stream)
    if stream.length is not None:
        left = stream.length - (stream.fetched if start is None else start)
        while left > 0:
            group.size = size = accumulate if accumulate < left else left
            left -= size
            group.last = not left
            yield group
            if stream.ended:
                return
    yield from _gathered(stream, accumulate, group)


def _gathered(stream: BatchStream, accumulate: int, group: Group) -> Iterator[Group]:
    """Groups of a pass whose remaining length is not known."""
    while (batch := stream.fetch()) is not END:
        batches = [batch]
        while len(batches) < accumulate and (batch := stream.fetch()) is not END:
            batches.append(batch)
        group.fetch = iter(batches).__next__
        group.size = len(batches)
        group.last = stream.over
        yield group
