"""What may stand for a loader, how long it is and how much of it is used."""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset

from lightkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lightkit.data.shares import Share


def named_loaders(value: Any, what: str) -> list[tuple[str | None, Any]]:
    """Turns what a user may give for loaders into a list of ``(name, loader)``.

    A loader is any iterable of batches, a list of batches included. The name is None for a single
    loader, the key for loaders given as a dict, and ``dataloader_idx_0``, ... for several loaders
    given as a list or tuple. Nothing is iterated over here and no random number is drawn.

    Args:
        value: None, a loader, a list or tuple of loaders, or a dict of loaders.
        what: Which loaders these are, for messages: "train", "val", "test" or "predict".

    Raises:
        DataError: Something that is no loader, a name that is no string, or a loader whose
            ``len()`` is 0.
    """
    found: list[tuple[str | None, Any]]
    if value is None:
        return []
    if isinstance(value, Mapping):
        found = list(value.items())
        for name, _ in found:
            if not isinstance(name, str) or not name:
                raise DataError(
                    f"The names in a dict of {what} loaders must be non-empty strings, they prefix "
                    f"the metrics; got {name!r}."
                )
    elif isinstance(value, (list, tuple)) and not _holds_batches(value):
        several = len(value) > 1
        found = [(f"dataloader_idx_{i}" if several else None, v) for i, v in enumerate(value)]
    else:
        found = [(None, value)]
    for name, loader in found:
        _check_loader(loader, f"The {what} loader" + (f" {name!r}" if name else ""))
    return found


def _holds_batches(value: list[Any] | tuple[Any, ...]) -> bool:
    """Tells whether a list is a loader itself: its items are nested, as batches are."""
    return bool(value) and all(
        isinstance(item, (list, tuple, Mapping))
        or (is_dataclass(item) and not hasattr(item, "__iter__"))
        for item in value
    )


def _check_loader(loader: Any, who: str) -> None:
    """Raises `DataError` for what cannot be iterated over as batches."""
    if isinstance(loader, Dataset):
        raise DataError(f"{who} is a Dataset ({type(loader).__name__}). {_wrap_advice(loader)}")
    if isinstance(loader, Tensor):
        raise DataError(
            f"{who} is a Tensor of shape {tuple(loader.shape)}. Make a loader of it: "
            f"lightkit.TensorLoader(x, y, batch_size=32, shuffle=True)."
        )
    kind = type(loader)
    if isinstance(loader, (str, bytes)) or not (
        hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    ):
        raise DataError(
            f"{who} is {loader!r:.80} ({kind.__name__}), which is no iterable of batches. Give a "
            f"DataLoader or any object whose __iter__ gives batches."
        )
    if loader_length(loader) == 0:
        raise DataError(f"{who} is empty: its len() is 0.{_why_empty(loader)}")


def _wrap_advice(dataset: Dataset[Any]) -> str:
    """Says how to make a loader of a dataset."""
    if isinstance(dataset, IterableDataset):
        return (
            "Make a loader of it: DataLoader(dataset, batch_size=32), or "
            "DataLoader(dataset, batch_size=None) if it gives whole batches already."
        )
    return "Make a loader of it: DataLoader(dataset, batch_size=32, shuffle=True)."


def _why_empty(loader: Any) -> str:
    """Names the reason why a DataLoader has no batches, where it can be known."""
    if not isinstance(loader, DataLoader):
        return ""
    samples = loader_length(loader.sampler)
    if samples and loader.drop_last:
        return (
            f" Its {samples} samples do not fill one batch of {loader.batch_size} and "
            f"drop_last=True drops what is left: use a smaller batch_size or drop_last=False."
        )
    return " Its dataset has no samples." if loader_length(loader.dataset) == 0 else ""


def loader_length(loader: Any) -> int | None:
    """Returns ``len(loader)``, None where it has no length; likewise for its parts."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        # What an IterableDataset or a sampler without __len__ raises from inside len().
        return None


def limited(length: int | None, limit: float | None, argument: str) -> int | None:
    """Returns how many batches of a loader are used.

    Args:
        length: The loader's length, None where it is unknown.
        limit: None or 1.0 for all, an int for that many batches, a float in 0..1 for that fraction
            of the length (rounded down). 0 and 0.0 use none.
        argument: The name of the argument that holds ``limit``, for messages.

    Returns:
        The number of batches; None for "until the loader ends", when its length is unknown. For a
        loader of unknown length an int is an upper bound.

    Raises:
        ConfigError: A negative limit, a fraction above 1, a bool, a fraction of an unknown length,
            or a fraction that leaves no batch.
    """
    if limit is None:
        return length
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise ConfigError(f"{argument} is {limit!r}. {_LIMIT}")
    if isinstance(limit, int):
        if limit < 0:
            raise ConfigError(f"{argument} is {limit}. {_LIMIT}")
        return limit if length is None else min(limit, length)
    if not 0.0 <= limit <= 1.0:
        raise ConfigError(f"{argument} is {limit}. {_LIMIT}")
    if limit == 1.0:
        return length
    if limit == 0.0:
        return 0
    if length is None:
        raise ConfigError(
            f"{argument} is {limit}, a fraction, but the loader has no len() to take a fraction "
            f"of. Give a number of batches as an int."
        )
    # The small addition makes 0.29 of 100 the 29 that is meant, not 28.999999999999996.
    count = math.floor(limit * length + 1e-9)
    if count == 0:
        raise ConfigError(
            f"{argument} is {limit}, which leaves none of the {length} batches. Give at least "
            f"{1 / length:.3g}, or a number of batches as an int (0 for none)."
        )
    return count


_LIMIT = "Give a number of batches as an int, or a fraction as a float from 0.0 to 1.0 (1.0 or None: all)."


def parts(loader: Any) -> dict[str, Any]:
    """Returns a loader and what it is made of, by name."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    dataset = getattr(loader, "dataset", None)
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        "dataset": dataset,
    }


def generators(loader: Any) -> list[torch.Generator]:
    """Returns the generators that a loader or its parts draw from, beside the global state."""
    found = (
        own for part in parts(loader).values() for own in getattr(part, "__dict__", {}).values()
    )
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def own_randoms(name: str, part: Any) -> dict[str, OwnRandom]:
    """Returns what else a part of a loader draws from: attributes of Python's or NumPy's kinds."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random,)
    if numpy is not None:
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    own = getattr(part, "__dict__", {}).items()
    return {f"{name}.{key}": OwnRandom(value) for key, value in own if isinstance(value, kinds)}


def ends(state: Any) -> Iterator[bool]:
    """Yields for each worker in the state of a StatefulDataLoader whether its dataset ended."""
    if isinstance(state, Mapping):
        if "fetcher_ended" in state:
            yield state["fetcher_ended"]
        for part in state.values():
            yield from ends(part)


def has_state(part: Any) -> bool:
    """Tells whether a part has a ``state_dict()`` to call and can take it back."""
    if not hasattr(part, "load_state_dict") or not callable(getattr(part, "state_dict", None)):
        return False
    try:
        inspect.signature(part.state_dict).bind()
    except (TypeError, ValueError):
        return False
    return True


class OwnRandom:
    """Gives a ``random.Random``, or a generator of NumPy, a state that a checkpoint can hold."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain types."""
        source = self.source
        if isinstance(source, random.Random):
            return {"python": source.getstate()}
        if hasattr(source, "bit_generator"):
            return {"numpy": _plain(source.bit_generator.state)}
        return {"numpy": _plain(source.get_state(legacy=False))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        source = self.source
        if isinstance(source, random.Random):
            version, internal, gauss_next = state["python"]
            source.setstate((version, tuple(internal), gauss_next))
        elif hasattr(source, "bit_generator"):
            source.bit_generator.state = _unplain(state["numpy"])
        else:
            source.set_state(_unplain(state["numpy"]))


def _plain(state: Any) -> Any:
    """Returns a state of NumPy's with its arrays as lists."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if hasattr(state, "dtype") and state.ndim:
        return {"dtype": str(state.dtype), "values": [int(value) for value in state]}
    return state


def _unplain(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if set(state) == {"dtype", "values"}:
        return sys.modules["numpy"].array(state["values"], dtype=state["dtype"])
    return {key: _unplain(value) for key, value in state.items()}


def takes_turns(loader: Any) -> bool:
    """Tells whether a loader is a `TensorLoader`, which begins a pass anywhere by itself."""
    from lightkit.data.tensor_loader import TensorLoader

    return isinstance(loader, TensorLoader) and type(loader).__iter__ is TensorLoader.__iter__


class SampleCounts(NamedTuple):
    """How many samples each batch of a loader has, known without looking at the batches.

    Attributes:
        batch_size: Samples in every batch but the last.
        last: Samples in the last batch.
        batches: Number of batches of a whole pass.
    """

    batch_size: int
    last: int
    batches: int

    def of(self, index: int) -> int | None:
        """Returns the samples of batch ``index``; None beyond the end."""
        if index < self.batches - 1:
            return self.batch_size
        return self.last if index == self.batches - 1 else None


def sample_counts(loader: Any, share: Share | None = None) -> SampleCounts | None:
    """Returns the sample counts of a loader that batches in the stock way, else None.

    They are those of one process's batches, where ``share`` says which these are.

    None, too, for a custom batch sampler, an iterable dataset, ``batch_size=None``, a sampler
    without a length and a DataLoader subclass with its own ``__iter__``: there
    `lightkit.data.batch_size_of` looks at each batch. Counted are samples drawn from the dataset,
    whatever ``collate_fn`` makes of them.
    """
    sampler: Any = loader
    samples: int | None
    if takes_turns(loader):
        samples = len(loader.dataset)
    elif not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    else:
        sampler = loader.batch_sampler
        if type(sampler) is not BatchSampler or isinstance(loader.dataset, IterableDataset):
            return None
        samples = loader_length(sampler.sampler)
    if samples is None:
        return None
    size = sampler.batch_size
    full, rest = divmod(samples, size)
    last, total = (rest, full + 1) if rest and not sampler.drop_last else (size, full)
    if share is None:
        return SampleCounts(size, last, total)
    batches = share.length(total) or 0
    return SampleCounts(size, last if share.number(batches - 1) == total - 1 else size, batches)
