"""The command ``lightkit prove``: what it says, what it returns, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightkit import prove
from lightkit.cli import main
from lightkit.errors import ConfigError


def good(folder):
    assert folder.is_dir()
    (folder / "file").write_text("")
    torch.rand(3)
    assert torch.get_num_threads() == 1
    return True, "3 of 3", {"n": 3}


def broken(folder):
    return False, "2 of 3", {"n": 2}


def raising(folder):
    raise ValueError("not even tried")


@pytest.fixture
def standing_in(monkeypatch):
    """Puts stand-ins in the place of the proofs."""

    def change(**proofs):
        monkeypatch.setattr(
            prove, "PROOFS", {name: (f"{name} holds", call) for name, call in proofs.items()}
        )

    return change


def test_a_line_and_a_figure_for_each(standing_in, capsys):
    standing_in(first=good, second=good)
    assert main(["prove"]) == 0
    about, *lines, end = capsys.readouterr().out.splitlines()
    assert about.startswith("lightkit ")
    assert torch.__version__ in about
    assert lines[0].startswith("OK      first holds (")
    assert lines[1] == "        3 of 3"
    assert end.startswith("2 of 2 hold; ")


@pytest.mark.parametrize(("stand_in", "figure"), [
    (broken, "2 of 3"), (raising, "ValueError: not even tried"),
])  # fmt: skip
def test_a_failed_proof_is_told_and_the_others_go_on(standing_in, capsys, stand_in, figure):
    standing_in(first=stand_in, second=good)
    assert main(["prove"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAILED  first holds (")
    assert lines[2] == f"        {figure}"
    assert lines[3].startswith("OK      second holds (")
    assert lines[-1].startswith("1 of 2 hold; ")


def test_json(standing_in, capsys):
    standing_in(first=good, second=broken)
    assert main(["prove", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["torch"] == torch.__version__
    assert [(p["name"], p["ok"], p["numbers"]) for p in found["proofs"]] == [
        ("first", True, {"n": 3}),
        ("second", False, {"n": 2}),
    ]
    assert main(["prove", "first", "--json"]) == 0


def test_nothing_changes_for_the_process(standing_in, tmp_path, monkeypatch):
    standing_in(first=good, second=raising)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert [proof.ok for proof in prove.prove()] == [True, False]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [*tmp_path.iterdir()] == []


def test_wrong_words(capsys):
    assert main(["prove", "synks"]) == 2
    said = capsys.readouterr()
    assert "Did you mean 'syncs'?" in said.err
    assert said.out == ""
    assert main(["prove", "--trainer.max_epochs", "3"]) == 2
    assert main(["prove", "--debug"]) == 2


def test_not_under_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="without torchrun"):
        prove.prove()


def test_help_names_the_proofs(capsys):
    assert main(["prove", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and claim in out for name, (claim, _) in prove.PROOFS.items())
    assert "--json" in out
    assert "--config" not in out


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    """In an empty folder, as a visitor runs it."""
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-m", "lightkit", "prove"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:8] for line in lines if line[:2] != "  "][1:-1] == ["OK      "] * 6
    assert lines[-1].startswith("6 of 6 hold; ")
    print(f"\n{done.stdout}")
    assert [*here.iterdir()] == []
    # torch itself makes an empty folder for what it compiles, at the first step of any optimizer
    assert [p for p in temporary.rglob("*") if not p.name.startswith("torchinductor_")] == []
