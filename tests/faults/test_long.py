"""The full counts, by hand: ``pytest -m slow -s tests/faults``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightkit.checkpoint import latest, read_checkpoint
from tests.faults.harness import KILLED, REPOSITORY, Outcome, environment, log_of
from tests.faults.victim import Settings

pytestmark = pytest.mark.slow
FOLDERS = "runs/Net/version_*/checkpoints"

WAYS = {
    "in process": {},
    "workers": {"workers": 2},
    "persistent workers": {"workers": 2, "persistent": True},
    "in the background": {"saving": {"async_save": True}},
    "two savers": {"second": {"monitor": "val_accuracy", "mode": "max", "save_top_k": 3}},
}


@pytest.mark.parametrize("way", WAYS)
def test_twenty_kills_at_random_times(lives, reference, tmp_path, way):
    kills, runs, seed = 0, 0, random.randrange(10**6)
    draw = random.Random(seed)
    longest = 3.0 if "workers" in way else 1.2
    while kills < 20:
        root = tmp_path / str(runs)
        settings = Settings(str(root), patience=1000, options={"max_epochs": 14}, **WAYS[way])
        code = KILLED
        while code == KILLED:
            nursery, pid = lives.begin(settings)
            if kills < 20:
                time.sleep(draw.uniform(0, longest))
                killed(pid)
            code = nursery.wait(pid)
            kills += code == KILLED
        assert code == 0, log_of(root)
        different = reference(settings).differences(Outcome.of(root))
        assert not different, "\n".join([f"seed {seed}, run {runs}", *different[:20]])
        runs += 1
    print(f"\n{way}: {kills} kills over {runs} runs of 98 steps, each the same bit for bit")


def killed(pid: int) -> None:
    """Sends SIGKILL to a life, which may have ended by itself (the nursery reaps it)."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("way", ["in process", "in the background"])
def test_fifty_kills_while_a_large_checkpoint_is_written(lives, reference, tmp_path, way):
    draw = random.Random(0)
    kills = torn = size = 0
    runs = 0
    while kills < 50:
        root = tmp_path / str(runs)
        runs += 1
        settings = Settings(
            str(root), ballast=6_000_000, every=1, patience=1000, options={"max_epochs": 10}
        )
        saving = {"save_top_k": 1, **WAYS[way].get("saving", {})}
        settings = dataclasses.replace(settings, saving=saving)
        newest, code = -1, KILLED
        while code == KILLED:
            nursery, pid = lives.begin(settings)
            if kills < 50:
                writing(pid, root, skip=draw.randrange(2))
                time.sleep(draw.uniform(0, 0.35))
                killed(pid)
            code = nursery.wait(pid, 120)
            if code != KILLED:
                continue
            kills += 1
            for folder in root.glob(FOLDERS):
                torn += any("tmp" in p.name for p in folder.iterdir())
                files = {p.stat().st_ino: p for p in folder.glob("*.ckpt")}
                for path in files.values():  # none of them is torn, whatever its name
                    read_checkpoint(path)
                    size = path.stat().st_size
                found = latest(folder)
                if found is not None:
                    step = read_checkpoint(found)["loop"]["global_step"]
                    assert step >= newest, "a newer checkpoint is gone"
                    newest = step
        assert code == 0, log_of(root)
        assert not reference(settings).differences(Outcome.of(root))
    print(
        f"\n{way}: {kills} kills while {size / 2**20:.0f} MiB were written ({torn} left half a "
        f"file under its temporary name), over {runs} runs: every file whole, the newest taken"
    )


def writing(pid: int, root: Path, skip: int) -> None:
    """Waits until a life writes a checkpoint, for the (skip + 1)-th time; or until it ends."""
    last = None
    while skip >= 0 and Path(f"/proc/{pid}/exe").exists():
        for path in root.glob(f"{FOLDERS}/.step*tmp"):
            if path.name != last and str(pid) in path.name:
                last, skip = path.name, skip - 1
        time.sleep(0.002)


SWEPT = ("in process", "workers", "persistent workers", "in the background")


@pytest.mark.parametrize("way", SWEPT)
@pytest.mark.parametrize("life", ["first", "second"])
def test_at_every_event(lives, reference, tmp_path, life, way):
    """Every place of the loop and every operation on a file: one kill at each k-th of them."""
    before = [{"place": "batch_end", "n": 9}] if life == "second" else []
    never = {"place": "any", "n": 10**9}
    counted = Settings(str(tmp_path / "counted"), kill=never, **WAYS[way])
    for kill in [*before, never]:
        code = lives.live(dataclasses.replace(counted, kill=kill))
    assert code == 0, log_of(counted.root)
    events = torch.load(tmp_path / "counted" / "dump.pt", weights_only=True)["events"]
    wrong, count = [], 0
    stride = int(os.environ.get("LIGHTKIT_EVERY", "25"))
    for n in range(1 + random.randrange(stride), events + 1, stride):
        settings = Settings(str(tmp_path / str(n)), **WAYS[way])
        for kill in [*before, {"place": "any", "n": n}]:
            code = lives.live(dataclasses.replace(settings, kill=kill))
        if code == KILLED:  # in the background the last events may come in another order
            code = lives.live(settings)
        count += 1
        if code:
            wrong.append(f"{n}: exit code {code}\n{log_of(settings.root)}")
        elif different := reference(settings).differences(Outcome.of(settings.root)):
            wrong.append(f"{n}: " + "; ".join(different[:3])[:400])
    print(f"\n{life} life, {way}: killed at {count} of {events} events, {len(wrong)} not the same")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(
    "settings",
    [
        {"order": "stream"},
        {"order": "stream", "workers": 2},
        {"order": "stateful stream"},
        {"order": "generator", "workers": 2, "persistent": True},
        {"options": {"val_check_interval": 4, "check_val_every_n_epoch": None}},
        {"options": {"val_check_interval": "3 steps"}},
        {"options": {"limit_train_batches": 7, "val_check_interval": 4, "max_epochs": 8}},
        {"options": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}},
        {"options": {"accumulate_grad_batches": 1, "precision": "bf16-mixed"}},
        {"options": {"accumulate_grad_batches": 4, "precision": "16-mixed"}},
        {"options": {"num_sanity_val_steps": 0, "val_check_interval": 0.5}},
        {"options": {"overfit_batches": 6, "val_check_interval": 4, "max_epochs": 8}},
        {"options": {"val_check_interval": None}, "saving": {"every_n_train_steps": 3}},
        {"options": {"fused": False, "enable_progress_bar": True}},
        {"saving": {"save_top_k": 0}},
        {"saving": {"monitor": None, "save_top_k": -1}},
        {"saving": {"filename": "{epoch}-{step}-{val_loss:.3f}"}},
        {"second": {"monitor": "val_accuracy", "mode": "max", "save_top_k": 3}},
        {"second": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "third-{step}"}},
    ],
    ids=str,
)
def test_kinds_of_runs(dies_and_is_the_same, settings):
    dies_and_is_the_same(
        {"place": "batch_end", "n": 8},
        {"place": "validation_batch", "n": 6},
        {"place": "batch_end", "n": 10},
        {"place": "half", "n": 3},
        **settings,
    )


def test_workers_that_are_spawned(dies_and_is_the_same):
    kills = [{"place": "batch_end", "n": 9}, {"place": "validation_batch", "n": 2}]
    dies_and_is_the_same(*kills, timeout=200, workers=1, persistent=True, method="spawn")


@pytest.mark.parametrize("way", ["sync", "async"])
def test_memory_and_files_stay(tmp_path, way):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", str(tmp_path), "100002", way],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [json.loads(line[9:]) for line in done.stdout.splitlines() if line[:9] == "measured "]
    for row in rows:
        print(f"\n{way}: step {row['step']}: {row['bytes'] / 2**20:.2f} MiB, {row['files']} files")
    first, last = rows[1], rows[-1]
    assert (first["step"], last["step"]) == (20_001, 100_001)
    assert last["bytes"] - first["bytes"] < 5 * 2**20
    assert last["files"] <= first["files"]
    assert last["threads"] <= first["threads"]
