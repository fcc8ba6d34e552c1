from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from lightkit.checkpoint import disk, files, newest
from lightkit.checkpoint.disk import point, prepare_folder
from lightkit.checkpoint.files import (
    is_valid,
    read_any,
    read_checkpoint,
    save_file,
    write_checkpoint,
)
from lightkit.errors import CheckpointError


def a_checkpoint(step: int = 1, size: int = 4, **more) -> dict:
    header = {"format": 1, "version": "0", "epoch": 0, "global_step": step}
    loop = {"epoch": 0, "global_step": step}
    return {
        "lightkit": header,
        "model": {"w": torch.full((size,), float(step))},
        "loop": loop,
    } | more


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


class Evil:
    """Touches a file when it is unpickled without care."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Foreign:
    pass


# ---- writing


def test_written_and_read_and_loadable_with_torch_alone(tmp_path):
    path = tmp_path / "new" / "folder" / "a.ckpt"
    write_checkpoint(a_checkpoint(7, extra={"folder": pathlib.Path("x")}), path)
    assert names(path.parent) == ["a.ckpt"]
    loaded = torch.load(path, weights_only=True)
    assert torch.equal(loaded["model"]["w"], torch.full((4,), 7.0))
    assert read_checkpoint(path)["extra"] == {"folder": "x"}
    assert read_checkpoint(str(path))["loop"]["global_step"] == 7


def test_the_mode_of_the_file_is_that_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.ckpt").stat().st_mode) == 0o640


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    write_checkpoint(a_checkpoint(1), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.callbacks\.Mine\.f cannot be stored"):
        write_checkpoint(a_checkpoint(2, callbacks={"Mine": {"f": Foreign()}}), tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["loop"]["global_step"] == 1
    assert names(tmp_path) == ["a.ckpt"]


def test_any_storable_object_can_be_saved(tmp_path):
    save_file([torch.ones(2), {"path": pathlib.Path("x")}], tmp_path / "p.pt")
    assert torch.load(tmp_path / "p.pt", weights_only=True)[1] == {"path": "x"}
    assert read_any(tmp_path / "p.pt")[1] == {"path": "x"}


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_an_error_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, place):
    write_checkpoint(a_checkpoint(1), tmp_path / "a.ckpt")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, place, fail)
    with pytest.raises(CheckpointError, match=r"a\.ckpt could not be written: .*Input/output"):
        write_checkpoint(a_checkpoint(2), tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "a.ckpt")["loop"]["global_step"] == 1
    assert names(tmp_path) == ["a.ckpt"]


def test_the_data_is_on_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        fsync(descriptor)

    def spy_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        done.append(("rename", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", spy_fsync)
    monkeypatch.setattr(files.os, "replace", spy_replace)
    write_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    size = (tmp_path / "a.ckpt").stat().st_size
    assert done == [("file", size), ("rename", size), ("folder", None)]


def test_ctrl_c_while_writing_stays_ctrl_c_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_checkpoint(a_checkpoint(1), tmp_path / "a.ckpt")
    real = files._Recorder.write
    calls = []

    def interrupted(self, data):
        calls.append(len(data))
        if len(calls) == 3:

            class File:
                def write(self, data):
                    raise KeyboardInterrupt

            self._file = File()
        return real(self, data)

    monkeypatch.setattr(files._Recorder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(a_checkpoint(2), tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["loop"]["global_step"] == 1
    assert names(tmp_path) == ["a.ckpt"]


def test_a_full_disk_is_said_in_words_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(a_checkpoint(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(a_checkpoint(2, size=1 << 18), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert str(path) in message
    assert "It needs about 1.0 MiB, free there: " in message
    assert "Earlier checkpoints are untouched" in message
    assert read_checkpoint(path)["loop"]["global_step"] == 1
    assert names(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_an_unwritable_folder_is_said_in_words(tmp_path, monkeypatch, number):
    def forbidden(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(CheckpointError, match=r"is not writable for this user. Choose another"):
        write_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")


def test_a_folder_or_a_file_in_the_way(tmp_path):
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="could not be written: IsADirectoryError"):
        write_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not be written: .*Error"):
        write_checkpoint(a_checkpoint(), tmp_path / "file" / "a.ckpt")
    assert names(tmp_path) == ["a.ckpt", "file"]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", picky)
    write_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")


KILLED = """
import os, signal, sys, torch
from lightkit.checkpoint import files
path, place = sys.argv[1:]
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
if place == "middle":
    real = files._Recorder.write
    def write(self, data):
        if len(data) > 100_000: self._file.write(bytes(data)[:50_000]); self._file.flush(); die()
        return real(self, data)
    files._Recorder.write = write
else:
    setattr(files.os, place, die)
step = {"epoch": 0, "global_step": 2}
files.write_checkpoint({"lightkit": {"format": 1}, "loop": step, "w": torch.ones(1 << 18)}, path)
"""


@pytest.mark.parametrize("place", ["middle", "fsync", "replace"])
def test_kill_9_while_writing_leaves_the_old_file(tmp_path, place):
    path = tmp_path / "a.ckpt"
    write_checkpoint(a_checkpoint(1), path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), place], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert read_checkpoint(path)["loop"]["global_step"] == 1
    assert newest.latest(tmp_path) == path
    (leftover,) = set(names(tmp_path)) - {"a.ckpt"}
    assert leftover.endswith(".lightkit-tmp")
    prepare_folder(tmp_path)
    assert names(tmp_path) == ["a.ckpt"]


def test_temporary_files_that_may_have_a_writer_stay(tmp_path):
    mine = disk.temporary_name(tmp_path / "a.ckpt")
    other = tmp_path / ".b.ckpt.elsewhere.123.lightkit-tmp"
    user = tmp_path / "c.tmp"
    for path in (mine, other, user):
        path.touch()
    prepare_folder(tmp_path)
    assert len(names(tmp_path)) == 3
    for path in (mine, other, user):
        os.utime(path, (0, time.time() - 7200))
    prepare_folder(tmp_path)
    assert names(tmp_path) == ["c.tmp"]


# ---- reading


def test_a_missing_file_lists_what_there_is(tmp_path):
    write_checkpoint(a_checkpoint(), tmp_path / "step_000001.ckpt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "step_00001.ckpt")
    assert "does not exist. Did you mean 'step_000001.ckpt'?" in str(caught.value)
    assert str(caught.value).endswith(": step_000001.ckpt.")
    with pytest.raises(CheckpointError, match="nor does the folder"):
        read_checkpoint(tmp_path / "no" / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"is a folder. Name a file in it: step_000001.ckpt"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", r"no whole checkpoint \(0 bytes\)"), (b"hello world", "truncated or was not written")],
)
def test_foreign_bytes(tmp_path, content, what):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="damaged or no torch file"):
        read_any(tmp_path / "a.ckpt")
    assert not is_valid(tmp_path / "a.ckpt")


def test_a_truncated_file(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(a_checkpoint(), path)
    assert is_valid(path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert not is_valid(path)
        with pytest.raises(CheckpointError, match="truncated"):
            read_checkpoint(path)


def test_a_byte_that_changed_in_the_data_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(a_checkpoint(size=1000), path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(CheckpointError, match="damaged: the checksum"):
        read_checkpoint(path)


def test_any_wrong_bit_of_the_index_is_a_checkpoint_error_or_harmless(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(a_checkpoint(), path)
    content = path.read_bytes()
    for place in range(content.index(b"PK\x01\x02"), len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        is_valid(path)
        for read in (read_checkpoint, files.check_bytes):
            with contextlib.suppress(CheckpointError):
                read(path)


def test_a_file_that_goes_away_while_it_is_read(tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(CheckpointError, match="it is gone"):
        files.check_bytes(path)


def test_a_zip_file_from_elsewhere_and_a_torch_file_from_elsewhere(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x/readme.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged or no torch file"):
        read_checkpoint(tmp_path / "a.zip")
    assert not is_valid(tmp_path / "a.zip")
    torch.save({"weight": torch.ones(1), "bias": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"keys weight, bias.*load_weights"):
        read_checkpoint(tmp_path / "w.pt")
    torch.save([1], tmp_path / "l.pt")
    with pytest.raises(CheckpointError, match="it holds a list"):
        read_checkpoint(tmp_path / "l.pt")


def test_formats(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint({"lightkit": {"format": 99, "version": "9.1"}}, path)
    with pytest.raises(CheckpointError, match=r"written by lightkit 9\.1; .* Upgrade lightkit"):
        read_checkpoint(path)
    write_checkpoint({"lightkit": {}}, path)
    with pytest.raises(CheckpointError, match="names no format version"):
        read_checkpoint(path)
    lightning = {"state_dict": {"w": torch.ones(1)}, "pytorch-lightning_version": "2.5.0"}
    torch.save(lightning, path)
    assert list(read_checkpoint(path)) == list(lightning)


@pytest.mark.parametrize("read", [read_checkpoint, read_any])
def test_a_malicious_file_is_refused_and_executes_nothing(tmp_path, marker, read):
    torch.save({"lightkit": {"format": 1}, "a": Evil(marker)}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was executed"):
        read(tmp_path / "evil.ckpt")
    assert newest.latest(tmp_path) is None
    assert not marker.exists()


def test_an_object_of_a_foreign_class_is_named(tmp_path):
    torch.save({"lightkit": {"format": 1}, "a": Foreign()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"an object of type .*Foreign\. Loading such"):
        read_checkpoint(tmp_path / "a.ckpt")


# ---- second names


def test_a_pointer_is_a_hard_link_and_follows(tmp_path):
    for step in (1, 2):
        write_checkpoint(a_checkpoint(step), tmp_path / f"{step}.ckpt")
    for step in (1, 2, 2):
        point(tmp_path / "last.ckpt", tmp_path / f"{step}.ckpt")
        assert (tmp_path / "last.ckpt").samefile(tmp_path / f"{step}.ckpt")
        assert names(tmp_path) == ["1.ckpt", "2.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "1.ckpt")["loop"]["global_step"] == 1


def test_a_pointer_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", no_links)
    write_checkpoint(a_checkpoint(5), tmp_path / "5.ckpt")
    point(tmp_path / "last.ckpt", tmp_path / "5.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["loop"]["global_step"] == 5
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "5.ckpt")
    assert names(tmp_path) == ["5.ckpt", "last.ckpt"]


def test_a_pointer_that_cannot_be_renewed_is_an_error_and_stays(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(a_checkpoint(step), tmp_path / f"{step}.ckpt")
    point(tmp_path / "last.ckpt", tmp_path / "1.ckpt")

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"last\.ckpt could not be written"):
        point(tmp_path / "last.ckpt", tmp_path / "2.ckpt")
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "1.ckpt")
    assert names(tmp_path) == ["1.ckpt", "2.ckpt", "last.ckpt"]
