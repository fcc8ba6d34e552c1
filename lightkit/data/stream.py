"""One pass over a loader, in the way the loop needs it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from lightkit.data.loaders import SampleCounts, loader_length, parts, sample_counts
from lightkit.data.shares import Share
from lightkit.data.workers import why_ended
from lightkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from lightkit.data.feed import Feed

_log = logging.getLogger("lightkit")
_clock = time.perf_counter
_SAY_EVERY = 10.0  # seconds between two words about batches that are read again


class _End:
    """The type of `END`."""

    def __repr__(self) -> str:
        return "END"


#: What `BatchStream.fetch` returns when the pass is over.
END: Final = _End()


class BatchStream:
    """One pass over a loader: gives what ``for batch in loader`` gives, in that very order.

    ``iter(loader)`` is called once, when the stream is made, and nothing else is drawn from any
    random state. The loader's own ``next()`` alone ends a pass: a StopIteration from inside a
    dataset, which would end a plain loop over a DataLoader in silence, raises `DataError`.

    A ``len()`` that is wrong is believed for planning only (`length`, `groups`): all batches that
    come are given, and a warning names both numbers at the end of the pass. A limit below
    ``len()`` is exact, and the loader is then not asked for more.

    Args:
        loader: Any iterable of batches. One that is its own iterator (a generator) is continued
            where it stands; when nothing is left of it, the first `fetch` raises `DataError`.
        limit: Use at most so many batches of the loader; None for all. Where several processes
            share them, each gives its part of these.
        skip: Begin so many batches further in, for a run that is resumed. The batches before are
            fetched and dropped, so random states move as they did then.
        epoch: What ``set_epoch`` is called with, on the loader, its samplers and its dataset,
            where they have it. None: it is not called.
        sizes: What `sample_counts` says about the loader. Default: it is asked here.
        feed: What begins passes over the loader, and is told of this one; its share says which
            batches are given. Default: ``iter(loader)``, and skipping reads.
        record: What ``feed.record`` returned where the pass that is continued began.
        name: What to call the loader in messages.

    Attributes:
        length: Batches this pass gives, the skipped ones included and the limit applied; None
            where the loader has no ``len()``.
        fetched: Batches of the pass fetched so far, the skipped ones included, and one that failed.
        size: Samples in the batch fetched last; None where only the batch itself can tell.
        wait: Seconds spent waiting for the loader, its start included. May be set.
        ended: Whether the pass is over.
    """

    __slots__ = (
        "_alone",
        "_announced",
        "_iterator",
        "_loader",
        "_name",
        "_next",
        "_said",
        "_share",
        "_sizes",
        "_stop",
        "ended",
        "fetched",
        "length",
        "size",
        "wait",
    )

    def __init__(
        self,
        loader: Any,
        *,
        limit: int | None = None,
        skip: int = 0,
        epoch: int | None = None,
        sizes: SampleCounts | None = None,
        feed: Feed | None = None,
        record: Mapping[str, Any] | None = None,
        name: str = "loader",
    ) -> None:
        self._loader, self._name = loader, name
        announced = loader_length(loader)
        share = Share(even=True) if feed is None else feed.share
        # A limit that does not shorten the pass is none, so that the loader sees its own end and
        # runs what it has there, as in a plain loop.
        whole = limit is None or (announced is not None and limit >= announced)
        self._stop: int | None = None
        if limit is not None and not whole:
            # At least what is done, which may be more than a new number of processes would do.
            limit = max(limit, share.before(skip))
            self._stop = share.length(limit)
        self._announced = share.length(announced)
        self.length = share.length(announced if whole or announced is None else limit)
        self._share = share
        self._alone = feed is not None and feed.own and share.even
        self.size: int | None = None
        self.ended = False
        self._sizes = sizes if sizes is not None else sample_counts(loader, share)
        if epoch is not None:
            _set_epoch(epoch, loader, None if feed is None else feed.view)
        self.fetched = -1  # until the pass has begun
        self._said: tuple[int, int] | None = None  # of a wrong length, in passes before
        start = _clock()
        if feed is None:
            iterator, left = iter(loader), skip
        else:
            if feed.stream is not None:
                self._said = feed.stream._said
            feed.stream = self
            iterator, left = feed.iterate(record, skip, None if whole else limit)
        self._iterator: Iterator[Any] | None = iterator
        self._next = iterator.__next__
        if feed is not None and feed.wrap is not None:
            self.around(feed.wrap)
        self.wait = _clock() - start
        self.fetched = skip - left
        try:
            if left:
                self._skip(skip)
            if skip and feed is not None and record:
                feed.check(record, skip, name)
        except BaseException:
            self.close()
            raise

    def fetch(self) -> Any:
        """Returns the next batch, or `END` when the pass is over.

        Raises:
            DataError: The loader gave no batch at all, or its dataset raised StopIteration.
        """
        index = self.fetched
        if index == self._stop:
            self.close()
            return END
        start = _clock()
        try:
            batch = self._next()
            self.wait += _clock() - start
            self.fetched = index + 1
        except StopIteration as error:
            self.wait += _clock() - start
            return self._end(error)
        except BaseException as error:
            self.fetched = index + 1  # samples of it may be out of the dataset
            ended = why_ended(self._iterator) if isinstance(error, (OSError, EOFError)) else ""
            self.close()
            if ended:  # its connection broke before torch saw that it was gone
                raise RuntimeError(f"{ended} It loaded for the {self._name}.") from error
            raise
        sizes = self._sizes
        if sizes is not None:
            self.size = sizes.of(index)
        return batch

    def __iter__(self) -> Iterator[Any]:
        while (batch := self.fetch()) is not END:
            yield batch

    @property
    def over(self) -> bool:
        """Whether no batch will come any more, as far as that is known without asking for one."""
        return self.ended or self.fetched == self._stop

    def around(self, wrap: Callable[[Callable[[], Any]], Callable[[], Any]] | None) -> None:
        """Puts a function around the loader's ``next``, instead of the last one; None for none."""
        if self._iterator is not None:
            fetch = self._iterator.__next__
            self._next = fetch if wrap is None else wrap(fetch)

    def close(self) -> None:
        """Ends the pass and lets go of the iterator; workers end unless they are persistent.

        `fetch` does it at the end and when the loader raises; call it when a pass is left early.
        """
        self.ended = True
        self._stop = self.fetched
        iterator, self._iterator = self._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None and not getattr(iterator, "_persistent_workers", False):
            # An error out of a worker holds the iterator in a cycle of references, so letting go
            # would not end the workers; later ones would inherit it and complain at their end.
            shutdown()
        self._next = iter(()).__next__
        self.size = None

    def _end(self, error: StopIteration) -> _End:
        """Closes a pass that the loader ended, and says what is wrong with its end."""
        self.close()
        if _from_inside(error.__traceback__):
            self.fetched += 1
            raise DataError(
                f"The dataset or collate_fn of the {self._name} raised StopIteration at batch "
                f"{self.fetched - 1}. A plain loop would take that for the end of the epoch. See the "
                f"traceback above for the place."
            ) from error
        given, announced = self.fetched, self._announced
        # In an evaluation only the first of several processes is sure to get one.
        if given == 0 and (self._share.even or self._share.rank == 0):
            raise DataError(self._nothing())
        if self._alone and announced is not None and given < announced:
            raise DataError(
                f"The {self._name} of this process gave {given} batches although its len() says "
                f"{announced}, and the other processes go on. Correct its __len__, or remove it."
            )
        if announced is not None and announced != given and self._said != (given, announced):
            self._said = given, announced
            _log.warning(
                "The %s gave %d batches although its len() says %d. Correct its __len__, or "
                "remove it.",
                self._name,
                given,
                announced,
            )
        return END

    def _nothing(self) -> str:
        """The message for a loader that ended before its first batch."""
        if hasattr(type(self._loader), "__next__"):
            return (
                f"The {self._name} is an iterator ({type(self._loader).__name__}) and is used up: "
                f"it gives its batches only once. Give a DataLoader, or an object whose __iter__ "
                f"starts anew, for more than one pass."
            )
        kind, share = type(self._loader).__name__, self._share
        if share.world > 1 and share.even:
            return (
                f"The {self._name} ({kind}) gave fewer batches than there are processes "
                f"({share.world}), so that not each of them gets one. Use a smaller batch size, "
                f"more data, or fewer processes."
            )
        return f"The {self._name} ({kind}) gave no batch at all."

    def _skip(self, skip: int) -> None:
        """Goes ``skip`` batches further in by reading them."""
        _log.info("Going to batch %d of the %s by reading the batches before it.", skip, self._name)
        begun = said = _clock()
        while self.fetched < skip:
            if _clock() - said > _SAY_EVERY:
                said = _clock()
                _log.info("%d of %d batches read, %.0f s", self.fetched, skip, said - begun)
            if self.fetch() is END:
                raise DataError(
                    f"The {self._name} ended after {self.fetched} batches, but the run that is "
                    f"resumed had completed {skip} of them. The data or the batch size changed."
                )
        _log.info("%d batches read in %.1f s", skip, _clock() - begun)
        self.size = None
        self.wait = 0.0


def _set_epoch(epoch: int, loader: Any, view: Any) -> None:
    """Calls ``set_epoch`` where a loader or one of its parts has it, once for each object."""
    found = (*parts(loader).values(), view)
    for part in {id(p): p for p in found}.values():
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _from_inside(traceback: TracebackType | None) -> bool:
    """Tells whether a StopIteration came from the dataset or collate_fn of a DataLoader.

    torch lets it pass through, in this process and out of a worker, and so ends the epoch. The
    frames tell the two ends apart: a sampler's is raised outside ``fetch``; that of an iterable
    dataset is raised by ``fetch`` itself, or by the dataset where samples are not batched.
    """
    while traceback is not None:
        frame = traceback.tb_frame
        place = frame.f_globals.get("__name__"), frame.f_code.co_name
        if place == ("torch._utils", "reraise"):
            return True
        if place == ("torch.utils.data._utils.fetch", "fetch"):
            fetcher = frame.f_locals["self"]
            iterable = hasattr(fetcher, "dataset_iter")
            return not iterable or (fetcher.auto_collation and traceback.tb_next is not None)
        traceback = traceback.tb_next
    return False
