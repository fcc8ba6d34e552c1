"""Checkpoints of sharded runs: a folder in which every rank writes its part.

In the place of the file there is a folder of its name::

    rest.ckpt       everything but the parts, in the layout of a single file
    __0_0.distcp    the parts of rank 0, and so on for each rank
    .metadata       which part is where; written last, so it says that all is there

The parts and ``.metadata`` are those of ``torch.distributed.checkpoint``, with names such as
``model.net.weight``, so that ``dcp.load({"model": dict(task.named_parameters())},
checkpoint_id=folder)`` reads them. In ``rest.ckpt`` a mark with that name stands for each.

Any number of ranks reads a folder, one process too: each reads what it needs, without collectives.
Nothing in a folder is ever executed: of ``.metadata``, which is a pickle, only the classes that
describe parts are accepted.
"""

from __future__ import annotations

import enum
import io
import math
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from lightkit.checkpoint import disk, files
from lightkit.checkpoint.disk import MARK, REST
from lightkit.checkpoint.storable import storable
from lightkit.errors import CheckpointError, PeerError

if TYPE_CHECKING:
    from lightkit.distributed import Strategy

#: The one key of the mapping that stands for a tensor whose parts are in other files.
_PLACE = "__lightkit_sharded__"
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    _METADATA: {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values()
                        if isinstance(d, torch.dtype))},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_part(item: Any) -> bool:
    """Tells whether something is a tensor of which this rank has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(item, module.DTensor)


# --- writing ------------------------------------------------------------------------------------


class Shards:
    """One checkpoint that all ranks write together. Made and begun on all of them alike.

    Attributes:
        stored: Everything but the parts, ready to be written; on rank zero only.
        parts: This rank's parts by name.

    Args:
        contents: The checkpoint. What cannot be stored is converted or refused here and now.
        path: Where to: the name of the folder.
        strategy: The strategy of the run.

    Raises:
        CheckpointError: On all ranks. Something cannot be stored.
    """

    def __init__(self, contents: dict[str, Any], path: Path, strategy: Strategy) -> None:
        self.path = path
        self.parts: dict[str, Tensor] = {}
        self.stored: Any = None
        rest = _divided(contents, "", self.parts)

        def begin() -> str:
            self.stored = storable(rest, "checkpoint")
            return str(disk.temporary_name(path))

        # Collectives; the group has its own, so that a thread may write while the loop goes on.
        self._temporary = Path(strategy.ranks.decide(begin, "the start of a checkpoint"))
        self._group, self._rank = strategy.storage_group(), strategy.ranks.rank

    def copy(self, kept: dict[str, Tensor]) -> None:
        """Copies the parts to memory of the CPU, which is kept from one save to the next.

        Host sync: the copies are there when it returns.
        """
        for name, part in self.parts.items():
            copy = kept.get(name)
            if copy is None or copy.shape != part.shape or copy.dtype != part.dtype:
                copy = kept[name] = torch.empty_like(part, device="cpu")
            copy.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
            self.parts[name] = copy

    def write(self, stored: Any, others: Iterable[Path] = ()) -> None:
        """Writes the folder. It counts, under its name, when every rank has written its parts.

        A collective of the strategy's storage group, in any thread.

        Args:
            stored: What `stored` was, or a copy of it.
            others: Files that must be on the disk before this one counts.

        Raises:
            CheckpointError: On all ranks, if one of them could not write. What was there under this
                name is untouched.
            PeerError: Another rank is gone.
        """
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        folder, rest = self._temporary, lambda: self._finish_rest(stored, others)

        class Folder(FileSystemWriter):
            def storage_meta(self) -> None:  # it would name the temporary folder
                return None

            def write_data(self, plan: Any, planner: Any) -> Any:
                """Called when rank zero is past removing what an earlier try has left."""
                folder.mkdir(parents=True, exist_ok=True)
                return super().write_data(plan, planner)

            def finish(self, metadata: Any, results: Any) -> None:
                """Called on rank zero when all have written; its errors are everybody's."""
                rest()  # type: ignore[no-untyped-call]
                super().finish(metadata, results)
                disk.sync_folder(folder)
                disk.give_name(folder, self_path)

        self_path = self.path
        try:
            save(self.parts, storage_writer=Folder(folder), process_group=self._group)
        except CheckpointException as error:  # no Exception, by torch's choice
            self._discard()
            raise CheckpointError(self._why(error)) from None
        except RuntimeError as error:  # of the collective itself
            self._discard()
            raise PeerError(
                f"rank {self._rank} waited in 'the parts of a checkpoint': {error}"
            ) from error
        except BaseException:
            self._discard()
            raise

    def _finish_rest(self, stored: Any, others: Iterable[Path]) -> None:
        files.write_stored(stored, self._temporary / REST, others)

    def _discard(self) -> None:
        if not self._rank:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _why(self, error: Any) -> str:
        """Returns what to say about a folder that could not be written."""
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            text = disk.why(cause, self.path, sum(p.nbytes for p in self.parts.values()))
        else:
            text = f"{self.path} could not be written: {type(cause).__name__}: {cause}."
        return f"rank {rank}: {text}" if rank else text


def _divided(item: Any, name: str, parts: dict[str, Tensor]) -> Any:
    """Returns ``item`` with marks in the place of parts, which go to ``parts``."""
    if is_part(item):
        if name in parts:
            raise CheckpointError(
                f"checkpoint.{name} is there twice, under names that differ in dots."
            )
        parts[name] = item.detach()
        return {_PLACE: name}
    return _mapped(item, name, lambda inner, at: _divided(inner, at, parts))


def _mapped(item: Any, name: str, change: Callable[[Any, str], Any]) -> Any:
    """Returns a container with all it holds changed, or anything else as it is."""
    at = f"{name}." if name else ""
    if type(item) in (list, tuple):
        return type(item)(change(inner, f"{at}{i}") for i, inner in enumerate(item))
    if type(item) not in (dict, OrderedDict):
        return item
    made = type(item)((key, change(inner, f"{at}{key}")) for key, inner in item.items())
    if isinstance(item, OrderedDict):  # the version notes that torch keeps on a state dict
        vars(made).update(vars(item))
    return made


def point(pointer: Path, target: Path) -> None:
    """Makes ``pointer`` a second name of the folder ``target``: its files as hard links.

    Raises:
        CheckpointError: The folder cannot be written, or its file system has no links.
    """
    temporary = disk.temporary_name(pointer)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(target, temporary, copy_function=os.link)
        disk.sync_folder(temporary)
        disk.give_name(temporary, pointer)
    except (OSError, shutil.Error) as error:
        cause = error if error.errno else OSError(0, str(error))
        raise CheckpointError(disk.why(cause, pointer, 0)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------


class Piece:
    """A tensor in a folder, read when it is asked for.

    Attributes:
        name: Its name there.
        shape: Its shape, as a whole.
        dtype: Its type.
    """

    def __init__(self, folder: _Folder, name: str) -> None:
        self._folder, self.name = folder, name
        about = folder.metadata.state_dict_metadata[name]
        self.shape, self.dtype, self._chunks = about.size, about.properties.dtype, about.chunks
        there = sum(math.prod(chunk.sizes) for chunk in self._chunks)
        if there != math.prod(self.shape):
            raise CheckpointError(f"{folder.path} lacks parts of {name}.")

    def whole(self) -> Tensor:
        """Returns all of it, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._read(tensor, [0] * tensor.ndim)
        return tensor

    def fill(self, part: Tensor) -> None:
        """Fills this rank's part of a tensor of the same shape, reading what overlaps with it."""
        for chunk in part.__create_chunk_list__():  # type: ignore[attr-defined]
            own = torch.empty(chunk.sizes, dtype=self.dtype)
            self._read(own, list(chunk.offsets))
            if own.numel():
                part.to_local().copy_(own)  # type: ignore[attr-defined]

    def _read(self, target: Tensor, offsets: Sequence[int]) -> None:
        """Fills the region of the tensor that begins at ``offsets``."""
        for chunk in self._chunks:
            here, there = [], []
            for start, size, at, length in zip(
                offsets, target.shape, chunk.offsets, chunk.sizes, strict=True
            ):
                low, high = max(start, at), min(start + size, at + length)
                here.append(slice(low - start, high - start))
                there.append(slice(low - at, high - at))
                if low >= high:
                    break
            else:
                part = self._folder.read(self.name, chunk.offsets)
                if not isinstance(part, Tensor) or part.shape != tuple(chunk.sizes):
                    raise CheckpointError(
                        f"{self._folder.path} has something else in the place of {self.name} at "
                        f"{tuple(chunk.offsets)}."
                    )
                target[tuple(here)] = part[tuple(there)]


class _Folder:
    """The parts in a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, _metadata(path)
        try:
            self._entries = {
                (index.fqn, tuple(index.offset)): entry
                for index, entry in self.metadata.storage_data.items()
                if index.offset is not None
            }
            names = {str(entry.relative_path) for entry in self._entries.values()}
            for name, about in self.metadata.state_dict_metadata.items():
                self._check_sizes(name, about)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / MARK} does not describe parts: {error}.") from None
        for name in names:
            if os.path.basename(name) != name:
                raise CheckpointError(f"{path} names a file outside of itself: {name!r}.")

    def _check_sizes(self, name: str, about: Any) -> None:
        """Raises where what is said of a tensor cannot be, before memory is asked for."""
        places = set()
        for chunk in about.chunks:
            count = math.prod(chunk.sizes)
            for start, size, length in zip(chunk.offsets, chunk.sizes, about.size, strict=True):
                if start < 0 or size < 0 or (count and start + size > length):
                    raise ValueError(f"a part of {name} lies outside of it")
            entry = self._entries.get((name, tuple(chunk.offsets)))
            if not count or entry is None:  # what was not written is told when it is read
                continue
            if entry.offset < 0 or entry.length < count * about.properties.dtype.itemsize:
                raise ValueError(f"a part of {name} is longer than what was written of it")
            if tuple(chunk.offsets) in places:
                raise ValueError(f"a part of {name} is there twice")
            places.add(tuple(chunk.offsets))

    def read(self, name: str, offsets: Sequence[int]) -> Any:
        """Returns a part as it was written."""
        entry = self._entries.get((name, tuple(offsets)))
        if entry is None:
            raise CheckpointError(f"{self.path} lacks the part of {name} at {tuple(offsets)}.")
        data = self._bytes(entry)
        return files.load_bytes(io.BytesIO(data), self.path)

    def ends(self) -> dict[str, int]:
        """Returns the files of the parts, and how long each must be at least."""
        found: dict[str, int] = {}
        for entry in self._entries.values():
            name = str(entry.relative_path)
            found[name] = max(found.get(name, 0), entry.offset + entry.length)
        return found

    def check(self) -> None:
        """Reads every part and compares its checksums."""
        for entry in self._entries.values():
            self._bytes(entry)

    def _bytes(self, entry: Any) -> bytes:
        name = str(entry.relative_path)
        try:
            with open(self.path / name, "rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.length)
            with zipfile.ZipFile(io.BytesIO(data)) as parts:
                bad = parts.testzip()
        except Exception as error:  # zipfile raises nearly anything for wrong bits
            raise CheckpointError(
                f"{self.path / name} is damaged or truncated ({type(error).__name__}: {error})."
            ) from error
        if bad is not None:
            raise CheckpointError(f"{self.path / name} is damaged: the checksum of {bad} is wrong.")
        return data


class _Unpickler(pickle.Unpickler):
    """Accepts the classes that describe parts, and nothing that could do anything."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._members: dict[Any, Any] = {}  # of enums, by what stands for these

    def find_class(self, module: str, name: str) -> Any:
        """Returns a class by its name."""
        if (module, name) == ("builtins", "getattr"):
            # Python 3.11 to 3.11.3 pickles the member of an enum so; nothing else is got.
            return lambda of, member: self._members[of][member]
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(
                f"it names {module}.{name}. Loading such objects can run code, so lightkit never "
                f"does; nothing was executed"
            )
        found = super().find_class(module, name)
        if not hasattr(found, "__dict__") or module in ("torch", "collections"):
            return found
        # Of this file alone: a pickle can set attributes of what it gets.
        if isinstance(found, type) and not issubclass(found, enum.Enum):
            return type(name, (found,), {})

        def stand_in(*arguments: Any) -> Any:
            return found(*arguments)

        self._members[stand_in] = getattr(found, "__members__", {})
        return stand_in


def _metadata(path: Path) -> Any:
    """Returns what ``.metadata`` of a folder says."""
    import torch.distributed.checkpoint.metadata  # noqa: F401  # its classes are asked for by name

    try:
        with open(path / MARK, "rb") as file:
            metadata = _Unpickler(file).load()
        if not (metadata.state_dict_metadata and metadata.storage_data):
            raise CheckpointError("it describes nothing")
    except Exception as error:  # pickle raises nearly anything for wrong bits
        raise CheckpointError(f"{path / MARK} cannot be read: {error}.") from error
    return metadata


def check_whole(path: Path) -> None:
    """Raises where a folder is not whole, cheaply: files that are missing, or too short.

    Raises:
        CheckpointError: Says what is wrong.
    """
    if not files.is_valid(path / REST):
        raise CheckpointError(f"{path / REST} is missing or damaged.")
    for name, end in _Folder(path).ends().items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}.") from error
        if size < end:
            raise CheckpointError(f"{path / name} is truncated: {size} of {end} bytes.")


def check_bytes(path: Path) -> None:
    """Raises when bytes of a folder changed after it was written. Reads all of it."""
    files.check_bytes(path / REST)
    _Folder(path).check()


def pieces(path: Path, rest: Any) -> Any:
    """Returns ``rest.ckpt`` of a folder with a `Piece` in the place of each mark."""
    folder = _Folder(path)

    def change(item: Any, name: str) -> Any:
        if type(item) is dict and item.keys() == {_PLACE}:
            if item[_PLACE] not in folder.metadata.state_dict_metadata:
                raise CheckpointError(f"{path} lacks the parts of {item[_PLACE]}.")
            return Piece(folder, item[_PLACE])
        return _mapped(item, name, change)

    return change(rest, "")


def whole(item: Any, name: str = "") -> Any:
    """Returns something read from a folder with every tensor as a whole, on the CPU."""
    return item.whole() if isinstance(item, Piece) else _mapped(item, name, whole)


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Writes the folder of a sharded run as the ordinary single file.

    All of it goes through the memory of this process, once.

    Args:
        folder: The checkpoint of a sharded run.
        file: Where to; an existing file is replaced as a whole.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: The folder cannot be read, or the file not be written.
    """
    folder, file = Path(folder), Path(file)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder of a sharded run, so there is nothing to join."
        )
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder. Name the file to write.")
    files.write_checkpoint(files.read_checkpoint(folder), file)
    return file
