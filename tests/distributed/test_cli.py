"""The command on several processes: it starts torch's launcher by itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lightkit.cli import main
from tests.distributed.harness import environment

PROJECT = """
import json
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    def __init__(self, fails: int = -1):
        super().__init__()
        self.fails = fails
        self.net = torch.nn.Linear(3, 1)
        self.first = self.net.weight.tolist()

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == self.fails:
            raise ValueError("boom")
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_end(self):
        told = {"seed": self.trainer.options.seed, "first": self.first,
                "world": self.trainer.world_size}
        Path(f"rank_{os.environ['RANK']}.json").write_text(json.dumps(told))


class Data(lk.DataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 3)), 4, shuffle=True)
"""
CONFIG = """
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
task: {class_path: project.Net}
data: {class_path: project.Data}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "c.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lightkit(project, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightkit", "fit", "--config", "c.yaml", *words]
    return subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, timeout=60
    )


def test_it_starts_as_many_processes_with_one_drawn_seed(project) -> None:
    done = lightkit(project, "--trainer.devices", "2")
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "starting: torchrun --standalone --nproc-per-node 2 -m lightkit fit --config c.yaml "
        "--trainer.devices 2"
    )
    told = [json.loads((project / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]  # the drawn seed, and the network made from it
    assert told[0]["world"] == 2
    assert sum(line.startswith("device: ") for line in lines) == 1  # rank zero alone prints
    assert len(list(project.glob("runs/Net/*"))) == 1


def test_a_rank_that_fails_fails_the_command(project) -> None:
    done = lightkit(project, "--trainer.devices", "2", "--task.fails", "1")
    assert done.returncode == 1
    assert done.stderr.count("[rank1]: ValueError: boom") == 1
    assert "rank 0 waited in" in done.stderr + done.stdout


def test_several_machines_are_for_a_launcher(project, capsys) -> None:
    given = ["--trainer.devices", "2", "--trainer.num_nodes", "3"]
    assert main(["fit", "--config", "c.yaml", *given]) == 2
    text = capsys.readouterr().err
    assert "num_nodes=3: a command starts processes on its own machine only" in text
    assert "torchrun --nnodes 3 --nproc-per-node 2 --rdzv-backend c10d" in text
