"""Runs of several ranks that are cut off and go on: what the processes of their tests do."""

from __future__ import annotations

import json
import os
import random
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightkit as lk
from lightkit.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightkit.loggers import CSVLogger, JSONLLogger, TensorBoardLogger


class Samples(Dataset[Any]):
    """Numbers with their index; ``noisy`` ones draw from all three generators when loaded."""

    def __init__(self, count: int, noisy: bool = False) -> None:
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        self.y = self.x.sum(1, keepdim=True)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x = self.x[index]
        if self.noisy:
            x = x + 0.1 * (torch.rand(3) + float(np.random.rand()) + random.random())
        return x, self.y[index], index


class Net(lk.TaskModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("largest", x.abs().max(), reduce_fx="max")
        return loss

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Diary(lk.Callback):
    """Notes which samples each completed step took, and dies once after some batches.

    Args:
        root: Where the notes go, a file for each rank.
        dies: After so many batches of this life a rank is killed, if it was not before.
        who: Which rank.
    """

    def __init__(self, root: Path, dies: int = 0, who: int = 1) -> None:
        self.root, self.dies, self.who, self.batches, self.open = root, dies, who, 0, []

    def on_train_start(self, trainer, task):
        self.path = self.root / f"diary_{trainer.global_rank}.jsonl"
        self._note("life", trainer.global_step, trainer.world_size)

    def _note(self, *words: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(words) + "\n")

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.batches += 1
        self.open += batch[2].tolist()
        self.step = trainer.global_step
        mark = self.root / "died"
        if self.dies and self.batches == self.dies and trainer.global_rank == self.who:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def on_save_point(self, trainer, task):
        if self.open:
            self._note("step", trainer.global_step, self.open)
            self.open = []


def live(place: str, *, workers: int, dies: int = 0) -> None:
    """Trains three epochs with everything on, resumed by itself, and writes what there is then."""
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["RANK"])
    if (folder / f"end_{rank}.pt").exists():
        return
    trainer = lk.Trainer(
        seed=5,
        max_epochs=3,
        default_root_dir=folder / "runs",
        accumulate_grad_batches=2,
        val_check_interval=4,
        log_every_n_steps=2,
        logger=[JSONLLogger(), CSVLogger(), TensorBoardLogger()],
        callbacks=[
            Diary(folder, dies, who=0 if workers else 1),
            EarlyStopping("val_loss", patience=20),
            ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, save_top_k=2),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Net(0.3)
    shared: dict[str, Any] = {"num_workers": workers}
    train = DataLoader(Samples(50, noisy=True), 3, shuffle=True, **shared)
    val = DataLoader(Samples(13, noisy=True), 3, shuffle=True, **shared)
    trainer.fit(task, train, val, ckpt_path="auto")
    torch.save(_found(trainer, task, folder), folder / f"end_{rank}.pt")


def _found(trainer: lk.Trainer, task: Net, folder: Path) -> dict[str, Any]:
    state = trainer.state.state_dict()
    state.pop("seconds")
    files = sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir())
    rows = (trainer.run_dir / "metrics.jsonl", trainer.run_dir / "metrics.csv")
    return {
        "state": state,
        "model": task.state_dict(),
        "optimizers": [o.state_dict() for o in trainer.optimizers],
        "schedulers": [entry.scheduler.state_dict() for entry in trainer.lr_schedulers],
        "history": [{k: v for k, v in row.items() if k != "time"} for row in trainer.history],
        "metrics": {k: float(v).hex() for k, v in trainer.callback_metrics.items()},
        "best": [Path(path).name for path in trainer.checkpoint_callback.best_k_models],
        "stopping": trainer.early_stopping_callback.state_dict(),
        "draws": [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()],
        "files": files,
        "rows": [path.read_text() for path in rows],
        "run_dir": str(trainer.run_dir.relative_to(folder)),
        "log_dir": Path(trainer.logger.log_dir).name,
    }


def lives(place: str, dies: int = 0) -> None:
    """Both runs of the restart test, one after the other."""
    for workers in (0, 2):
        live(f"{place}/{workers}", workers=workers, dies=dies)


def part_of_a_run(place: str, *, until: int, accumulate: int = 1) -> dict[str, Any]:
    """Trains up to a step, from where the lives before have come to; each on its number of ranks."""
    trainer = lk.Trainer(
        seed=5,
        max_epochs=3,
        max_steps=until,
        accumulate_grad_batches=accumulate,
        default_root_dir=Path(place) / "runs",
        log_every_n_steps=1,
        logger=JSONLLogger(),
        callbacks=[Diary(Path(place))],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Net()
    trainer.fit(task, DataLoader(Samples(48), 2, shuffle=True), ckpt_path="auto")
    rows = [
        json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "model": task.state_dict(),
        "losses": {row["step"]: row["train_loss_step"] for row in rows if "train_loss_step" in row},
        "largest": {row["step"]: row["largest"] for row in rows if "largest" in row},
        "history": [row["train_loss"] for row in trainer.history],
        "accumulate": trainer.options.accumulate_grad_batches,
        "step": trainer.global_step,
        "run_dir": trainer.run_dir.name,
    }


def observed(place: str) -> dict[str, Any]:
    """What each rank sees of one small run: folder, loggers, saves, the choice of a checkpoint."""
    folder = Path(place)
    errors = {}
    saver = ModelCheckpoint(monitor="val_loss", every_n_train_steps=2, async_save=True)
    logger = TensorBoardLogger(save_dir=folder / "logs", name="mine")

    def make(epochs: int, *callbacks: lk.Callback) -> lk.Trainer:
        return lk.Trainer(
            seed=5,
            max_epochs=epochs,
            default_root_dir=folder / "runs",
            logger=[logger, JSONLLogger()],
            callbacks=list(callbacks),
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    # What is due by the clock is due on all ranks.
    timed = ModelCheckpoint(folder / "timed", train_time_interval=timedelta(milliseconds=1))
    by_hand = LambdaCallback(on_train_epoch_end=_by_hand(folder, errors))
    trainer = make(2, saver, timed, by_hand)
    task = Net()
    train, val = DataLoader(Samples(20), 2), DataLoader(Samples(9), 2)
    trainer.fit(task, train, val)
    best = trainer.validate(task, val, ckpt_path="best", verbose=False)
    found = {
        "run_dir": str(trainer.run_dir),
        "log_dirs": [logger.log_dir, trainer.loggers[1].log_dir, trainer.log_dir],
        "best": (saver.best_model_path, saver.last_model_path, float(saver.best_model_score)),
        "ledger": trainer.session.ledger is not None,
    }
    later = make(3, ModelCheckpoint(monitor="val_loss", every_n_train_steps=2))
    history = later.fit(Net(), train, val, ckpt_path=saver.last_model_path)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    missing = folder / "nowhere.ckpt"
    for name, call in {
        "missing": lambda: trainer.validate(task, val, ckpt_path=missing),
        "unknown": lambda: lk.Trainer(default_root_dir=folder / "x").fit(
            task, train, ckpt_path="last"
        ),
        "unwritable": lambda: lk.Trainer(max_steps=1, default_root_dir="/proc/x").fit(task, train),
    }.items():
        try:
            call()
        except lk.errors.LightkitError as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return {
        **found,
        "later": str(later.run_dir),
        "version": logger.version,
        "image": type(logger.experiment).__name__,
        "validated": best,
        "errors": errors,
    }


def _by_hand(folder: Path, errors: dict[str, str]) -> Any:
    def save(trainer, task):
        trainer.save_checkpoint(folder / f"by_hand_{trainer.current_epoch}.ckpt")
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            task.net[0].weight.data[0, 0] = float("nan")
        try:
            trainer.save_checkpoint(folder / f"broken_{trainer.current_epoch}.ckpt")
        except lk.errors.NonFiniteError as error:
            errors["nan"] = str(error)
        task.net[0].weight.data.nan_to_num_(0.0)
        trainer.logger.experiment.add_text("a", "b")

    return save
