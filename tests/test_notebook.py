"""A fit in a real notebook, as ``jupyter nbconvert --execute`` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbconvert", reason="needs jupyter: pip install nbconvert ipykernel")
pytest.importorskip("ipykernel", reason="needs jupyter: pip install nbconvert ipykernel")

SETUP = """
import warnings
warnings.simplefilter("error")
import lightkit as lk
from tests.small import Net, loader
trainer = lk.Trainer(max_epochs=2, accelerator="cpu")
"""
FIT = "history = trainer.fit(Net(), loader(), loader())"
FAIL = """
class Fails(Net):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("boom")

lk.Trainer(max_epochs=1, accelerator="cpu").fit(Fails(), loader())
"""
CELLS = (SETUP, FIT, "history.plot()", "trainer.validate(dataloaders=loader())", FAIL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What stands below each cell."""
    folder = tmp_path_factory.mktemp("notebook")
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [dict(cell, source=source) for source in CELLS]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (folder / "a.ipynb").write_text(json.dumps(notebook))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nbconvert", "--execute", "--allow-errors"),
            *("--to", "notebook", "--output", "b.ipynb", "a.ipynb"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [cell["outputs"] for cell in json.loads((folder / "b.ipynb").read_text())["cells"]]


def text(shown) -> str:
    return "".join("".join(part.get("text", "")) for part in shown)


def test_a_fit_leaves_plain_lines_and_no_bar(outputs):
    setup, fit = outputs[:2]
    assert setup == []
    lines = text(fit).splitlines()
    assert lines[0].startswith("device:   cpu, precision 32-true")
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["train_loss"]
    assert [line.split()[0] for line in lines if "/2 " in line] == ["1/2", "2/2"]
    assert lines[-3].startswith("best:     epoch ")
    assert lines[-2] == "results:  runs/Net/version_0"
    assert lines[-1].endswith("tensorboard --logdir runs/Net/version_0")
    assert "\x1b" not in text(fit)
    assert {part["output_type"] for part in fit} <= {"stream", "display_data"}
    assert {part["name"] for part in fit if "name" in part} == {"stdout"}
    assert ["".join(p["data"]["text/plain"]) for p in fit if "data" in p] in ([], [""])


def test_a_plot_is_shown_once_and_results_are_readable(outputs):
    (plot,) = outputs[2]
    assert plot["output_type"] == "execute_result"
    assert len(plot["data"]["image/png"]) > 10_000
    assert "validation: val_loss" in text(outputs[3])


def test_an_error_is_the_last_thing_that_stands_there(outputs):
    *before, error = outputs[4]
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "boom")
    assert "Epoch 1/1 stopped at batch 0/5" in text(before)
