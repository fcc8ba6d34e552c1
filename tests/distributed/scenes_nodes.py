"""What the processes of test_nodes.py do. Each function is called by all ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

import lightkit as lk
from tests.distributed import scenes_ddp

EPOCHS = 3
STEPS = 15  # of 4 processes
DIES = 7  # the step in which the machine dies, between two saves


class Net(scenes_ddp.Net):
    """With dropout: what is drawn on each rank must come back too."""

    def __init__(self, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(scenes_ddp.FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
        )


class Dying(lk.Callback):
    """On the last rank: leaves a mark, and waits there until its machine is killed."""

    def __init__(self, mark: Path, step: int):
        self.mark, self.step = mark, step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and not self.mark.exists():
            self.mark.write_text(str(os.getpid()))
            time.sleep(60)


class Slow(lk.Callback):
    """So that a machine can come back before the run is over."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        time.sleep(self.seconds)


def train(
    folder: str,
    dies: int | None = None,
    epochs: int = EPOCHS,
    slow: float = 0.0,
    dropout: float = 0.2,
):
    """Trains with a save after every second step, and goes on where there is something.

    Args:
        folder: A folder that all machines share.
        dies: The step in which the last rank waits to be killed.
        epochs: Epochs to train.
        slow: Seconds that each step takes longer.
        dropout: The rate of the network's dropout.

    Returns:
        Weights, history, and what else must be as if nothing had happened.
    """
    root = Path(folder)
    callbacks = [lk.callbacks.ModelCheckpoint(every_n_train_steps=2)]
    callbacks += [] if dies is None else [Dying(root / "mark", dies)]
    callbacks += [Slow(slow)] if slow else []
    trainer = scenes_ddp.trainer(
        max_epochs=epochs,
        default_root_dir=root / "runs",
        enable_checkpointing=True,
        callbacks=callbacks,
        fused=False,
    )
    task = Net(dropout)
    loaders = scenes_ddp.loader(1), scenes_ddp.loader(1, shuffle=False)
    history = trainer.fit(task, *loaders, ckpt_path="auto")
    entries = [{k: v for k, v in entry.items() if k != "time"} for entry in history]
    return {
        "weights": {name: value.clone() for name, value in task.state_dict().items()},
        "history": entries,
        "step": trainer.global_step,
        "folder": trainer.run_dir.name,
        "place": (trainer.global_rank, trainer.local_rank, trainer.world_size),
        "random": torch.get_rng_state(),
    }
