"""What the processes of test_averaging.py do; one process does the same for comparison."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.callbacks import EMA, SWA, ModelCheckpoint, Statistics
from lightkit.checkpoint import read_checkpoint
from tests.distributed.quiet import quiet_trainer


class Net(lk.TaskModule):
    def __init__(self, norm):
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 1))
        self.inside, self.outside = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return {"loss": nn.functional.mse_loss(self(batch[0]), batch[1]), "weight": len(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def data(samples=48):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.sum(1, keepdim=True) + x[:, :1] ** 2)


def averaged(world, kind, root, strategy="auto"):
    """Trains on one of so many ranks; with 1 on the joined batches of the others."""
    norm = kind == "swa"
    callback = SWA(0.02, swa_epoch_start=1) if kind == "swa" else EMA(0.8)
    found = {}

    def fit(folder, epochs, ckpt_path=None):
        saver = ModelCheckpoint(f"{root}/{folder}", monitor="val_loss")
        trainer = quiet_trainer(
            max_epochs=epochs, strategy=strategy, enable_checkpointing=True,
            callbacks=[callback, saver, Statistics(1)], default_root_dir=f"{root}/{folder}",
        )  # fmt: skip
        task = Net(norm)
        train, val = DataLoader(data(), 8 // world), DataLoader(data(20), 4)
        history = trainer.fit(task, train, val, ckpt_path=ckpt_path)
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v
                for k, v in task.state_dict().items()}  # fmt: skip
        found["norms"] = {k: float(v) for k, v in trainer.callback_metrics.items() if "norm/" in k}
        return {k: v.clone() for k, v in full.items()}, history, saver

    found["weights"], history, saver = fit("whole", 3)
    found["history"] = [entry["val_loss"] for entry in history]
    found["best"] = float(saver.best_model_score)
    saved = read_checkpoint(saver.last_model_path)
    found["saved"], found["trained"] = saved["model"], saved["callbacks"][type(callback).__name__]
    _, _, saver = fit("half", 2)
    found["resumed"], _, _ = fit("half", 3, saver.last_model_path)
    return found


def fsdp(root):
    return averaged(2, "ema", root, strategy=lk.FSDPStrategy())


def ddp(root):
    return {kind: averaged(2, kind, f"{root}/{kind}") for kind in ("ema", "swa")}


def both(folder):
    """One launch for all of it."""
    return {**ddp(f"{folder}/ddp"), "fsdp": fsdp(f"{folder}/fsdp")}
