"""What the processes of the test of fine-tuning do, on all ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import lightkit as lk
from lightkit.callbacks import Unfreeze
from tests.distributed import scenes_ddp


class Net(scenes_ddp.Net):
    """A head that learns from the start, and the parts below it that come later."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        self.net.insert(2, nn.LayerNorm(8))

    def configure_optimizers(self):
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, 0.02, momentum=0.9)
        schedule = LambdaLR(optimizer, lambda step: 0.98**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Rates(lk.Callback):
    """Notes the rates of all groups at the end of each epoch, and saves on the way."""

    def __init__(self, path=None):
        self.rows, self.path = [], path

    def on_train_epoch_end(self, trainer, task):
        self.rows.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_save_point(self, trainer, task):
        if self.path is not None and trainer.global_step == 14:
            trainer.save_checkpoint(self.path)


def fitted(world: int, path=None, resume=None) -> tuple[dict, list]:
    """Returns the weights after three epochs of ten batches for all ranks together, and rates."""
    task, rates = Net(), Rates(path)
    callbacks = [Unfreeze({1: "net.2", 2: "net.0"}), rates]
    trainer = scenes_ddp.trainer(callbacks=callbacks, gradient_clip_val=1.0)
    trainer.fit(task, scenes_ddp.loader(2 // world), ckpt_path=resume)
    return task.state_dict(), rates.rows


def unfreezing(world: int, path: str | None = None) -> dict:
    """A head alone, then with a norm, then with all; and resumed from the second epoch."""
    weights, rates = fitted(world, path)
    resumed = fitted(world, resume=path)[0] if path else weights
    return {"weights": weights, "rates": rates, "resumed": resumed}


def finding(world: int) -> dict:
    """A sweep, one that ends where the loss explodes, and whether a fit is the same after them."""
    task, trainer = Net(), scenes_ddp.trainer()
    loader = scenes_ddp.loader(2 // world)
    found = lk.lr_find(trainer, task, loader, steps=30, min_lr=1e-4, max_lr=0.05)
    exploded = lk.lr_find(trainer, task, loader, steps=60, min_lr=1e-4, max_lr=1e5)
    assert len(exploded.rates) < 60
    trainer.fit(task, loader)
    other = Net()
    scenes_ddp.trainer().fit(other, scenes_ddp.loader(2 // world))
    pairs = zip(task.parameters(), other.parameters(), strict=True)
    return {
        "rates": found.rates,
        "losses": found.losses,
        "same fit": all(torch.equal(one, two) for one, two in pairs),
    }
