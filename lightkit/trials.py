"""Short fits of a copy, after which everything is as it was: for the rehearsal and for `tuning`."""

from __future__ import annotations

import collections
import contextlib
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightkit.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightkit.data.loaders import OwnRandom, takes_turns
from lightkit.hooks import Callback, listens
from lightkit.options import listed
from lightkit.task import TaskModule
from lightkit.trainer import Trainer

if TYPE_CHECKING:
    from lightkit.run import FitRun

_log = logging.getLogger("lightkit")
#: What is said where memory ends, beside errors of a kind of their own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
#: What nothing is looked for in. (A task trains as a copy, and modules hold numbers of their own.)
_CLOSED = (Trainer, TaskModule, Tensor, type, types.ModuleType, types.FunctionType, str, bytes)
_PLAIN = (bool, int, float, str, type(None))
#: How far the parts of a loader are looked at: levels, objects, entries of a list.
_DEEP, _MANY, _LONG = 8, 2000, 1000


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether memory ended."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in _NO_MEMORY)


# --- the copy ------------------------------------------------------------------------------------


def changing(callbacks: list[Callback]) -> list[Callback]:
    """Returns the callbacks that change what is trained."""
    kinds = (BaseFinetuning, GradientAccumulationScheduler)
    return [one for one in callbacks if isinstance(one, kinds) or listens(one, "on_loss")]


def reduce_callbacks(task: TaskModule) -> None:
    """Leaves to a copy of the task only those of its callbacks that change what is trained."""
    given = task.configure_callbacks
    vars(task)["configure_callbacks"] = lambda: changing(
        listed(given(), Callback, "configure_callbacks")
    )


def like(kind: type[Trainer], trainer: Trainer, callbacks: list[Callback], **changed: Any) -> Any:
    """Returns a trainer with the same options that shows nothing, and saves nothing by itself.

    Args:
        kind: Its class.
        trainer: The one whose options it gets.
        callbacks: All that it has.
        changed: Other options for it.
    """
    off = ("fast_dev_run", "enable_progress_bar", "enable_checkpointing", "enable_model_summary")
    options: dict[str, Any] = {
        **vars(trainer.options),
        **dict.fromkeys((*off, "hints", "rehearse"), False),
        **dict.fromkeys(("seed", "profiler", "max_time")),
        "num_sanity_val_steps": 0,
        "callbacks": callbacks,
        **changed,
    }
    twin = kind(**options)
    twin._handlers = [handler for handler in trainer._handlers if listens(handler, "on_loss")]
    return twin


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps back what an ordinary fit says, which the later one says too."""
    level = _log.level
    _log.setLevel(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _log.setLevel(level)


# --- what the data keep --------------------------------------------------------------------------


def pieces(*roots: Any) -> list[Any]:
    """Returns what loaders are made of, some levels deep: samplers, data sets, transforms, generators."""
    found: dict[int, Any] = {}
    todo = collections.deque((root, 0) for root in roots)
    while todo and len(found) < _MANY:
        one, depth = todo.popleft()
        if id(one) not in found and not isinstance(one, (*_CLOSED, *_PLAIN)):
            found[id(one)] = one
            if depth < _DEEP:
                todo.extend((each, depth + 1) for each in _inner(one))
    return list(found.values())


def _inner(one: Any) -> list[Any]:
    """Returns what an object holds, if it is not much; of a method its owner."""
    if isinstance(one, (list, tuple, dict)):
        few = len(one) <= _LONG
        return list(one.values() if isinstance(one, dict) else one) if few else []
    return [*getattr(one, "__dict__", {}).values(), getattr(one, "__self__", None)]


def bulk(task: nn.Module, loaders: Iterable[Any]) -> list[Any]:
    """Returns the data themselves, of which no second copy is wanted where the task holds them too.

    Of loaders over data with indices only: what gives a stream may be filled while it trains.
    """
    own = {id(tensor) for tensor in (*task.parameters(), *task.buffers())}
    held = (each for one in pieces(*filter(_has_indices, loaders)) for each in _inner(one))
    return [
        each
        for each in held
        if (isinstance(each, (list, dict)) and len(each) > _LONG)
        or (
            hasattr(each, "__array__")
            and not isinstance(each, nn.Parameter)
            and id(each) not in own
        )
    ]


def _has_indices(loader: Any) -> bool:
    """Tells whether a loader is one over data with indices."""
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return indexed or takes_turns(loader)


def gives_once(loader: Any) -> str:
    """Returns why a loader may not give its batches a second time; "" where it does."""
    kind = type(loader).__name__
    if hasattr(type(loader), "__next__"):
        return f"the loader ({kind}) gives its batches only once"
    if _has_indices(loader) or isinstance(loader, (list, tuple)):
        return ""
    for one in pieces(loader):
        if hasattr(type(one), "__next__") and not isinstance(one, _BaseDataLoaderIter):
            return f"the loader ({kind}) holds a {type(one).__name__}, which is read only once"
    return ""


def keep(run: FitRun, *others: Any) -> Callable[[], None]:
    """Notes what reading the data of a run moves, and returns what puts it back.

    That is where the loaders stand, and the generators (torch's, NumPy's, Python's), numbers, texts
    and short lists that they and their parts hold. Not the random states of the process.

    Args:
        run: The run.
        others: What else to look at: the data as they were given, a data module.
    """
    feeds = [(feed, feed.now()) for feed in run.feeds()]
    back: list[tuple[Callable[[Any], Any], Any]] = []
    numpy = sys.modules.get("numpy")
    kinds: tuple[Any, ...] = (random.Random,)
    if numpy is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    for one in pieces(*(feed.loader for feed, _ in feeds), *others):
        if isinstance(one, torch.Generator):
            back.append((one.set_state, one.get_state()))
        elif isinstance(one, kinds):
            own = OwnRandom(one)
            back.append((own.load_state_dict, own.state_dict()))
        elif isinstance(one, list) and len(one) <= _LONG:
            back.append((_refill(one), list(one)))
        elif hasattr(one, "__dict__") and not isinstance(one, nn.Module):
            back.append((_recount(one), {k: v for k, v in vars(one).items() if _plain(v)}))

    def put_back() -> None:
        for put, before in back:
            put(before)
        for feed, now in feeds:
            feed.load({}, now, "loader")

    return put_back


def _plain(value: Any) -> bool:
    return type(value) in _PLAIN


def _refill(one: list[Any]) -> Callable[[list[Any]], None]:
    def put(before: list[Any]) -> None:
        one[:] = before

    return put


def _recount(one: Any) -> Callable[[dict[str, Any]], None]:
    """Returns what gives an object its plain attributes back; one that became a thing stays."""

    def put(before: dict[str, Any]) -> None:
        own = vars(one)
        own.update({k: v for k, v in before.items() if _plain(own.get(k))})

    return put
