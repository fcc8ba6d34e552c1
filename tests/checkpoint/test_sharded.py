"""Folders of sharded checkpoints as one process reads them; test_fsdp.py writes them on ranks."""

from __future__ import annotations

import enum
import importlib
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from lightkit.checkpoint import is_valid, load_weights, read_checkpoint, sharded
from lightkit.checkpoint.disk import MARK, REST, point
from lightkit.checkpoint.files import FORMAT, peek, read_any, write_checkpoint
from lightkit.errors import CheckpointError
from tests.checkpoint.conftest import WEIGHT


def test_it_reads_as_the_single_file_would(folder):
    contents = read_checkpoint(folder)
    assert torch.equal(contents["model"]["weight"], WEIGHT)
    assert torch.equal(contents["model"]["bias"], torch.ones(2))
    state = contents["optimizers"][0]["state"][0]["exp_avg"]
    assert state.dtype == torch.bfloat16
    assert torch.equal(state, WEIGHT.bfloat16() + 1)
    assert is_valid(folder)


def test_its_tensors_stay_on_the_disk_until_they_are_asked_for(folder):
    for contents in (read_checkpoint(folder, lazy=True), read_any(folder)):
        piece = contents["model"]["weight"]
        assert (piece.shape, piece.dtype) == ((2, 3), torch.float32)
        assert torch.equal(piece.whole(), WEIGHT)
    assert peek(folder)["loop"] == {"global_step": 3}


def test_its_weights_load_into_a_layer(folder):
    layer = torch.nn.Linear(3, 2)
    load_weights(layer, folder)
    assert torch.equal(layer.weight, WEIGHT)
    with pytest.raises(CheckpointError, match=r"weight \(file \(2, 3\), here \(2, 4\)\)"):
        load_weights(torch.nn.Linear(4, 2), folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("what", [Evil(), {"a": Evil()}, os.system, print, torch.load])
def test_nothing_in_it_is_executed(folder, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (folder / MARK).write_bytes(pickle.dumps(what))
    assert not is_valid(folder)
    for read in (read_checkpoint, sharded.check_bytes):
        with pytest.raises(CheckpointError, match="nothing was executed"):
            read(folder)
    assert not (tmp_path / "executed").exists()


def test_it_reads_no_file_outside_of_itself(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    metadata = pickle.loads((folder / MARK).read_bytes())
    for entry in metadata.storage_data.values():
        entry.relative_path = "../secret"
    (folder / MARK).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="names a file outside of itself"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        b"torch.distributed.checkpoint.metadata\nMetadata",
        b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING",
        b"torch.serialization\n_get_layout",
        b"torch\nSize",
    ],
)
def test_nothing_of_torch_is_changed_by_it(folder, name):
    (folder / MARK).write_bytes(b"c" + name + b"\n(N(dVplanted\nI1\nstb.")  # sets an attribute
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(folder)
    module, _, name = name.decode().partition("\n")
    assert not hasattr(getattr(importlib.import_module(module), name), "planted")


def negative(about, chunk, entry):
    about.size = chunk.sizes = torch.Size((-2, -3))


def huge(about, chunk, entry):
    about.size = chunk.sizes = torch.Size((2**30, 2**30))


def nothing(about, chunk, entry):
    about.chunks = None


def twice(about, chunk, entry):
    about.size, about.chunks = torch.Size((4, 3)), [chunk, chunk]


def before(about, chunk, entry):
    entry.offset = -5


def words(about, chunk, entry):
    entry.offset = "a"


@pytest.mark.parametrize("damage", [negative, huge, nothing, twice, before, words])
def test_sizes_that_cannot_be(folder, damage):
    metadata = pickle.loads((folder / MARK).read_bytes())
    about = metadata.state_dict_metadata["model.weight"]
    entries = {index.fqn: entry for index, entry in metadata.storage_data.items()}
    damage(about, about.chunks[0], entries["model.weight"])
    (folder / MARK).write_bytes(pickle.dumps(metadata))
    assert not is_valid(folder)
    with pytest.raises(CheckpointError, match="does not describe parts"):
        read_checkpoint(folder)


class Getting(pickle.Pickler):
    """Writes members of enums as Python 3.11 to 3.11.3 does."""

    wrong = None

    def reducer_override(self, item):
        if isinstance(item, enum.Enum):
            return getattr, self.wrong or (type(item), item.name)
        return NotImplemented


def test_members_of_enums_as_some_pythons_write_them(folder):
    metadata = pickle.loads((folder / MARK).read_bytes())
    with open(folder / MARK, "wb") as file:
        Getting(file).dump(metadata)
    assert b"getattr" in (folder / MARK).read_bytes()
    assert read_checkpoint(folder)["model"]["weight"].shape == WEIGHT.shape


@pytest.mark.parametrize("wrong", [(dict, "fromkeys"), (OrderedDict, "fromkeys")])
def test_nothing_else_is_got(folder, wrong):
    metadata = pickle.loads((folder / MARK).read_bytes())
    with open(folder / MARK, "wb") as file:
        pickler = Getting(file)
        pickler.wrong = wrong
        pickler.dump(metadata)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [torch.zeros(3), {"a": torch.zeros(99)}])
def test_something_else_in_the_place_of_a_part(folder, content):
    metadata = pickle.loads((folder / MARK).read_bytes())
    torch.save(content, folder / "__0_0.distcp")
    for entry in metadata.storage_data.values():
        entry.offset, entry.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / MARK).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"has something else in the place of model\.weight"):
        read_checkpoint(folder)


@pytest.mark.parametrize("gone", [MARK, REST, "__0_0.distcp"])
def test_one_that_is_not_whole(folder, gone):
    (folder / gone).unlink()
    assert not is_valid(folder)
    with pytest.raises(CheckpointError, match=gone):
        read_checkpoint(folder)


def test_a_mark_without_its_part(folder):
    rest = read_checkpoint(folder / REST)
    rest["model"]["bias"] = {"__lightkit_sharded__": "model.bias"}
    write_checkpoint(rest, folder / REST)
    with pytest.raises(CheckpointError, match=r"lacks the parts of model\.bias"):
        read_checkpoint(folder)


def test_a_second_name_shares_the_files(folder):
    last = folder.with_name("last.ckpt")
    point(last, folder)
    assert (last / REST).samefile(folder / REST)
    again = folder.with_name("other.ckpt")
    write_checkpoint({"lightkit": {"format": FORMAT}, "model": {}}, again)
    for target in (again, folder, again):  # files and folders take each other's place
        point(last, target)
        assert last.is_dir() == target.is_dir()
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "last.ckpt",
        "other.ckpt",
        "step_000003.ckpt",
    ]


def test_joining(folder, tmp_path):
    file = sharded.consolidate(folder, tmp_path / "joined.ckpt")
    assert torch.equal(read_checkpoint(file)["model"]["weight"], WEIGHT)
    with pytest.raises(CheckpointError, match="is a folder. Name the file to write"):
        sharded.consolidate(folder, tmp_path)
    with pytest.raises(CheckpointError, match="no folder of a sharded run"):
        sharded.consolidate(tmp_path / "nowhere", file)


def test_a_file_in_the_place_of_a_folder(folder):
    write_checkpoint({"lightkit": {"format": FORMAT}, "model": {}}, folder)
    assert folder.is_file()
    assert [p.name for p in folder.parent.iterdir()] == ["step_000003.ckpt"]
