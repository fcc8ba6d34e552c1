"""What was written for an earlier version runs as it stands and computes the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lightkit import cli

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1_0"


@pytest.fixture
def numbers() -> dict:
    return json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))


@pytest.fixture
def script(monkeypatch):
    """The script, imported as a module that a configuration can name."""
    spec = importlib.util.spec_from_file_location("script", FOLDER / "script.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)
    spec.loader.exec_module(module)
    return module


def same(now, before, place: str) -> None:
    """Compares numbers, and what is around them; later versions may add to a mapping or a list."""
    if isinstance(before, dict):
        for key, value in before.items():
            same(now[key], value, f"{place}.{key}")
    elif isinstance(before, list) and isinstance(before[0], str):
        assert set(before) <= set(now), place
    elif isinstance(before, list):
        assert len(now) == len(before), place
        for i, value in enumerate(before):
            same(now[i], value, f"{place}[{i}]")
    elif isinstance(before, float):  # not by the bit: other builds of torch round otherwise
        assert now == pytest.approx(before, rel=1e-4, abs=1e-6), place
    else:
        assert now == before, place


def test_the_script_of_the_first_version(tmp_path, script, numbers):
    now = script.main(tmp_path)
    assert now.keys() == numbers.keys()
    same(now, numbers, "numbers")
    assert now["called"] == numbers["called"]


def test_the_configuration_that_it_wrote(tmp_path, monkeypatch, script, numbers):
    """With every argument that there was, and the names of its classes."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", str(FOLDER / "config.yaml")]) == 0
    folder = tmp_path / "runs" / "Net" / "version_0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in rows if "val_loss" in row] == pytest.approx(
        [2.4230, 2.0028], rel=1e-4
    )
    last = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    config = ["--config", str(folder / "config.yaml")]
    for command in ("validate", "test"):
        assert cli.main([command, *config, *last]) == 0
    assert cli.main(["predict", *config, *last, "--output", "predictions.pt"]) == 0
    assert (tmp_path / "predictions.pt").is_file()
