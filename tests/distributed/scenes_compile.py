"""What the processes of test_compile.py do. Each function is called by all ranks."""

from __future__ import annotations

import torch
from torch import nn

import lightkit as lk
from lightkit.errors import ConfigError
from tests.distributed.scenes_ddp import FEATURES, loader, trainer

WAYS = {
    "ddp": ("ddp", {}),
    "accumulated": ("ddp", {"accumulate_grad_batches": 2}),
    "ddp in buckets": ("ddp", {"width": 30_000}),  # more than a megabyte in each block
    "ddp regional": ("ddp", {"regional": True}),
    "fsdp regional": ("fsdp", {"regional": True}),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(FEATURES, width), nn.Linear(width, FEATURES)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x))) / self.outer.in_features**0.5


class Net(lk.TaskModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(FEATURES, 1)

    def loss(self, batch):
        x, y = batch
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(self.head(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return {"loss": loss, "weight": len(batch[0])}

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, inputs):
        self.made += 1
        return graph.forward


def fit(strategy, how=False, width=8, **options):
    torch.manual_seed(3)
    task = Net(width)
    if width > 8:
        strategy = lk.DDPStrategy(bucket_cap_mb=1)
    own = trainer(strategy=strategy, compile=how, **options)
    history = own.fit(task, loader(1), loader(1, shuffle=False))
    state = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in task.state_dict().items()
    }
    entries = [{k: v for k, v in entry.items() if k != "time"} for entry in history]
    return {"history": entries, "weights": state}


def fits() -> dict:
    """Fits eager and compiled, in each way."""
    found = {}
    for name, (strategy, options) in WAYS.items():
        torch._dynamo.reset()
        options, graphs = dict(options), Graphs()
        how = {"backend": graphs, "regional": options.pop("regional", False)}
        eager, compiled = fit(strategy, **options), fit(strategy, how, **options)
        found[name] = {"eager": eager, "compiled": compiled, "graphs": graphs.made}
    try:
        fit("fsdp", True)
    except ConfigError as error:
        found["refused"] = str(error)
    return found
