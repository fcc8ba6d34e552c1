"""Restarts as people have them: torchrun's, and the same command typed again. Cold processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightkit import cli
from tests.faults.harness import KILLED, Outcome, compare, environment, log_of
from tests.faults.victim import Settings


def run(*words: str, cwd: Path, timeout: float = 120.0) -> tuple[int, str]:
    """Runs a Python module's command and returns its exit code and all that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment(PYTHONHASHSEED="7"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout


def test_torchrun_restarts_a_killed_worker(reference, tmp_path):
    root = tmp_path / "run"
    mark = tmp_path / "died"
    kill = {"place": "batch_end", "n": 9, "mark": str(mark)}
    settings = Settings(root=str(root), kill=kill)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    code, said = run(
        *launch, "--max-restarts", "2", "-m", "tests.faults.victim",
        json.dumps(dataclasses.asdict(settings)), cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, said[-6000:]
    assert mark.exists(), "nothing was killed"
    found = Outcome.of(root)
    assert not reference(settings).differences(found)
    assert found.folders == ["version_0"]


DIE_ONCE = """\
trainer:
  max_epochs: 3
  val_check_interval: 4
  log_every_n_steps: 3
  enable_progress_bar: false
  callbacks:
    - class_path: lightkit.callbacks.ModelCheckpoint
      init_args: {monitor: val_loss, every_n_train_steps: 3}
    - class_path: tests.faults.victim.DieOnce
      init_args: {mark: died, batches: 16}
"""


def test_the_same_command_typed_again(lives, tmp_path):
    pytest.importorskip("sklearn")
    words = ["fit", "--config", "config.yaml", "--config", "die.yaml", "--ckpt_path", "auto"]
    outcomes = []
    for name in ("left_alone", "killed"):
        project = tmp_path / name
        assert cli.main(["new", "tabular", str(project)]) == 0
        (project / "die.yaml").write_text(DIE_ONCE)
        if name == "killed":
            code, said = run("lightkit", *words, cwd=project)
            assert code == KILLED, said
            code, said = run("lightkit", *words, cwd=project)
            assert code == 0, said
        (project / "died").touch()  # nobody dies any more
        for _ in range(2):  # a finished run is left alone
            assert lives.command(words, project) == 0, log_of(project)
        (folder,) = (project / "runs" / "TabularNet").glob("version_*")
        outcomes.append(_contents(folder))
    different: list[str] = []
    compare(*outcomes, "run", different)
    assert not different, "\n".join(different)


def _contents(folder: Path) -> dict:
    """Returns the last checkpoint of a run without times and paths, and its rows."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("lightkit", "loggers", "callbacks"):
        saved.pop(name, None)
    saved["loop"].pop("seconds")
    saved["history"]["values"].pop("time")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return {**saved, "rows": rows, "files": sorted(p.name for p in folder.glob("checkpoints/*"))}
