"""What the processes of test_amp.py do. Each function is called by all ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit import opening
from lightkit.precision import resolve_precision

#: Times any scale above 32 this leaves the range of float32. On 2 ranks it is the second one's.
LARGE = 1e37
BATCHES = [3.0, 1.0, 2.0, LARGE, 1.0, 4.0, 0.5, -LARGE, 2.0, 2.0, 1.0, 6.0]


class Net(lk.TaskModule):
    """Its gradient is the mean of the batch, over samples or tokens: exact in every format."""

    def __init__(self, weighted=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.weighted, self.rates = weighted, []

    def training_step(self, batch):
        if not self.weighted:
            return (self.weight * batch).mean()
        tokens = batch.clamp(0.5, 2.0)  # so many in each sample
        total = tokens.sum()
        return {"loss": (self.weight * batch * tokens).sum() / total, "weight": total}

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=1.0, momentum=0.5)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]


class Two(Net):
    """The first optimizer steps with every batch, the second one gathers over three."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward((self.weight * batch).mean())
        first.step()
        self.manual_backward((self.other * batch.clamp(-1.0, 4.0)).mean() / 3)
        if batch_idx % 3 == 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        return [SGD([p], lr=0.5) for p in (self.weight, self.other)]


def trained(task, world, precision="16-mixed", **options):
    """Trains for one epoch; with world=1 over the joined batches of so many ranks."""
    trainer = lk.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **options,
    )
    batches = torch.tensor(BATCHES).reshape(-1, 1)
    history = trainer.fit(task, DataLoader(batches, world))
    found = {
        "weights": [p.item() for p in task.parameters()],
        "rates": task.rates,
        "steps": trainer.global_step,
        "norm": history[-1].get("grad_norm"),
    }
    if trainer.session.precision.has_scaler:
        found["scale"] = trainer.session.precision.state_dict()["scaler"]["scale"]
    if trainer.lr_schedulers:
        found["moves"] = trainer.lr_schedulers[0].scheduler.last_epoch
    return found


def everything(world=1):
    """Trains tasks of all kinds; world=2 joins the batches of two ranks in one process."""
    found = {
        "plain": trained(Net(), world),
        "clipped": trained(Net(), world, gradient_clip_val=1.5),
        "unfused": trained(Net(), world, fused=False),
        "accumulated": trained(Net(), world, accumulate_grad_batches=2),
        "weighted": trained(Net(weighted=True), world),
        "manual": trained(Two(), world, gradient_clip_val=2.5),
        "bf16": trained(Net(), world, "bf16-mixed", gradient_clip_val=1.5),
    }
    real = resolve_precision

    def late(value, device):
        precision = real(value, device)
        precision._reads_late = True  # as on CUDA
        return precision

    opening.resolve_precision = late
    try:
        found["late"] = trained(Net(), world)
    finally:
        opening.resolve_precision = real
    return found
