"""What a save costs the loop: a state of 300 MiB, beside plain ``torch.save``.

Prints a table: ``python -m pytest -m slow -s tests/cost/test_save.py``.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.checkpoint import latest, settle, write_checkpoint

ROUNDS = 7


class Large(lk.TaskModule):
    def __init__(self, layers: int = 24, width: int = 1024) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Measure(lk.Callback):
    """Times ways of saving at save points, in turn, so that all see the same noise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times: dict[str, list[float]] = {}
        self.steps: dict[str, list[float]] = {"alone": [], "beside a write": []}
        self.began = 0.0

    def _time(self, name: str, call) -> None:
        if call is not settle:
            settle()
        began = time.perf_counter()
        call()
        self.times.setdefault(name, []).append((time.perf_counter() - began) * 1e3)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step > 1:
            busy = any(t.name == "lightkit-writer" for t in threading.enumerate())
            name = "beside a write" if busy else "alone"
            self.steps[name].append((time.perf_counter() - self.began) * 1e3)

    def on_save_point(self, trainer, task):
        if trainer.global_step % 4:
            return
        run, folder = trainer._run, self.folder
        from lightkit import checkpoint, saving

        contents = checkpoint.collect(run)
        self._time("torch.save(path)", lambda: torch.save(contents, folder / "plain.pt"))
        self._time("atomic write alone", lambda: write_checkpoint(contents, folder / "a.ckpt"))
        self._time("parameters finite", lambda: saving.check_finite(run))
        self._time("save", lambda: trainer.save_checkpoint(folder / "b.ckpt"))
        self._time(
            "save in the background: stall",
            lambda: trainer.save_checkpoint(folder / "c.ckpt", background=True),
        )
        self._time("  and until it is complete", settle)
        # And once more, so that the next steps run beside it.
        trainer.save_checkpoint(folder / "d.ckpt", background=True)


@pytest.mark.slow
def test_the_stall_of_a_save(tmp_path):
    measure = Measure(tmp_path)
    t = lk.Trainer(
        max_steps=4 * ROUNDS,
        callbacks=[measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    t.fit(Large(), DataLoader(TensorDataset(torch.randn(8 * 4 * ROUNDS, 1024)), 8))
    size = (tmp_path / "b.ckpt").stat().st_size / 2**20
    medians = {name: statistics.median(times) for name, times in measure.times.items()}
    print(f"\n{size:.0f} MiB, {torch.get_num_threads()} threads, median of {ROUNDS} (least, most)")
    for name, times in measure.times.items():
        print(f"{name:40s} {medians[name]:8.1f} ms  ({min(times):.1f}, {max(times):.1f})")
    for name, times in measure.steps.items():
        if times:
            middle = statistics.median(times)
            print(f"{'a step ' + name:40s} {middle:8.1f} ms  ({min(times):.1f}, {max(times):.1f})")
    assert medians["save in the background: stall"] < medians["save"]


@pytest.mark.slow
def test_the_newest_of_many_large_files(tmp_path):
    state = {f"{i}.{n}": torch.randn(512, 512) for i in range(32) for n in ("w", "m", "v")}
    for step in range(1, 21):
        header = {"format": 1, "version": "0", "global_step": step}
        contents = {"lightkit": header, "model": state, "loop": {"global_step": step, "epoch": 0}}
        write_checkpoint(contents, tmp_path / f"step_{step:06d}.ckpt")
    began = time.perf_counter()
    assert latest(tmp_path).name == "step_000020.ckpt"
    print(f"\nlatest() among 20 files of 96 MiB: {(time.perf_counter() - began) * 1e3:.0f} ms")
