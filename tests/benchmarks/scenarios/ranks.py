"""Two ranks by torchrun, beside a loop over torch's DistributedDataParallel in the same processes.

Batches are made before; each rank has the same number of them in every step. The wall's clock: ranks
wait for each other. One process has no DistributedDataParallel, by hand either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import lightkit as lk
from tests.benchmarks.beside import Beside
from tests.benchmarks.fresh import LIMIT, ROOT, FailedError, environment
from tests.benchmarks.plan import Plan
from tests.benchmarks.tables import Spread, Table
from tests.benchmarks.works import CLASSES

HEADER = ("ranks", "network", "beside the step", "us a step by hand", "time to the loop by hand")


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
        self.net, self.accuracy = net, _accuracy(measured)

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
    """The loop that people write; the metric is updated here too, and nothing is read.

    It is made at its first step, when the fit has made the group of ranks.
    """

    def __init__(self, make, measured: bool, batch):
        self.make, self.batch, self.net = make, batch, None
        self.accuracy = _accuracy(measured)

    def __call__(self, steps: int) -> None:
        if self.net is None:
            several = torch.distributed.get_world_size() > 1
            self.net = DistributedDataParallel(self.make()) if several else self.make()
            self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01)
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


def _accuracy(measured: bool):
    if not measured:
        return None
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(CLASSES)


def measure(model: str, measured: bool, rounds: int, folder: str) -> tuple[str, ...] | None:
    """Returns the cells of a row on one network; None on other ranks than the first."""
    make, size, chunk = MODELS[model]
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    x = torch.randn(size, 1, 8, 8, generator=generator)
    batch = x, torch.randint(0, CLASSES, (size,), generator=generator)
    hand = Hand(make, measured, batch)
    beside = Beside(hand, batch, chunk=chunk, rounds=rounds, clock=time.perf_counter)
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
    trainer.fit(Net(make(), measured), beside)
    if not trainer.is_global_zero:
        return None
    by_hand = Spread.of(beside.hand_seconds[0]).median / (2 * chunk) * 1e6
    what = "logs, metric" if measured else "nothing"
    ratio = Spread.of(beside.ratios()).show()
    return str(trainer.world_size), model, what, f"{by_hand:,.0f}", ratio


def one_world(result: str, rounds: int) -> None:
    """Measures everything in the processes that torchrun has started."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for measured in (False, True):
                rows.append(measure(model, measured, rounds, folder))
    if rows[0] is not None:
        Path(result).write_text(json.dumps(rows), encoding="utf-8")


def tables(plan: Plan) -> Iterator[Table]:
    """Starts torchrun once for each number of ranks."""
    rows: list[tuple[str, ...]] = []
    for world in (1, 2, 4) if plan.long else (2,):
        plan.say(f"{world} ranks")
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "rows.json")
            launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            words = [str(result), "4" if plan.quick else str(5 * plan.rounds)]
            command = [sys.executable, "-m", *launch, "-m", "tests.benchmarks.scenarios.ranks"]
            done = subprocess.run(
                [*command, *words],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
            )
            if done.returncode:
                raise FailedError(f"torchrun over {world} ranks:\n{done.stdout}")
            rows += json.loads(result.read_text(encoding="utf-8"))
    yield Table("ranks", "Ranks on one machine, gloo, one thread each", HEADER, rows)


if __name__ == "__main__":
    one_world(sys.argv[1], int(sys.argv[2]))
