"""Where a process kills itself: at a place of the loop, or at an operation on a file."""

from __future__ import annotations

import fnmatch
import functools
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import lightkit as lk


class Killer:
    """Counts what happens in this process and sends itself SIGKILL at the chosen instant.

    A plan is ``{"place": ..., "name": ..., "n": ...}``: the n-th time (from 1; in this life) that
    the place comes by, for files with a name like the one given. With "mark", a file, only the
    first life to come there dies. Places in the loop are the hooks of `Early` and `Late`; those of
    a file are "half" (half of a checkpoint's bytes are out), "open" (to write), "fsync", "rename",
    "link", "truncate" and "remove" (before), "fsynced", "renamed" and "linked" (after). "any" is
    all of them.
    """

    def __init__(self, plan: dict[str, Any] | None):
        self.plan, self.seen = plan, 0

    def at(self, place: str, name: str = "") -> None:
        """Dies here, if it is here."""
        if self.due(place, name):
            self.die()

    def due(self, place: str, name: str = "") -> bool:
        """Tells whether it is here, and counts."""
        plan = self.plan
        if plan is None or plan["place"] not in (place, "any"):
            return False
        if not fnmatch.fnmatch(os.path.basename(name), plan.get("name", "*")):
            return False
        self.seen += 1
        if self.seen != plan.get("n", 1):
            return False
        return not (plan.get("mark") and Path(plan["mark"]).exists())

    def die(self) -> None:
        """Ends this process as a power cut would."""
        plan = self.plan or {}
        if plan.get("mark"):
            Path(plan["mark"]).touch()
        if plan.get("children"):
            Path(plan["children"]).write_text(json.dumps(children()))
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_files(self, root: str) -> None:
        """Hears of what is done with files below ``root`` from now on."""
        self.root = root
        sys.addaudithook(self._hear)
        for name, place in (("fsync", "fsync"), ("replace", "rename"), ("link", "link")):
            setattr(os, name, self._around(getattr(os, name), place))
        torch.save = self._halved(torch.save)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.remove", "os.truncate", "open"):
            return
        path = arguments[0]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if self.root not in path:
            return
        if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.at(event.removeprefix("os."), path)

    def _around(self, call, place):
        done = {"fsync": "fsynced", "rename": "renamed", "link": "linked"}[place]

        @functools.wraps(call)
        def watched(*arguments, **options):
            if place == "fsync":
                name = os.readlink(f"/proc/self/fd/{arguments[0]}")
            else:
                name = os.fspath(arguments[1])
            ours = self.root in name
            if ours:
                self.at(place, name)
            result = call(*arguments, **options)
            if ours:
                self.at(done, name)
            return result

        return watched

    def _halved(self, save):
        @functools.wraps(save)
        def watched(obj, file, *arguments, **options):
            if self.due("half"):
                whole = io.BytesIO()
                save(obj, whole, *arguments, **options)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                self.die()
            return save(obj, file, *arguments, **options)

        return watched


class KillParent:
    """A ``worker_init_fn`` during which the process dies that started the worker.

    Args:
        told: Where a worker writes its process id.
    """

    def __init__(self, told: Path):
        self.told = told

    def __call__(self, worker_id: int) -> None:
        parent = os.getppid()
        self.told.write_text(json.dumps([os.getpid()]))
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)


def children() -> list[int]:
    """Returns the processes that this one has started and that live."""
    threads = Path("/proc/self/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


class Early(lk.Callback):
    """The places of the loop, before the checkpoint callback; and what was trained, by batch."""

    def __init__(self, killer: Killer, seen: Path):
        self.at, self.seen = killer.at, os.open(seen, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def _tell(self, *row):
        os.write(self.seen, json.dumps(row).encode() + b"\n")

    def on_fit_start(self, trainer, task):
        self.at("fit_start")

    def on_train_start(self, trainer, task):
        self._tell("life", trainer.state.epoch, trainer.state.batch_idx)
        self.at("train_start")

    def on_train_epoch_start(self, trainer, task):
        self.at("epoch_start")

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.at("batch_start")

    def on_after_backward(self, trainer, task):
        self.at("backward")

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.at("before_step")

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        loss = float(outputs["loss"]).hex()
        self._tell("batch", trainer.state.epoch, batch_idx, batch[-1].tolist(), loss)
        self.at("batch_end")

    def on_validation_start(self, trainer, task):
        self.at("sanity_start" if trainer.sanity_checking else "validation_start")

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        self.at("sanity_batch" if trainer.sanity_checking else "validation_batch")

    def on_validation_end(self, trainer, task):
        self.at("sanity_end" if trainer.sanity_checking else "validation_end")

    def on_train_epoch_end(self, trainer, task):
        self.at("epoch_end")

    def on_save_point(self, trainer, task):
        self.at("save_point")

    def on_train_end(self, trainer, task):
        self.at("train_end")


class Late(lk.Callback):
    """Places after the checkpoint callback."""

    order = 1000

    def __init__(self, killer: Killer):
        self.at = killer.at

    def on_save_point(self, trainer, task):
        self.at("saved")

    def on_validation_end(self, trainer, task):
        if not trainer.sanity_checking:
            self.at("validation_end_late")

    def on_train_epoch_end(self, trainer, task):
        self.at("epoch_end_late")

    def on_fit_end(self, trainer, task):
        self.at("fit_end")
