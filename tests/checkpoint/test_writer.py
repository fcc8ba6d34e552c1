from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from lightkit.checkpoint import files, read_checkpoint, storable, writer
from lightkit.checkpoint.writer import Buffers, Writer
from lightkit.errors import CheckpointError

HEADER = {"format": 1, "version": "0"}


def a_checkpoint(step: int) -> dict:
    return {"lightkit": HEADER, "model": {"w": torch.full((4,), float(step))}}


def step_of(path) -> float:
    return read_checkpoint(path)["model"]["w"][0].item()


@pytest.fixture
def gate(monkeypatch):
    """Files begin to be written when it is set."""
    event, real = threading.Event(), writer.write_stored

    def wait_and_write(*arguments):
        assert event.wait(10)
        real(*arguments)

    monkeypatch.setattr(writer, "write_stored", wait_and_write)
    return event


@pytest.fixture
def broken(monkeypatch):
    """Counts the attempts to write a file, which all fail while the list is not cut."""
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
    attempts, real = [], os.replace

    def replace(source, target):
        attempts.append(target)
        if len(attempts) <= broken.times:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    def broken(times):
        broken.times = times
        monkeypatch.setattr(files.os, "replace", replace)
        return attempts

    return broken


# ---- in the background


def test_the_loop_goes_on_while_the_file_is_written(tmp_path, gate):
    path, done, w = tmp_path / "a.ckpt", [], Writer()
    before = threading.active_count()
    weights = torch.ones(4)
    contents = {"lightkit": HEADER, "model": {"w": weights}}
    then = lambda: done.append((threading.current_thread().name, path.exists()))  # noqa: E731
    w.write(contents, path, background=True, then=then)
    assert threading.active_count() == before + 1
    weights.zero_()  # the next step
    assert not path.exists()
    assert not done
    gate.set()
    w.wait()
    assert done == [("lightkit-writer", True)]
    assert step_of(path) == 1.0
    assert threading.active_count() == before


def test_no_thread_is_there_before_it_is_needed(tmp_path):
    before, done, w = threading.active_count(), [], Writer()
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", then=lambda: done.append(threading.main_thread()))
    assert threading.active_count() == before
    assert done == [threading.current_thread()]
    w.close(failed=False)


def test_one_is_under_way_and_the_next_waits(tmp_path, gate):
    w, done = Writer(), []
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True, then=lambda: done.append(1))
    threading.Timer(0.05, gate.set).start()
    w.write(a_checkpoint(2), tmp_path / "a.ckpt", background=True, then=lambda: done.append(2))
    assert done[0] == 1
    w.close(failed=False)
    assert done == [1, 2]
    assert step_of(tmp_path / "a.ckpt") == 2


def test_who_reads_waits(tmp_path, gate):
    w = Writer()
    w.write(a_checkpoint(3), tmp_path / "a.ckpt", background=True)
    threading.Timer(0.05, gate.set).start()
    assert step_of(tmp_path / "a.ckpt") == 3


def test_who_reads_when_it_is_complete_does_not_wait_for_itself(tmp_path):
    w, read = Writer(), []
    path = tmp_path / "a.ckpt"
    w.write(a_checkpoint(3), path, background=True, then=lambda: read.append(step_of(path)))
    w.wait()
    assert read == [3]


def test_what_cannot_be_stored_is_refused_at_once(tmp_path):
    w = Writer()
    with pytest.raises(CheckpointError, match=r"checkpoint\.bad cannot be stored"):
        w.write({"lightkit": HEADER, "bad": object()}, tmp_path / "a.ckpt", background=True)
    w.close(failed=False)
    assert not list(tmp_path.iterdir())


NEXT = {
    "write": lambda w, path: w.write(a_checkpoint(2), path),
    "wait": lambda w, path: w.wait(),
    "close": lambda w, path: w.close(failed=False),
}


@pytest.mark.parametrize("occasion", NEXT)
def test_an_error_comes_out_at_the_next_occasion_and_once(tmp_path, broken, occasion):
    attempts = broken(2)
    w, done = Writer(), []
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True, then=lambda: done.append(1))
    with pytest.raises(CheckpointError, match=r"a\.ckpt could not be written: No space left"):
        NEXT[occasion](w, tmp_path / "b.ckpt")
    assert len(attempts) == 2
    assert not done
    w.write(a_checkpoint(2), tmp_path / "b.ckpt")
    w.close(failed=False)


# ---- for the disk only


@pytest.fixture
def disk(monkeypatch):
    """The disk is slow: it answers when the event is set."""
    event, real = threading.Event(), files.sync_files

    def wait_and_sync(paths):
        assert event.wait(10)
        real(paths)

    monkeypatch.setattr(files, "sync_files", wait_and_sync)
    return event


def test_the_loop_goes_on_while_the_disk_is_waited_for(tmp_path, disk):
    path, done, w = tmp_path / "a.ckpt", [], Writer()
    weights = torch.ones(4)
    contents = {"lightkit": HEADER, "model": {"w": weights}}
    w.write(contents, path, background="disk", then=lambda: done.append(path.exists()))
    weights.zero_()  # the next step: the data is in the file already, without a copy in memory
    assert not path.exists()
    assert [p.name.endswith(".lightkit-tmp") for p in tmp_path.iterdir()] == [True]
    disk.set()
    assert step_of(path) == 1.0  # who reads waits
    assert done == [True]


def test_what_cannot_be_written_is_said_at_once_and_tried_once_more(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
    attempts = []

    def full(*arguments):
        attempts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        Writer().write(a_checkpoint(1), tmp_path / "a.ckpt", background="disk")
    assert len(attempts) == 2
    assert raised.value.__cause__.__context__ is None  # the first time is not shown once more
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("times", [1, 2])
def test_a_disk_that_fails_is_tried_once_more(tmp_path, broken, times):
    attempts = broken(times)
    w, errors = Writer(), []
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background="disk", failed=errors.append)
    w.wait()
    assert len(attempts) == 2
    assert [type(e) for e in errors] == [CheckpointError][times == 1 :]
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"][: times == 1]


@pytest.mark.parametrize("lost", [None, 200, -200])
def test_what_the_disk_did_not_take_is_given_to_it_again(tmp_path, monkeypatch, lost):
    """After an fsync that failed the next one succeeds, though nothing was written."""
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.02)
    written, real = [], os.fsync

    def fsync(descriptor):
        real(descriptor)
        written.append(os.fstat(descriptor).st_mtime_ns)
        if len(written) == 1:
            if lost is not None:  # a page that the system does not have any more
                with open(descriptor, "r+b", closefd=False) as file:
                    file.seek(lost, os.SEEK_SET if lost > 0 else os.SEEK_END)
                    file.write(bytes(100))
            raise OSError(errno.EIO, "Input/output error")

    w, errors = Writer(), []
    monkeypatch.setattr(files.os, "fsync", fsync)
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background="disk", failed=errors.append)
    w.wait()
    if lost is None:
        assert written[1] > written[0]
        assert step_of(tmp_path / "a.ckpt") == 1.0
        assert not errors
    else:
        assert [type(error) for error in errors] == [CheckpointError]
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_meanwhile_is_named(tmp_path, monkeypatch, disk):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)
    w, path = Writer(), tmp_path / "folder" / "a.ckpt"
    w.write(a_checkpoint(1), path, background="disk")
    shutil.rmtree(path.parent)
    disk.set()
    with pytest.raises(CheckpointError, match=r"a\.ckpt could not be written: .*No such file"):
        w.wait()


def test_an_error_goes_to_who_wants_it(tmp_path, broken):
    broken(2)
    w, errors = Writer(), []
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True, failed=errors.append)
    w.close(failed=False)
    assert [type(e) for e in errors] == [CheckpointError]


def test_an_error_of_what_comes_after_the_file_is_one_too(tmp_path):
    w, errors = Writer(), []
    path = tmp_path / "a.ckpt"
    w.write(a_checkpoint(1), path, background=True, then=lambda: 1 / 0, failed=errors.append)
    w.wait()
    assert [type(e) for e in errors] == [ZeroDivisionError]
    assert step_of(path) == 1


def test_it_never_hides_the_error_under_way(tmp_path, broken, caplog):
    broken(2)
    w = Writer()
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True)
    w.close(failed=True)
    assert "and in saving before the error" in caplog.text


def test_a_program_that_ends_still_writes_its_last_file(tmp_path):
    code = """
import sys, time, torch
from lightkit.checkpoint import Writer, writer
real = writer.write_stored
def slow(*arguments): time.sleep(0.2); real(*arguments)
writer.write_stored = slow
header = {"format": 1, "version": "0"}
contents = {"lightkit": header, "model": {"w": torch.ones(4)}}
from pathlib import Path
Writer().write(contents, Path(sys.argv[1]), background=True)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.ckpt")], check=True, timeout=60)
    assert step_of(tmp_path / "a.ckpt") == 1


IMPATIENT = """
import os, signal, sys, threading, time, torch
from pathlib import Path
from lightkit.checkpoint import Writer, settle, writer
real = writer.write_stored
def slow(*arguments): time.sleep(1.0); real(*arguments)
writer.write_stored = slow
header = {"format": 1, "version": "0"}
contents = {"lightkit": header, "model": {"w": torch.ones(4)}}
path, times = Path(sys.argv[1]), int(sys.argv[2])
w = Writer()
w.write(contents, path, background=True)
def send():
    for _ in range(times): time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=send, daemon=True).start()
try: w.wait()
except KeyboardInterrupt: print("interrupted")
if times == 1: settle(); print(path.exists())
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_wait_that_ctrl_c_broke_off_is_taken_up_again(tmp_path, times):
    path = tmp_path / "a.ckpt"
    command = [sys.executable, "-c", IMPATIENT, str(path), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["interrupted", "True"][: 3 - times]
    assert step_of(path) == 1  # also where the second one came while Python itself waited


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_does_not_wait_for_the_threads_of_its_parent(tmp_path, gate):
    w = Writer()
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True)
    child = os.fork()
    if not child:
        files.settle()
        os._exit(0)
    until = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
    gate.set()
    w.close(failed=False)
    assert ended == (child, 0)


def test_an_error_of_another_is_left_to_who_it_belongs_to(tmp_path, broken, caplog):
    broken(2)
    w, errors = Writer(), []
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True)
    for background in (False, True):
        w.write(a_checkpoint(2), tmp_path / "b.ckpt", background=background, failed=errors.append)
    assert step_of(tmp_path / "b.ckpt") == 2
    assert (
        caplog.text.count("a.ckpt could not be written") == 2
    )  # at once, the second time for good
    with pytest.raises(CheckpointError, match=r"a\.ckpt could not be written"):
        w.close(failed=False)
    assert not errors


# ---- once more


@pytest.mark.parametrize("background", [False, True])
def test_a_file_is_tried_once_more_after_a_while(tmp_path, broken, caplog, background):
    attempts = broken(1)
    w, done = Writer(), []
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        path = tmp_path / "a.ckpt"
        w.write(a_checkpoint(1), path, background=background, then=lambda: done.append(1))
        w.close(failed=False)
    assert len(attempts) == 2
    assert step_of(tmp_path / "a.ckpt") == 1
    (record,) = caplog.records
    assert "a.ckpt could not be written" in record.message
    assert "Trying once more in 0.001 s" in record.message
    assert done == [1]


def test_what_is_no_fault_of_the_disk_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def fail(*_):
        calls.append(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(files.torch, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        Writer().write(a_checkpoint(1), tmp_path / "a.ckpt")
    assert calls == [1]


# ---- files that must be there first


def test_other_files_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    rows, order = tmp_path / "rows", []
    rows.write_text("1")
    fsync, replace = os.fsync, os.replace

    def spy(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", spy)
    monkeypatch.setattr(files.os, "replace", lambda *a: (order.append("rename"), replace(*a)))
    gone = tmp_path / "gone"
    Writer().write(a_checkpoint(1), tmp_path / "a.ckpt", files=[rows, gone])
    assert order[0].endswith(".lightkit-tmp")
    assert order[1:] == ["rows", "rename", tmp_path.name]


# ---- the copy


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return type(one) is type(other) and all(k == j and same(v, w) for (k, v), (j, w) in pairs)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and all(map(same, one, other))
    return bool(one == other)


def everything() -> dict:
    table = torch.arange(12.0).reshape(3, 4)
    return storable(
        {
            "tied": [table, table[1:], table.t(), table],
            "types": [
                torch.arange(5).to(dtype)
                for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64)
            ],
            "complex": torch.arange(3) * 1j,
            "conjugate": (torch.arange(3) * 1j).conj(),
            "two types": [(c := torch.ones(2, dtype=torch.complex64)), torch.view_as_real(c)],
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 3),
            "wide": torch.ones(1).expand(3),
            "sparse": torch.eye(3).to_sparse(),
            "plain": (1, "a", None, {1, 2}, b"x", torch.float32),
            "counter": Counter("aab"),
        }
    )


def test_the_copy_is_equal_and_its_own():
    given, buffers = everything(), Buffers()
    copy = buffers.copy(given)
    assert same(copy.pop("sparse").to_dense(), given.pop("sparse").to_dense())
    assert same(copy, given)
    given["tied"][0].zero_()
    assert copy["tied"][0].sum() == 66


def test_what_shares_memory_shares_it_in_the_copy(tmp_path):
    tied = Buffers().copy(everything())["tied"]
    assert len({t.untyped_storage().data_ptr() for t in tied}) == 1
    tied[1].fill_(7)
    assert tied[2][0, 1] == 7
    files.save_file(tied, tmp_path / "a.pt")
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert len({t.untyped_storage().data_ptr() for t in again}) == 1


def test_a_state_dict_keeps_its_versions():
    state = storable(nn.BatchNorm1d(3).state_dict())
    copy = Buffers().copy(state)
    assert type(copy) is OrderedDict
    assert copy._metadata == state._metadata
    nn.BatchNorm1d(3).load_state_dict(copy)


def test_memory_is_kept_from_one_copy_to_the_next():
    buffers, model = Buffers(), nn.Linear(100, 100)
    first = buffers.copy(storable(model.state_dict()))
    places = [t.data_ptr() for t in first.values()]
    nn.init.ones_(model.weight)
    second = buffers.copy(storable(model.state_dict()))
    assert [t.data_ptr() for t in second.values()] == places
    assert second["weight"].sum() == 10_000
    other = buffers.copy({"weight": torch.zeros(7)})
    assert other["weight"].shape == (7,)
    assert sum(len(kept) for kept in buffers._kept.values()) == 1  # the others are let go


def test_closing_lets_go_of_the_memory(tmp_path):
    w = Writer()
    w.write(a_checkpoint(1), tmp_path / "a.ckpt", background=True)
    w.close(failed=False)
    gc.collect()
    assert not w._buffers._kept


def test_files_that_follow_each_other_hold_their_own_step(tmp_path):
    w, weights = Writer(), torch.zeros(1000)
    for step in range(10):
        weights.fill_(step)
        contents = {"lightkit": HEADER, "model": {"w": weights, "again": weights}}
        w.write(contents, tmp_path / f"{step}.ckpt", background=True)
    w.close(failed=False)
    for step in range(10):
        assert step_of(tmp_path / f"{step}.ckpt") == step


@pytest.mark.gpu
def test_from_a_gpu(tmp_path):
    w, weights = Writer(), torch.zeros(1000, device="cuda")
    for step in range(10):
        weights.fill_(step)
        contents = {"lightkit": HEADER, "model": {"w": weights, "part": weights[:700]}}
        w.write(contents, tmp_path / f"{step}.ckpt", background=True)
    w.close(failed=False)
    for step in range(10):
        model = read_checkpoint(tmp_path / f"{step}.ckpt")["model"]
        assert model["w"].device.type == "cpu"
        assert (model["w"] == step).all()
        assert model["part"].data_ptr() == model["w"].data_ptr()


def test_a_copy_is_quick_once_the_memory_is_there():
    buffers = Buffers()
    state = {str(i): torch.ones(1024, 256) for i in range(16)}
    buffers.copy(state)
    began = time.perf_counter()
    buffers.copy(state)
    assert time.perf_counter() - began < 1.0
