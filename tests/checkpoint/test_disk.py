"""What lies on the disk; test_files.py has the writing itself."""

from __future__ import annotations

import os

import pytest

from lightkit.checkpoint import disk


def a_folder(path, text="old"):
    path.mkdir()
    for name in (disk.REST, disk.MARK):
        (path / name).write_text(text)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path):
    path, new = a_folder(tmp_path / "a.ckpt"), a_folder(tmp_path / "new", "new")
    disk.give_name(new, path)
    assert (path / disk.REST).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "a.ckpt" / "mine.txt").write_text("mine")
    (tmp_path / "new").write_text("new")
    with pytest.raises(IsADirectoryError):
        disk.give_name(tmp_path / "new", tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt" / "mine.txt").read_text() == "mine"


def test_removing_takes_the_mark_first(tmp_path, monkeypatch):
    path = a_folder(tmp_path / "a.ckpt")

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        disk.remove(path)
    assert not (path / disk.MARK).exists()
    monkeypatch.undo()
    disk.remove(path)
    assert not path.exists()
    disk.remove(path)  # one that is gone is no error


def test_names_of_one_checkpoint(tmp_path):
    file, folder = tmp_path / "a.ckpt", a_folder(tmp_path / "b.ckpt")
    file.write_text("a")
    os.link(file, tmp_path / "c.ckpt")
    assert disk.same(file, tmp_path / "c.ckpt")
    assert not disk.same(file, folder)
    assert not disk.same(file, tmp_path / "nowhere")
    disk.point(tmp_path / "d.ckpt", folder)
    assert disk.same(folder, tmp_path / "d.ckpt")


def test_folders_that_a_killed_process_left_are_removed(tmp_path):
    left = a_folder(disk.temporary_name(tmp_path / "a.ckpt"))
    _, pid = left.name.removesuffix(disk.TEMPORARY).split(".")[-2:]
    gone = left.with_name(left.name.replace(f".{pid}.", ".999999999."))
    os.replace(left, gone)
    mine = a_folder(disk.temporary_name(tmp_path / "b.ckpt"))
    disk.prepare_folder(tmp_path)
    assert not gone.exists()
    assert mine.exists()
