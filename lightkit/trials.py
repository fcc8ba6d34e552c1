"""Short fits of a copy, after which everything is as it was: for the rehearsal and for `tuning`."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
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
_CLOSED = (Trainer, TaskModule, type, types.ModuleType, types.FunctionType, str, bytes)
#: Nor in what these hold, which goes on while a trial runs: threads, queues, sockets.
_RUNNING = {
    "asyncio",
    "concurrent",
    "logging",
    "multiprocessing",
    "queue",
    "selectors",
    "threading",
}
_PLAIN = (bool, int, float, str, type(None))
#: What is filled again as it was, up to so many entries; arrays up to so many bytes in all.
_FILLED: tuple[Any, ...] = (list, dict, set, collections.deque, collections.defaultdict)
_FILLED += (collections.OrderedDict, collections.Counter)
_ENTRIES, _BYTES = 10**6, 5 * 10**7
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


def copied(task: TaskModule, memo: dict[int, Any]) -> TaskModule:
    """Returns a copy of a task to be tried; see `reduce_callbacks`.

    Its functions hold the copies of what they held. ``copy.deepcopy`` leaves them as they are, so
    that a hook such as ``lambda *seen: self.seen.append(seen)`` would go on filling the task.
    """
    twin = copy.deepcopy(task, memo)
    for module in twin.modules():
        held = vars(module)
        for names in (held, *(value for value in held.values() if isinstance(value, dict))):
            for name, one in names.items():
                if isinstance(one, types.FunctionType):
                    names[name] = _rebound(one, memo)
    reduce_callbacks(twin)
    return twin


def _rebound(one: Any, memo: dict[int, Any]) -> Any:
    """Returns a function that holds the copies of what it held; for other things their copy."""
    held = isinstance(one, types.FunctionType) and (one.__closure__ or one.__defaults__)
    if id(one) in memo or not held or "<" not in one.__qualname__:  # that is made in a function
        return memo.get(id(one), one)
    cells = tuple(types.CellType() for _ in one.__closure__ or ())
    twin = types.FunctionType(one.__code__, one.__globals__, one.__name__, None, cells)
    memo[id(one)] = twin  # before its cells, for it may hold itself
    twin.__dict__.update(vars(one))
    twin.__kwdefaults__ = one.__kwdefaults__
    twin.__defaults__ = one.__defaults__ and tuple(
        _rebound(each, memo) for each in one.__defaults__
    )
    for cell, before in zip(cells, one.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name that has no value yet
            cell.cell_contents = _rebound(before.cell_contents, memo)
    return twin


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
        closed = isinstance(one, (*_CLOSED, *_PLAIN))
        if id(one) not in found and not closed and _package(one) not in _RUNNING:
            found[id(one)] = one
            if depth < _DEEP:
                todo.extend((each, depth + 1) for each in _inner(one))
    return list(found.values())


def _package(one: Any) -> str:
    return str(type(one).__module__).partition(".")[0]


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

    That is where the loaders stand, and the generators (torch's, NumPy's, Python's), numbers, texts,
    lists, dicts, sets and arrays that they and their parts hold. Not the random states of the process.

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
    room = _BYTES
    for one in pieces(*(feed.loader for feed, _ in feeds), *others):
        if isinstance(one, torch.Generator):
            back.append((one.set_state, one.get_state()))
        elif isinstance(one, kinds):
            own = OwnRandom(one)
            back.append((own.load_state_dict, own.state_dict()))
        elif type(one) in _FILLED:
            if len(one) <= _ENTRIES:
                back.append((partial(_refill, one), copy.copy(one)))
        elif _is_array(one):
            if one.nbytes <= room:
                room -= one.nbytes
                back.append((partial(_rewrite, one), copy.deepcopy(one)))
        elif hasattr(one, "__dict__") and not isinstance(one, nn.Module):
            back.append((partial(_recount, one), {k: v for k, v in vars(one).items() if _kept(v)}))

    def put_back() -> None:
        for put, before in back:
            put(before)
        for feed, now in feeds:
            feed.load({}, now, "loader")

    return put_back


def _is_array(one: Any) -> bool:
    """Tells whether something is a plain tensor or array of numbers, with memory of its own."""
    if type(one) is Tensor:
        own = one.layout is torch.strided and one.is_contiguous() and not one.is_inference()
        return own and (one.is_leaf or not one.requires_grad)
    numpy = sys.modules.get("numpy")
    plain = numpy is not None and type(one) is numpy.ndarray
    return plain and bool(one.flags.writeable) and not one.dtype.hasobject


def _kept(value: Any) -> bool:
    return type(value) in (*_PLAIN, *_FILLED) or _is_array(value)


def _refill(one: Any, before: Any) -> None:
    one.clear()
    (one.update if hasattr(one, "update") else one.extend)(before)


def _rewrite(one: Any, before: Any) -> None:
    (one.detach() if isinstance(one, Tensor) else one)[...] = before


def _recount(one: Any, before: dict[str, Any]) -> None:
    """Gives an object its attributes back; one that became a thing stays."""
    own = vars(one)
    own.update({k: v for k, v in before.items() if _kept(own.get(k))})
