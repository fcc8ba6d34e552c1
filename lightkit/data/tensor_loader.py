"""`TensorLoader`: batches of tensors that lie in memory, cut by whole blocks."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from lightkit.data.planning import checksum
from lightkit.data.shares import Share
from lightkit.errors import ConfigError, DataError

_BLOCK = 256 * 1024  # bytes that are gathered together: stays in a core's cache until it is used
_ALIGNED = 64  # bytes: where memory of its own would begin, on which bits of a product may depend
#: Of these ``index_select`` knows no tensors with one dimension.
_UNSIGNED = torch.uint16, torch.uint32, torch.uint64


class TensorLoader:
    """Gives batches of tensors that lie in memory; for these, much cheaper than a DataLoader.

    From the same random states it gives the batches of
    ``DataLoader(TensorDataset(*tensors), batch_size, shuffle)``, bit for bit and in the same order,
    and leaves the random states as that does. So one can be put in the place of the other. A batch
    is a list with one tensor for each one given, or a dict with the names of a mapping. It is a
    copy: what a step does to it stays out of the data.

    With several processes each of them holds all data and takes its share of the batches.

    Args:
        tensors: Tensors or NumPy arrays whose first dimension is that of the samples; or one
            mapping of them. They are not copied.
        batch_size: Samples in a batch.
        shuffle: Whether each pass has an order of its own.
        drop_last: Whether a last batch of fewer samples is left out.
        generator: What the order is drawn from, on the CPU. Default: torch's global state.
        device: Where the tensors live from the first pass on, so that no batch has to be moved
            later. Without an index it is the device that the process uses then. Default: where
            they are.
        pin_memory: Whether batches lie in pinned memory, from which they are copied to a GPU
            without waiting. It is not asked for again with every batch. Nothing without a GPU.

    Attributes:
        batch_size: As given; likewise ``shuffle``, ``drop_last``, ``generator``, ``device`` and
            ``pin_memory``.

    Raises:
        ConfigError: An argument that cannot work, a device that does not exist.
        DataError: No tensor, what is none, different numbers of samples, or not enough for a batch.
    """

    def __init__(
        self,
        *tensors: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        _check_options(batch_size, generator, shuffle=shuffle, drop_last=drop_last, pin=pin_memory)
        self.batch_size, self.shuffle, self.drop_last = int(batch_size), shuffle, drop_last
        self.generator, self.device, self.pin_memory = generator, _device(device), pin_memory
        named = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], Mapping) else None
        self._keys = None if named is None else list(named)
        given = dict(enumerate(tensors)) if named is None else named
        self._tensors = [_as_tensor(key, value) for key, value in given.items()]
        samples = {key: len(t) for key, t in zip(given, self._tensors, strict=True)}
        _check_samples(samples, batch_size if drop_last else 1)
        self._check_places()

    def _check_places(self) -> None:
        """Raises unless all tensors are in one place, and pinned memory makes sense there."""
        found = {str(tensor.device) for tensor in self._tensors}
        if self.device is not None:
            found = {str(self.device)}
        if len(found) > 1:
            raise DataError(
                f"The tensors are on different devices: {', '.join(sorted(found))}. Move them to "
                f'one, or give device="..." to have them moved.'
            )
        (place,) = found
        if self.pin_memory and place != "cpu":
            raise ConfigError(
                f"pin_memory=True, but the tensors live on {place!r} and are not copied from the "
                f"CPU. Leave pin_memory out."
            )

    @property
    def dataset(self) -> TensorDataset:
        """The tensors as a data set, for code that asks a loader for its samples."""
        return TensorDataset(*self._tensors)

    def __len__(self) -> int:
        full, rest = divmod(len(self._tensors[0]), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        return iter(TensorPass(self, Share()))

    def _placed(self) -> list[Tensor]:
        """Returns the tensors where they live; the first pass brings them there."""
        if self.device is not None:
            self._tensors = [tensor.to(self.device) for tensor in self._tensors]
        return self._tensors


class TensorPass:
    """One pass over a `TensorLoader`; iterating over it gives batches.

    What decides the order is drawn where a DataLoader draws it: one number at once, the order with
    the first batch. Where a pass is continued, or shared, the order is drawn at once too.

    Args:
        loader: The loader.
        share: Which of the batches are given.
        skip: How many of these are done already.
        limit: How many batches all processes use together at most; None for all.
    """

    def __init__(
        self, loader: TensorLoader, share: Share, skip: int = 0, limit: int | None = None
    ) -> None:
        self._loader, self._share, self._skip = loader, share, skip
        total, size = len(loader), loader.batch_size
        self._samples = len(loader._tensors[0])
        self._count = share.length(total if limit is None else min(total, limit)) or 0
        self._order: Tensor | None = None
        self._marked = 0, 0  # batches of all processes, and their mark
        # The sampler of a DataLoader draws once more from a generator of its own when it is asked
        # for more samples than there are: for the rest of a last batch, else for one more batch.
        drawing = loader.shuffle and loader.generator is not None
        self._draws = drawing and (limit is None or limit >= total)
        whole = loader.drop_last or self._samples % size == 0 or share.before(self._count) < total
        self._late = self._count if whole else self._count - 1
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=loader.generator)
        if skip or share.world > 1:
            self._drawn()
        if skip > self._late:
            self._draw_again()

    def __iter__(self) -> Iterator[Any]:
        self._drawn()
        late = max(self._late, self._skip)
        yield from self._batches(self._skip, late)
        self._draw_again()
        yield from self._batches(late, self._count)

    def mark(self, done: int) -> int:
        """Returns the hash of the first ``done`` batches of all, as for any sampler; see `Plan`."""
        size = self._loader.batch_size
        before, mark = self._marked if self._marked[0] <= done else (0, 0)
        if done > before:
            for indices in torch.split(self._drawn()[before * size : done * size], size):
                mark = checksum(indices, mark)
            self._marked = done, mark
        return mark

    def _drawn(self) -> Tensor:
        """Returns the order of the samples, on the CPU."""
        if self._order is None:
            generator = self._loader.generator
            if not self._loader.shuffle:
                self._order = torch.arange(self._samples, device="cpu")
                return self._order
            if generator is None:
                seed = torch.empty((), dtype=torch.int64, device="cpu").random_()
                generator = torch.Generator().manual_seed(int(seed))
            self._order = torch.randperm(self._samples, generator=generator, device="cpu")
        return self._order

    def _draw_again(self) -> None:
        if self._draws:
            torch.randperm(self._samples, generator=self._loader.generator, device="cpu")
            self._draws = False

    def _batches(self, start: int, stop: int) -> Iterator[Any]:
        """Yields the batches from ``start`` to ``stop`` of this process, gathered by blocks."""
        if start >= stop:
            return
        tensors, keys, size = self._loader._placed(), self._loader._keys, self._loader.batch_size
        order = self._drawn()
        device = tensors[0].device
        if device.type != "cpu":
            order = order.to(device, non_blocking=True)  # once a pass; waits for nothing
        pin = self._loader.pin_memory and torch.cuda.is_available()
        step = max(1, _BLOCK // max(1, size * sum(map(_row_bytes, tensors))))
        for first in range(start, stop, step):
            index = self._indices(order, first, min(first + step, stop))
            columns = [_cut(tensor, index, size, pin) for tensor in tensors]
            if keys is None:
                yield from map(list, zip(*columns, strict=True))
            else:
                for values in zip(*columns, strict=True):
                    yield dict(zip(keys, values, strict=True))

    def _indices(self, order: Tensor, first: int, last: int) -> Tensor:
        """Returns the samples of this process's batches from ``first`` to ``last``."""
        share, size = self._share, self._loader.batch_size
        if share.world == 1:
            return order[share.number(first) * size : share.number(last) * size]
        numbers = [share.number(i) * size for i in range(first, last)]
        return torch.cat([order[at : at + size] for at in numbers])


def _cut(tensor: Tensor, index: Tensor, size: int, pin: bool) -> Any:
    """Returns the chosen samples as batches, which are as good as tensors of their own.

    Several are made at once where each begins at an address at which memory of its own might
    begin. Not by `split`, whose parts count changes of each other as changes of themselves.
    """
    if size * _row_bytes(tensor) % _ALIGNED == 0 or len(index) <= size:
        return _gather(tensor, index, pin).unsafe_split(size)
    return [_gather(tensor, part, pin) for part in torch.split(index, size)]


def _gather(tensor: Tensor, index: Tensor, pin: bool) -> Tensor:
    if tensor.ndim == 1 and tensor.dtype in _UNSIGNED:
        chosen = tensor[index]
        return chosen.pin_memory() if pin else chosen
    if not pin:
        return tensor.index_select(0, index)
    # From torch's store of pinned memory, which waits by itself for copies that are under way.
    shape = (len(index), *tensor.shape[1:])
    block = torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return torch.index_select(tensor, 0, index, out=block)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * math.prod(tensor.shape[1:])


def _as_tensor(key: Any, value: Any) -> Tensor:
    """Returns what was given as a tensor over the same memory."""
    what = f"{key!r} of the mapping" if isinstance(key, str) else f"Argument {key} of TensorLoader"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        value = _from_array(what, value)
    if not isinstance(value, Tensor):
        raise DataError(
            f"{what} is no tensor but {value!r:.60} ({type(value).__name__}). {_advice(value)}"
        )
    if value.ndim == 0:
        raise DataError(f"{what} has no dimension; the first one must be that of the samples.")
    if value.layout is not torch.strided or value.is_nested:
        raise DataError(
            f"{what} is sparse or nested ({value.layout}), and no batches can be cut out of it. "
            f"Give a dense tensor, or use a DataLoader."
        )
    return value


def _from_array(what: str, array: Any) -> Tensor:
    try:
        with warnings.catch_warnings():
            # Of one that cannot be written, such as a file that is mapped: it is only read.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is an array of {array.dtype}: {error}") from None


def _advice(value: Any) -> str:
    """Says what to write instead of what is no tensor."""
    if isinstance(value, Dataset):
        return (
            "Give the tensors themselves: TensorLoader(*dataset.tensors, batch_size=32) for a "
            "TensorDataset; TensorLoader(x[part.indices], y[part.indices]) for a part of one. Data "
            "that are read sample by sample need a DataLoader."
        )
    if isinstance(value, (list, tuple)):
        return "Give tensors one by one: TensorLoader(x, y, batch_size=32)."
    if isinstance(value, int):
        return f"If it is the batch size: batch_size={value}."
    return "Give tensors, NumPy arrays, or one mapping of them: TensorLoader(x, y, batch_size=32)."


def _check_samples(samples: dict[Any, int], least: int) -> None:
    """Raises `DataError` unless all tensors have equally many samples, and enough."""
    if not samples:
        raise DataError("TensorLoader has no tensor. Give some: TensorLoader(x, y, batch_size=32).")
    count = next(iter(samples.values()))
    if len({*samples.values()}) > 1:
        found = ", ".join(f"{key!r}: {size}" for key, size in samples.items())
        raise DataError(
            f"The tensors have different numbers of samples ({found}). The first dimension must be "
            f"the same for all."
        )
    if count == 0:
        raise DataError("The tensors have no samples: their first dimension is 0.")
    if count < least:
        raise DataError(
            f"{count} samples do not fill one batch of {least}, and drop_last=True drops what is "
            f"left. Use a smaller batch_size or drop_last=False."
        )


def _check_options(batch_size: Any, generator: Any, **switches: Any) -> None:
    """Raises `ConfigError` for arguments that cannot work by themselves."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise ConfigError(f"batch_size={batch_size!r}: allowed is a whole number of at least 1.")
    for name, value in switches.items():
        if not isinstance(value, bool):
            name = "pin_memory" if name == "pin" else name
            raise ConfigError(f"{name}={value!r}: allowed are True and False.")
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator={generator!r}: allowed is a torch.Generator, or None.")
    if generator.device.type != "cpu":
        raise ConfigError(
            f"The generator is one of {generator.device}, but the order is drawn on the CPU, so "
            f"that it is the same on every device. Give torch.Generator()."
        )


def _device(given: Any) -> torch.device | None:
    """Returns a device that exists.

    Raises:
        ConfigError: It does not.
    """
    if given is None:
        return None
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(
            f'device={given!r} is no device. Give one such as "cuda", "cuda:1" or "cpu".'
        ) from None
    if device.type == "cuda":  # without waking it up
        cards = torch.cuda.device_count()
        if (device.index or 0) >= cards:
            raise ConfigError(
                f"device={str(given)!r}, but this machine has {cards} CUDA devices that torch can "
                f"use. Leave it out for tensors in the memory of the CPU."
            )
        return device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"device={str(given)!r} cannot be used here: {first}") from None
    return device
