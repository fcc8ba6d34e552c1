"""What the processes of test_ddp.py do. Each function is called by all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.errors import UsageError
from tests.distributed.quiet import quiet_trainer

SAMPLES, BATCH, FEATURES = 80, 4, 6


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + x[:, :1] ** 2)


def loader(world: int, shuffle: bool = True) -> DataLoader:
    """The loader of one of so many ranks; with 1 that of the joined batch of the others."""
    return DataLoader(data(), BATCH * world, shuffle=shuffle)


def trainer(**options) -> lk.Trainer:
    return quiet_trainer(**{"max_epochs": 3} | options)


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


class ThawingWithin(Net):
    """The first layer is frozen for a few steps."""

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].requires_grad_(self.trainer.global_step > 4)


class Renewed(Net):
    """The last layer is another one from the second epoch on, drawn by each rank for itself."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[2] = nn.Linear(8, 1)
            group = {"params": list(self.net[2].parameters())}
            self.trainer.optimizers[0].add_param_group(group)


class Searching(Net):
    """What a line search decides must be the same on all ranks, or they wait for each other."""

    def configure_optimizers(self):
        how = {"max_iter": 3, "line_search_fn": "strong_wolfe"}
        return torch.optim.LBFGS(self.parameters(), 0.1, **how)


class Manual(Net):
    """Steps by plain ``loss.backward()``; a layer is frozen at first, and one has sparse gradients."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, FEATURES, sparse=True)
        self.net[0].requires_grad_(False)
        self.automatic_optimization = False

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        x = x + self.table((x[:, 0].abs() * 2).long().clamp(max=3))
        loss = nn.functional.mse_loss(self.net(x), y)
        if batch_idx % 2:
            loss.backward()
        else:
            self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02)


class Result(Mapping):
    """A mapping that torch knows nothing about."""

    def __init__(self, **values):
        self.values_by_name = values

    def __getitem__(self, name):
        return self.values_by_name[name]

    def __iter__(self):
        return iter(self.values_by_name)

    def __len__(self):
        return len(self.values_by_name)


class Mapped(Net):
    def training_step(self, batch, batch_idx):
        return Result(loss=self.loss(batch))


class Forgets(Net):
    """The last layer is left out in the last step, after which no forward comes."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            return self.net[0](batch[0]).square().mean()
        return super().training_step(batch, batch_idx)


class WeightsLate(Net):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return {"loss": loss, "weight": 4} if batch_idx == 2 else loss


class FreezesInStep(Net):
    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(batch_idx < 2)
        return super().training_step(batch, batch_idx)


class ThawsInStep(Net):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(batch_idx > 1)
        return super().training_step(batch, batch_idx)


class FreezesAfterUse(Net):
    """Torch would give the others zeros for what has none now, which move it by its momentum."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.net[0].requires_grad_(self.trainer.global_step < 2)
        return loss


class Nests(lk.Callback):
    """Validates by another trainer with the strategy object of the fit."""

    def on_train_epoch_end(self, trainer, task):
        scene = globals()["trainer"]
        scene(strategy=trainer.options.strategy).validate(task, loader(1), verbose=False)


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
    if options.get("strategy") == "static":
        options["strategy"] = lk.DDPStrategy(static_graph=True)
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
    "thawing within": (ThawingWithin, {}),
    "renewed": (Renewed, {}),
    "searching": (Searching, {"precision": 64}),
    "manual, frozen, sparse": (Manual, {}),
    "static graph": (Net, {"accumulate_grad_batches": 3, "strategy": "static"}),
    "mapped": (Mapped, {"strategy": "static"}),
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
        "forgets": refused(Forgets, max_steps=4),
        "forgets in a group": refused(Forgets, accumulate_grad_batches=2),
        "weights late": refused(WeightsLate),
        "thaws in step": refused(ThawsInStep),
        "freezes after use": refused(FreezesAfterUse),
        "freezes in step": refused(FreezesInStep),
        "nests": refused(Net, strategy=lk.DDPStrategy(), callbacks=Nests()),
        "stopped": trained(Net, epochs=50, callbacks=StopsOne()),
        "sync_batchnorm": refused(Normed, sync_batchnorm=True),
    }
    torch.manual_seed(ranks.rank)  # the user seeded nothing: each rank builds other weights
    found["unseeded"] = trained(Net, epochs=1, seed=None)
    found["draws"] = draws()
    found["syncs"] = syncs()
    return found


class Syncs(lk.Callback):
    """Notes before which backward gradients are about to be averaged."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, task, loss):
        self.seen.append(trainer.strategy._ddp.require_backward_grad_sync)


def syncs():
    """Groups of 3, 3, 3 and 1 batches."""
    callback = Syncs()
    trained(Net, epochs=1, accumulate_grad_batches=3, callbacks=callback)
    return callback.seen


def draws():
    """Random numbers in the step of each rank, and after it."""
    seen = []

    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            seen.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    trained(Noisy, epochs=1)
    return list(itertools.islice(seen, 5))
