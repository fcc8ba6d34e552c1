"""The rehearsal: that nothing of it remains, and what it finds."""

from __future__ import annotations

import json
import logging
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightkit as lk
from lightkit import rehearsal
from lightkit.callbacks import EMA, SWA, EarlyStopping, ModelCheckpoint, Unfreeze
from lightkit.differences import compare
from lightkit.errors import ConfigError
from tests.distributed.harness import torchrun


def dataset(samples: int = 40) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Net(lk.TaskModule):
    """With everything in which traces may stay: dropout, batch norm, metric, attribute, draws."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
        self.head = nn.Linear(8, 1)
        self.seen, self.losses = 0, []

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        noise = random.random() + np.random.rand()
        loss = nn.functional.mse_loss(self(batch[0] + 0.01 * noise), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("own", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]) + torch.randn(()), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": plateau}


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        parts = (self.body.parameters(), self.head.parameters())
        return [torch.optim.Adam(part, lr=0.01) for part in parts]


class OneCycle(Net):
    """Its schedule takes its length from the trainer, and ends an hour before a shorter one."""

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        assert steps > 10
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [OneCycleLR(optimizer, 0.1, steps, pct_start=10 / steps)]


class Drawing(Dataset):
    """Draws from generators of its own, in a transform too, and counts."""

    def __init__(self):
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.transform = types.SimpleNamespace(numpy=np.random.default_rng(3))
        self.count, self.recent = 0, []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.count += 1
        self.recent.append(index)
        drawn = self.python.random() + self.transform.numpy.random() + 0.01 * self.count
        x = torch.randn(4, generator=self.torch) + drawn
        return x, x.sum(0, keepdim=True)


class Stream(IterableDataset):
    """A stream that knows its place."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        for _ in range(24):
            self.next += 1
            x = torch.full((4,), float(self.next % 7))
            yield x, x[:1]


class Placed(Stream):
    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def shuffled(**options) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(dataset(), 4, shuffle=True, generator=generator, **options)


class Data(lk.DataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append("setup")
        self.train, self.val = torch.utils.data.random_split(dataset(), [32, 8])

    def train_dataloader(self):
        self.calls.append("train")
        return DataLoader(self.train, 4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 4)

    def teardown(self, stage):
        self.calls.append("teardown")


TASKS = {
    "plain": (Net, {}),
    "manual": (Manual, {}),
    "one cycle": (OneCycle, {}),
    "accumulation": (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "averages": (Net, {"callbacks": lambda: [EMA(0.9), EarlyStopping("val_loss", patience=9)]}),
    "swa": (Net, {"callbacks": lambda: SWA(0.05)}),
    "unfreeze": (Net, {"callbacks": lambda: Unfreeze({1: "body"})}),
    "by steps": (Net, {"val_check_interval": "3 steps", "limit_train_batches": 7}),
    "reloaded": (Net, {"reload_dataloaders_every_n_epochs": 1}),
}
LOADERS = {
    "generator": shuffled,
    "global": lambda: DataLoader(dataset(), 4, shuffle=True),
    "workers": lambda: shuffled(num_workers=2),
    "persistent": lambda: shuffled(num_workers=1, persistent_workers=True),
    "drawing": lambda: DataLoader(Drawing(), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "placed": lambda: DataLoader(Placed(), 4),
    "tensors": lambda: lk.TensorLoader(*dataset().tensors, batch_size=4, shuffle=True),
    "list": lambda: [dataset()[i : i + 4] for i in range(0, 40, 4)],
}
CASES = [(task, "generator") for task in TASKS] + [("plain", loader) for loader in LOADERS]


def ends_of(tmp_path, task: str, loader: str, rehearse: bool, val=None) -> dict:
    kind, options = TASKS[task]
    options = dict(options)
    if callable(options.get("callbacks")):
        options["callbacks"] = options["callbacks"]()
    lk.seed_everything(5, verbose=False)
    model, train = kind(), LOADERS[loader]()
    val = DataLoader(dataset(12), 4, shuffle=True) if val is None else val
    given: dict = {"train_dataloaders": train, "val_dataloaders": val}
    if "reload_dataloaders_every_n_epochs" in options:
        given = {"datamodule": Data()}
    trainer = lk.Trainer(
        max_epochs=3,
        rehearse=rehearse,
        default_root_dir=tmp_path / f"{rehearse}",
        logger=lk.loggers.JSONLLogger(),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, **given)
    rows = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("lightkit", "loggers", "history"):
        del saved[name]
    saved["loop"].pop("seconds")
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "Checkpoint" not in k}
    return {
        "losses": model.losses,
        "seen": model.seen,
        "rows": [{k: v for k, v in json.loads(row).items() if "time" not in k} for row in rows],
        "saved": saved,
        "random": lk.rng.rng_state(),
        "calls": getattr(given.get("datamodule"), "calls", None),
    }


@pytest.mark.parametrize(("task", "loader"), CASES)
def test_a_fit_is_the_same_bit_for_bit_with_and_without_it(tmp_path, caplog, task, loader):
    caplog.set_level(logging.INFO, "lightkit")
    without = ends_of(tmp_path, task, loader, rehearse=False)
    assert "rehearsed" not in caplog.text
    found = ends_of(tmp_path, task, loader, rehearse=True)
    assert "\nINFO" in caplog.text and "rehearsed: " in caplog.text and "not rehearsed" not in caplog.text
    assert list(compare(without, found, "", [])) == []
    assert {path.name for path in (tmp_path / "True").iterdir()} == {type(TASKS[task][0]()).__name__}
    assert [p.name for p in (tmp_path / "True" / TASKS[task][0].__name__).iterdir()] == ["version_0"]
    assert {path.name for path in tmp_path.iterdir()} == {"True", "False"}  # the folder is gone
