from __future__ import annotations

import logging
import os
import pathlib
import threading

import pytest
import torch

from lightkit.checkpoint import newest
from lightkit.checkpoint.disk import point
from lightkit.checkpoint.files import in_flight, write_checkpoint
from lightkit.checkpoint.newest import latest, orphans


def a_checkpoint(step: int = 1, size: int = 4, *, epoch: int = 0, **header) -> dict:
    return {
        "lightkit": {"format": 1, "version": "0", "epoch": 0, "global_step": step} | header,
        "model": {"w": torch.full((size,), float(step))},
        "loop": {"epoch": epoch, "global_step": step},
    }


def write(path: pathlib.Path, *args, at: int = 0, **more) -> pathlib.Path:
    write_checkpoint(a_checkpoint(*args, **more), path)
    if at:
        os.utime(path, (at, at))
    return path


def test_the_newest_has_the_most_steps_then_the_latest_time(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    write_checkpoint(a_checkpoint(30), tmp_path / "b.ckpt")
    write_checkpoint(a_checkpoint(4), tmp_path / "z.ckpt")
    assert latest(tmp_path) == tmp_path / "b.ckpt"
    write_checkpoint(a_checkpoint(30), tmp_path / "a.ckpt")
    os.utime(tmp_path / "b.ckpt", (1, 1))
    assert latest(str(tmp_path)) == tmp_path / "a.ckpt"


def test_the_newest_skips_damaged_files_with_a_warning_that_names_them(tmp_path, caplog):
    write_checkpoint(a_checkpoint(1), tmp_path / "step_000001.ckpt")
    write_checkpoint(a_checkpoint(2, size=1000), tmp_path / "step_000002.ckpt")
    write_checkpoint(a_checkpoint(3), tmp_path / "step_000003.ckpt")
    content = bytearray((tmp_path / "step_000002.ckpt").read_bytes())
    content[content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "step_000002.ckpt").write_bytes(content)
    os.truncate(tmp_path / "step_000003.ckpt", 500)
    torch.save({"a": 1}, tmp_path / "mine.ckpt")
    os.symlink(tmp_path / "gone", tmp_path / "link.ckpt")
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        assert latest(tmp_path) == tmp_path / "step_000001.ckpt"
    for name in ("step_000002.ckpt", "step_000003.ckpt", "mine.ckpt"):
        assert name in caplog.text
    assert len(caplog.records) == 3


@pytest.mark.parametrize("offset", [8, 10, 46])  # of the flags, the method and the first name
def test_one_wrong_bit_in_the_index_of_a_file_blocks_nothing(tmp_path, caplog, offset):
    good = write(tmp_path / "step_000001.ckpt", 1)
    bad = write(tmp_path / "step_000002.ckpt", 2)
    content = bytearray(bad.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] ^= 0x80 if offset == 46 else 0x41
    bad.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        assert latest(tmp_path) == good
        assert orphans(tmp_path, "a", 0) == []
    assert "step_000002.ckpt" in caplog.text


@pytest.mark.parametrize("before", ["peek", "stat", "check_bytes"])
def test_files_that_are_removed_in_the_meantime_are_passed_over(
    tmp_path, caplog, monkeypatch, before
):
    good, *others = (write(tmp_path / f"{step}.ckpt", step) for step in (1, 2, 3))
    name = "_position" if before == "stat" else before
    real = getattr(newest, name)

    def late(path, *more):
        found = real(path, *more) if before == "stat" else None
        if path in others:
            path.unlink()
        return found if before == "stat" else real(path, *more)

    monkeypatch.setattr(newest, name, late)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        assert latest(tmp_path) == good
    assert not caplog.records


def test_the_newest_is_never_one_with_weights_only_and_goes_by_its_own_name(tmp_path, caplog):
    weights_only = a_checkpoint(9)
    del weights_only["loop"]
    write_checkpoint(weights_only, tmp_path / "weights.ckpt")
    write_checkpoint(a_checkpoint(2), tmp_path / "epoch=1.ckpt")
    point(tmp_path / "last.ckpt", tmp_path / "epoch=1.ckpt")
    point(tmp_path / "best.ckpt", tmp_path / "epoch=1.ckpt")
    assert latest(tmp_path) == tmp_path / "epoch=1.ckpt"
    assert not caplog.records


def test_only_files_of_a_run_and_those_that_name_none(tmp_path):
    old = write(tmp_path / "old.ckpt", 1)
    mine = write(tmp_path / "mine.ckpt", 2, run="a")
    other = write(tmp_path / "other.ckpt", 3, run="b")
    assert latest(tmp_path) == other
    assert latest(tmp_path, run="a") == mine
    assert latest(tmp_path, run="b") == other
    mine.unlink()
    assert latest(tmp_path, run="a") == old


def test_of_one_step_the_later_state_then_the_exact_one_then_the_last_written(tmp_path):
    end = write(tmp_path / "end.ckpt", 5, epoch=1, at=10)
    write(tmp_path / "within.ckpt", 5, epoch=0, at=20)
    assert latest(tmp_path) == end
    exact = write(tmp_path / "exact.ckpt", 6, at=10)
    write(tmp_path / "after_an_error.ckpt", 6, exact=False, at=20)
    assert latest(tmp_path) == exact
    again = write(tmp_path / "again.ckpt", 6, exact=True, at=30)
    assert latest(tmp_path) == again


@pytest.mark.parametrize("loop", [{}, 3, {"global_step": "x"}, {"global_step": None}])
def test_a_file_that_does_not_say_where_it_stands_is_skipped(tmp_path, caplog, loop):
    good = write(tmp_path / "good.ckpt", 1)
    write_checkpoint(a_checkpoint(2) | {"loop": loop}, tmp_path / "odd.ckpt")
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        assert latest(tmp_path) == good
    assert "odd.ckpt" in caplog.text


def test_it_waits_for_a_file_that_is_being_written(tmp_path):
    go = threading.Event()

    def work():
        go.wait(5)
        write(tmp_path / "new.ckpt", 2)
        in_flight.pop(thread)
        done.set()

    write(tmp_path / "old.ckpt", 1)
    thread, done = threading.Thread(target=work), threading.Event()
    in_flight[thread] = done
    thread.start()
    threading.Timer(0.05, go.set).start()
    assert latest(tmp_path) == tmp_path / "new.ckpt"


def test_only_the_bytes_of_the_newest_are_read(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path / f"{step}.ckpt", step)
    read = []
    monkeypatch.setattr(newest, "check_bytes", read.append)
    assert latest(tmp_path) == tmp_path / "3.ckpt"
    assert read == [tmp_path / "3.ckpt"]


def test_forgotten_files_are_those_of_the_run_that_carry_their_later_step(tmp_path):
    write(tmp_path / "step_000003.ckpt", 3, run="a")  # known to the state
    forgotten = write(tmp_path / "step_000007.ckpt", 7, run="a")
    write(tmp_path / "step_000008.ckpt", 8, run="b")
    write(tmp_path / "step_000009.ckpt", 9)
    write(tmp_path / "step_000010.ckpt", 11, run="a")  # renamed by somebody
    write(tmp_path / "mine.ckpt", 12, run="a")
    (tmp_path / "step_000013.ckpt").write_bytes(b"torn")
    assert orphans(tmp_path, "a", 3) == [str(forgotten)]
