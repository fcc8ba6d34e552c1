"""What the processes of test_ddp.py do. Each function is called by all ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.errors import UsageError

SAMPLES, BATCH, FEATURES = 80, 4, 6


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + x[:, :1] ** 2)


def loader(world: int, shuffle: bool = True) -> DataLoader:
    """The loader of one of so many ranks; with 1 that of the joined batch of the others."""
    return DataLoader(data(), BATCH * world, shuffle=shuffle)


def trainer(**options) -> lk.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
        "seed": 3,
    }
    return lk.Trainer(**quiet | options)


class Net(lk.TaskModule):
    """The step never calls ``self(...)``, which wrapping the task itself would not notice."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class Tokens(Net):
    """A loss over so many tokens of each sample; some batches have none."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        counted = (x[:, 1] > 0.3).float()[:, None]
        weight = counted.sum()
        loss = (((self.net(x) - y) ** 2) * counted).sum() / weight.clamp(min=1)
        return {"loss": loss, "weight": weight}


class Two(Net):
    """Two optimizers in manual optimization, one step each."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(FEATURES, 1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.net(x) + self.other(x), y))
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.other(x), self.net(x)))
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net.parameters(), 0.02, momentum=0.9),
            torch.optim.SGD(self.other.parameters(), 0.02),
        ]


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


class Thawing(Net):
    """The first layer is frozen in the first epoch."""

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


class Leaves(Net):
    """One layer is never used."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Skips(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


class StopsOne(lk.Callback):
    """Rank 1 alone asks for the end."""

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 5:
            trainer.stop("rank 1 has had enough")


def trained(kind, world=1, epochs=3, **options):
    """Returns weights and history of a small fit; with ``world`` 1 in this process alone."""
    run = trainer(max_epochs=epochs, fused=False, **options)
    task = kind()
    history = run.fit(task, loader(world), loader(world, shuffle=False))
    entries = [{k: v for k, v in entry.items() if k != "time"} for entry in history]
    return {
        "weights": {name: value.clone() for name, value in task.state_dict().items()},
        "history": entries,
        "step": run.global_step,
        "stopped": run.session.flow.stop_reason,
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
    }


def refused(kind, **options) -> str:
    with pytest.raises(UsageError) as caught:
        trained(kind, **options)
    return str(caught.value)


#: What equals one process on the joined batch: a task and arguments of the Trainer.
KINDS = {
    "plain": (Net, {}),
    "accumulated": (Net, {"accumulate_grad_batches": 2}),
    "ragged groups": (Net, {"accumulate_grad_batches": 3}),
    "tokens": (Tokens, {}),
    "tokens accumulated": (Tokens, {"accumulate_grad_batches": 3}),
    "clipped": (Net, {"gradient_clip_val": 0.1}),
    "manual": (Two, {}),
    "thawing": (Thawing, {}),
    "several validations": (Net, {"val_check_interval": 2}),
}


def parity(world=1):
    """Trains tasks of all kinds, two epochs each."""
    return {name: trained(kind, world, 2, **more) for name, (kind, more) in KINDS.items()}


def other():
    """What has no counterpart in one process."""
    run = trainer(max_epochs=1)
    task = Net()
    run.fit(task, loader(1), loader(1))
    facts = (run.global_rank, run.local_rank, run.world_size, run.is_global_zero, run.num_devices)
    ranks = run.session.strategy.ranks
    if ranks.is_zero:  # nothing of the fit is left on the parameters
        task.loss(data()[:3]).backward()
    found = {
        "facts": facts,
        "normed": trained(Normed, epochs=1),
        "unused": refused(Leaves),
        "allowed": trained(Leaves, strategy="ddp_find_unused_parameters_true"),
        "skips": refused(Skips),
        "stopped": trained(Net, epochs=50, callbacks=StopsOne()),
        "sync_batchnorm": refused(Normed, sync_batchnorm=True),
    }
    torch.manual_seed(ranks.rank)  # the user seeded nothing: each rank builds other weights
    found["unseeded"] = trained(Net, epochs=1, seed=None)
    found["draws"] = draws()
    return found


def draws():
    """Random numbers in the step of each rank, and after it."""
    seen = []

    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            seen.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    trained(Noisy, epochs=1)
    return list(itertools.islice(seen, 5))
