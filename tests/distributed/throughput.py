"""Steps per second on 1, 2 and 4 ranks, beside a loop over torch's DistributedDataParallel.

A script, from the root of the repository::

    python -m tests.distributed.throughput          # all of it, some minutes
    python -m tests.distributed.throughput 2 20     # 2 ranks, 20 rounds

Both loops run in the same processes, in turn: a chunk of the loop by hand, two of lightkit, one by
hand. So whatever else the machine does meets both. One process has no DistributedDataParallel, by
hand either. Batches are made before; each rank has the same number of them in every step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk

ROOT = Path(__file__).parents[2]
WORLDS, ROUNDS, WARMUP = (1, 2, 4), 40, 5
CLASSES = 10


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(32 * 4 * 4, CLASSES),
    )


#: By name: the network, samples per batch and rank, steps per chunk.
MODELS = {"MLP": (mlp, 8, 40), "CNN": (cnn, 32, 15)}


class Net(lk.TaskModule):
    """With ``measured``: a value logged and a torchmetrics object updated in every step."""

    def __init__(self, net: nn.Module, measured: bool):
        super().__init__()
        self.net, self.measured = net, measured
        self.accuracy = MulticlassAccuracy(CLASSES) if measured else None

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        loss = functional.cross_entropy(scores, y)
        if self.accuracy is not None:
            self.accuracy.update(scores, y)
            self.log("loss", loss)
            self.log("accuracy", self.accuracy)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Hand:
    """The loop that people write; the metric is updated here too, and nothing is read."""

    def __init__(self, net: nn.Module, measured: bool, batch):
        several = torch.distributed.get_world_size() > 1
        self.net = DistributedDataParallel(net) if several else net
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01)
        self.accuracy = MulticlassAccuracy(CLASSES) if measured else None
        self.batch = batch

    def run(self, steps: int) -> None:
        net, optimizer, accuracy = self.net, self.optimizer, self.accuracy
        for _ in range(steps):
            x, y = self.batch
            optimizer.zero_grad()
            scores = net(x)
            loss = functional.cross_entropy(scores, y)
            loss.backward()
            optimizer.step()
            if accuracy is not None:
                accuracy.update(scores, y)


class Rounds:
    """A loader that runs the loop by hand between its chunks: A B B A."""

    def __init__(self, make, batch, chunk: int, rounds: int):
        self.make, self.batch, self.chunk, self.rounds = make, batch, chunk, rounds
        self.hand, self.ours = [], []  # seconds for two chunks, one number for each round

    def __len__(self):
        return (WARMUP + self.rounds) * 2 * self.chunk

    def __iter__(self):
        hand, clock, chunk = self.make(), time.perf_counter, self.chunk
        for number in range(WARMUP + self.rounds):
            start = clock()
            hand.run(chunk)
            middle = clock()
            for _ in range(2 * chunk):
                yield self.batch
            end = clock()
            hand.run(chunk)
            if number >= WARMUP:
                self.hand.append(middle - start + clock() - end)
                self.ours.append(end - middle)


def measure(model: str, measured: bool, rounds: int, folder: str) -> str | None:
    """Returns a line on one network; None on other ranks than the first."""
    make, size, chunk = MODELS[model]
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    x = torch.randn(size, 1, 8, 8, generator=generator)
    batch = x, torch.randint(0, CLASSES, (size,), generator=generator)
    loader = Rounds(lambda: Hand(make(), measured, batch), batch, chunk, rounds)
    trainer = lk.Trainer(
        max_epochs=1,
        accelerator="cpu",
        seed=1,
        logger=measured,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # each rank has its own batches
        default_root_dir=folder,
        fused=False,
    )
    trainer.fit(Net(make(), measured), loader)
    if not trainer.is_global_zero:
        return None
    hand, ours = (2 * chunk / statistics.median(times) for times in (loader.hand, loader.ours))
    ratios = [b / a for a, b in zip(loader.hand, loader.ours, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    what = "logs, metric" if measured else "nothing"
    return (
        f"| {trainer.world_size} | {model} | {what} | {hand:.0f} | {ours:.0f} "
        f"| {ratio:.2f} ({low:.2f} to {high:.2f}) |"
    )


def one_world(rounds: int) -> None:
    """Measures everything in the processes that torchrun has started."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for measured in (False, True):
                line = measure(model, measured, rounds, folder)
                if line is not None:
                    print(line, flush=True)


def main() -> None:
    """Starts torchrun once for each number of ranks."""
    worlds = [int(sys.argv[1])] if len(sys.argv) > 1 else WORLDS
    rounds = sys.argv[2] if len(sys.argv) > 2 else str(ROUNDS)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print("| ranks | network | beside the step | steps/s by hand | steps/s | time: ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for world in worlds:
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command = [sys.executable, "-m", *launch, "-m", "tests.distributed.throughput"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LIGHTKIT_ROUNDS": rounds}
        found = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for line in found.stdout.splitlines():
            if line.startswith("|"):
                print(line, flush=True)
        if found.returncode:
            sys.exit(found.stdout)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        one_world(int(os.environ["LIGHTKIT_ROUNDS"]))
    else:
        main()
