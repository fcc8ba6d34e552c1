"""``provenance.json`` and ``code.diff``: what they say is so, and nothing of them ends a fit."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lightkit as lk
from lightkit import provenance
from lightkit.provenance import masked
from tests.small import Net, loader


@pytest.fixture(autouse=True)
def _asked_anew():
    provenance._git.cache_clear()
    yield
    provenance._git.cache_clear()


def git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *own, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A repository with one commit, in which the task seems to be defined."""
    folder = tmp_path / "code" / "inner"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("width = 4\n")
    (folder.parent / "data.py").write_text("size = 1\n")
    git(folder.parent, "init", "-q", "-b", "trunk")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(sys.modules["tests.small"], "__file__", str(folder / "model.py"))
    return folder


def fit(tmp_path: Path, **options) -> lk.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_epochs": 1, "default_root_dir": tmp_path / "runs", "logger": False}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = lk.Trainer(**quiet | given | options)
    trainer.fit(Net(), loader(), ckpt_path=ckpt_path)
    return trainer


def test_what_a_run_was_made_with(tmp_path, code):
    (found,) = provenance.read(fit(tmp_path, seed=7, max_steps=3).run_dir)
    assert found["argv"] == masked(sys.orig_argv)
    assert (found["cwd"], found["host"]) == (str(Path.cwd()), platform.node())
    assert (found["seed"], found["step"], found["processes"]) == (7, 0, 1)
    assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["lightkit"] == lk.__version__
    assert found["packages"]["pytest"] == pytest.__version__
    assert found["trainer"]["max_steps"] == 3
    assert found["trainer"]["precision"] == "32"


def test_a_clean_repository_is_its_revision(tmp_path, code):
    trainer = fit(tmp_path)
    found = provenance.read(trainer.run_dir)[0]["git"]
    assert found["revision"] == git(code, "rev-parse", "HEAD")
    assert found["branch"] == "trunk"
    assert (found["changed"], found["untracked"], found["diff"]) == (0, [], None)
    assert not (trainer.run_dir / "code.diff").exists()


def test_the_diff_makes_the_code_of_the_run_from_its_revision(tmp_path, code):
    (code / "model.py").write_text("width = 8\n")
    (code.parent / "data.py").write_text("size = 2\n")
    git(code, "add", "model.py")  # staged or not
    (code / "new file.py").write_text("")
    (code.parent / ".gitattributes").write_text("*.py diff=own\n")
    git(code, "config", "diff.own.textconv", f"touch {tmp_path}/ran;")  # must not be started
    trainer = fit(tmp_path)
    found = provenance.read(trainer.run_dir)[0]["git"]
    assert (found["changed"], found["diff"]) == (2, "code.diff")
    assert found["untracked"] == ["../.gitattributes", "new file.py"]
    assert not (tmp_path / "ran").exists()
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "-q", str(code.parent), str(copy))
    git(copy, "apply", str(trainer.run_dir / "code.diff"))
    assert (copy / "inner/model.py").read_text() == "width = 8\n"
    assert (copy / "data.py").read_text() == "size = 2\n"


def test_git_is_asked_once_and_only_by_fits_that_have_a_folder(tmp_path, code, monkeypatch):
    asked, real = [], provenance._output
    monkeypatch.setattr(
        provenance, "_output", lambda command: asked.append(command) or real(command)
    )
    fit(tmp_path, enable_checkpointing=False)
    fit(tmp_path, fast_dev_run=True)
    assert asked == []
    for rehearse in (True, False):
        fit(tmp_path, rehearse=rehearse)
        assert len(asked) == 1


def test_each_start_adds_an_entry(tmp_path, code):
    """A run that goes on with other code says so; an equal diff is not written twice."""
    (code / "model.py").write_text("width = 5\n")
    folder = fit(tmp_path, max_epochs=1).run_dir
    fit(tmp_path, max_epochs=2, ckpt_path="last")
    (code / "model.py").write_text("width = 6\n")
    provenance._git.cache_clear()
    fit(tmp_path, max_epochs=3, ckpt_path="last")
    entries = provenance.read(folder)
    assert [entry["step"] for entry in entries] == [0, 5, 10]
    assert [entry["git"]["diff"] for entry in entries] == ["code.diff", "code.diff", "code_2.diff"]
    assert "+width = 5\n" in (folder / "code.diff").read_text()
    assert "+width = 6\n" in (folder / "code_2.diff").read_text()


def test_a_long_diff_is_cut_behind_a_line(tmp_path, code, monkeypatch):
    monkeypatch.setattr(provenance, "MOST_BYTES", 1000)
    (code / "model.py").write_text("".join(f"line {i}\n" for i in range(100_000)))
    diff = (fit(tmp_path).run_dir / "code.diff").read_text()
    assert len(diff) < 1100
    *_, last, said = diff.splitlines()
    assert last.startswith("+line ")
    assert said == "# cut here: the diff is longer than 1000 bytes"


def test_a_repository_without_a_commit(tmp_path, code):
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q", "-b", "main")
    (empty / "a.py").write_text("")
    git(empty, "add", "a.py")
    found = provenance._git(empty)
    assert (found["revision"], found["branch"], found["changed"]) == (None, "main", 1)
    assert found["diff"] is None


@pytest.mark.parametrize("setting", ["diff.noprefix=true", "diff.relative=true", "diff.context=0"])
def test_the_diff_applies_whatever_is_set_and_changed(tmp_path, code, setting):
    """Also where a binary file changed; a submodule stays as it is committed."""
    (code / "picture").write_bytes(bytes(range(256)))
    git(code, "add", ".")
    git(code, "commit", "-q", "-m", "second")
    (code / "picture").write_bytes(bytes(reversed(range(256))))
    (code.parent / "data.py").write_text("size = 2\n")
    git(code, "config", *setting.split("="))
    found = provenance._git(code)
    (tmp_path / "code.diff").write_bytes(found["diff"])
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "-q", str(code.parent), str(copy))
    git(copy, "apply", str(tmp_path / "code.diff"))
    assert (copy / "inner/picture").read_bytes() == bytes(reversed(range(256)))
    assert (copy / "data.py").read_text() == "size = 2\n"


def test_a_binary_file_does_not_drive_text_out_of_the_diff(tmp_path, code, monkeypatch):
    monkeypatch.setattr(provenance, "MOST_BYTES", 1000)
    (code / "a").write_bytes(bytes(4))
    git(code, "add", ".")
    (code / "a").write_bytes(os.urandom(2000))
    (code / "model.py").write_text("width = 5\n")
    diff = provenance._git(code)["diff"]
    assert len(diff) < 1000
    assert b"+width = 5\n" in diff


def test_a_repository_that_the_environment_names_is_not_meant(tmp_path, code, monkeypatch):
    """As in a hook of git, which sets such variables."""
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q", "-b", "elsewhere")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / "none"))
    found = provenance._git(code)
    assert (found["branch"], found["changed"], found["untracked"]) == ("trunk", 0, [])
    assert provenance._git(tmp_path) is None


def test_a_repository_too_large_to_be_looked_through_has_its_revision(tmp_path, code, monkeypatch):
    revision = git(code, "rev-parse", "HEAD")
    real = provenance._output
    monkeypatch.setattr(
        provenance, "_output", lambda command: None if "status" in command else real(command)
    )
    found = provenance._git(code)
    assert (found["revision"], found["branch"], found["changed"]) == (revision, None, None)


@pytest.mark.parametrize("how", ["none", "slow", "child", "fails"])
def test_where_git_does_not_answer_nothing_is_said(tmp_path, code, monkeypatch, how):
    programs = tmp_path / "programs"
    programs.mkdir()
    if how != "none":
        slow = {"slow": "exec /bin/sleep 30", "child": "/bin/sleep 30; echo x"}
        line = slow.get(how, "echo '# branch.oid x'; exit 1")
        (programs / "git").write_text(f"#!/bin/sh\n{line}\n")
        (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(provenance, "MOST_SECONDS", 0.2)
    began = time.monotonic()
    assert provenance.read(fit(tmp_path).run_dir)[0]["git"] is None
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("file", [".provenance.json.part", "code.diff"])
def test_what_cannot_be_written_is_told_and_the_fit_goes_on(
    tmp_path, code, monkeypatch, caplog, file
):
    caplog.set_level(logging.WARNING, "lightkit")
    (code / "model.py").write_text("width = 5\n")
    real = Path.mkdir

    def mkdir(path: Path, *args, **kwargs) -> None:
        real(path, *args, **kwargs)
        if path.name == "version_0":
            real(path / file)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    trainer = fit(tmp_path)
    assert trainer.global_step == 5
    (told,) = [record.getMessage() for record in caplog.records]
    assert "could not be written" in told
    assert provenance.read(trainer.run_dir) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train.py --lr 0.1 --max_tokens 5", "train.py --lr 0.1 --max_tokens 5"),
        ("--api_key abc --lr 1", "--api_key *** --lr 1"),
        ("--api-key=abc --lr=1", "--api-key=*** --lr=1"),
        ("--task.hf_token abc", "--task.hf_token ***"),
        ("--accessToken abc", "--accessToken ***"),
        ("AWS_SECRET=abc x", "AWS_SECRET=*** x"),
        ("password abc", "password ***"),
        ("--use_auth --lr 1", "--use_auth --lr 1"),
        ('{"size":1,"password":"a,b"}', '{"size":1,"password":***'),
        ("https://me:abc@host/x?a=1", "https://***@host/x?a=1"),
        ("https://host/x?token=abc&a=1", "https://host/x?token=***"),
        ("--access_key_id abc", "--access_key_id ***"),
        ("--token -abc", "--token ***"),
        ("https://me:a@bc@host/x", "https://***@host/x"),
        ("Authorization:abc", "Authorization:***"),
    ],
)
def test_secrets_of_the_command_line_are_masked(words, shown):
    assert masked(words.split()) == shown.split()


def test_long_words_are_looked_through_at_once():
    began = time.monotonic()
    assert masked(["a." * 60_000, "-" * 60_000]) == ["a." * 60_000, "-" * 60_000]
    assert time.monotonic() - began < 5


def test_what_cannot_be_read_has_no_entries(tmp_path):
    for text in ("", "{", "7", "[7]", '{"a": 1}'):
        (tmp_path / "provenance.json").write_text(text)
        assert provenance.read(tmp_path) == []
    os.remove(tmp_path / "provenance.json")
    assert provenance.read(tmp_path) == []
