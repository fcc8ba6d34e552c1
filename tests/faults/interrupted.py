"""Lives that a signal ends: the victim of the other tests, and a small run that waits for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

import lightkit as lk
from tests import pseudo_terminal
from tests.faults import victim
from tests.small import Net, loader


def live(arguments: dict[str, Any]) -> None:
    """Lives as `victim.live`, but the instant to die brings a signal: ``arguments["signal"]``."""
    number = arguments.pop("signal")
    if arguments["kill"]["place"] == "validation_batch":
        # A validation that a callback has begun something in is not broken off.
        del victim.Early.on_validation_start
    # A test that runs in the background of a shell has handed down that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    victim.Killer.die = lambda self: os.kill(os.getpid(), number)  # type: ignore[method-assign]
    victim.live(arguments)


class Wait(lk.Callback):
    """Says that it is ready at a place of the run, and waits there until the signal was heard."""

    def __init__(self, root: Path, place: str, ignore: bool):
        self.root, self.place, self.ignore = root, place, ignore

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if self.place == "step" and trainer.global_step == 7:
            self._wait(trainer)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        if self.place == "validation" and not trainer.sanity_checking:
            if batch_idx == 3:
                (self.root / "ready").touch()
            time.sleep(0.02)  # 100 s in all

    def _wait(self, trainer):
        (self.root / "ready").touch()
        print("ready")
        end = time.monotonic() + 60.0
        while (trainer.interrupted is None or self.ignore) and time.monotonic() < end:
            time.sleep(0.005)


def wait(arguments: dict[str, Any]) -> None:
    """Trains a few steps and waits for a signal.

    ``root``; ``place``: "step" or "validation"; ``ignore``: whether a step goes on for ever although
    the first signal was heard; ``chain``: whether the program has a handler of its own; ``terminal``:
    its name; ``workers``, ``bar``.
    """
    torch.set_num_threads(1)
    root, terminal = Path(arguments["root"]), arguments.get("terminal")
    if terminal:
        pseudo_terminal.enter(terminal)
    if arguments.get("chain"):
        signal.signal(signal.SIGTERM, _Own(root))
    data = loader(40).dataset
    workers = arguments.get("workers", 0)
    train = torch.utils.data.DataLoader(data, 4, shuffle=True, num_workers=workers)
    place = arguments.get("place", "step")
    trainer = lk.Trainer(
        seed=1,
        max_epochs=3,
        default_root_dir=root / "runs",
        enable_progress_bar=arguments.get("bar", False),
        callbacks=Wait(root, place, arguments.get("ignore", False)),
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(Net(), train, loader(20_000) if place == "validation" else None)
    finally:
        (root / "state").write_text(f"{trainer.interrupted} {trainer.global_step}")
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(handler, _Own):
            handler.tell("back")


class _Own:
    """A handler that the program had before; notes what there was on the disk when it came."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, number, frame):
        files = sorted(p.name for p in self.root.rglob("last.ckpt"))
        self.tell(f"{number} {frame is not None} {files}")

    def tell(self, line: str) -> None:
        with open(self.root / "chain", "a") as file:
            file.write(line + "\n")
