"""What the processes of test_events.py do. Each function is called by all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lightkit as lk
from tests.distributed.quiet import quiet_trainer
from tests.distributed.scenes_ddp import Net, Tokens, loader

DECAY = 0.05


def penalty(trainer, task):
    return DECAY * sum(p.square().sum() for p in task.parameters())


class Logs(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for how in ("std", "last", "running:7"):
            self.log(how.partition(":")[0], loss.detach(), reduce_fx=how)
        return loss


class Bowl(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([2.0, 1.0]))

    def training_step(self):
        return (self.x - 3).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def weights(task) -> list[torch.Tensor]:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in task.parameters()]
    return [p.detach().clone() for p in whole]


def fit(kind, world, **options) -> list[torch.Tensor]:
    """Returns the weights after a fit with a penalty, on one of so many ranks or on one alone."""
    torch.manual_seed(0)
    task, made = kind(), quiet_trainer(max_epochs=2, fused=False, **options)
    made.add_to_loss(penalty)
    made.fit(task, loader(world, shuffle=False))
    return weights(task)


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {"net": fit(Net, 1), "tokens": fit(Tokens, 1)}
    found["accumulated"] = fit(Net, 1, accumulate_grad_batches=3)
    found["unused allowed"] = fit(Net, 1, strategy="ddp_find_unused_parameters_true")
    found["sharded"] = fit(Net, 1, strategy="fsdp")
    task, calls, rank = Logs(), [], []
    made = quiet_trainer(max_epochs=2, log_every_n_steps=4)
    made.on("train_epoch_end", lambda trainer: calls.append(trainer.global_rank), rank_zero=True)
    made.on("train_epoch_end", lambda trainer: rank.append(trainer.global_rank))
    history = made.fit(task, loader(1, shuffle=False))
    found["rows"] = [{k: row[k] for k in ("std", "last", "running")} for row in history]
    found["calls"] = (calls, rank)
    bowl, made = Bowl(), quiet_trainer(fused=False)
    made.fit(bowl, max_steps=5)
    found["bowl"] = (bowl.x.detach(), made.global_step)
    return found
