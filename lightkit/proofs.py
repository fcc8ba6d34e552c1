"""The proofs of ``lightkit prove``: what lightkit promises, measured on this machine.

Each trains a small network with the Trainer and compares: with a loop by hand that knows
nothing of lightkit, with a run that was never killed, with another number of processes. All files
lie in the folder that is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import checkpoint
from lightkit.callbacks import ModelCheckpoint
from lightkit.differences import compare
from lightkit.distributed import resolve_device
from lightkit.hooks import Callback
from lightkit.task import TaskModule
from lightkit.testing.ranks import ended
from lightkit.trainer import Trainer

SEED, EPOCHS, BATCH, SAMPLES = 1, 5, 20, 410
FEATURES, CLASSES, CLIP = 16, 4, 1.0
#: Batches of an epoch; the last one is short.
LENGTH = -(-SAMPLES // BATCH)
#: The share of a step by hand that one of the Trainer may cost, bare and with all that is default.
MOST = {"bare": 0.95, "full": 1.05}
#: By how much two ranks may be apart from one process: they add up in another order.
NEAR = 1e-6
#: Seconds after which a process that was started is ended: much, as a busy machine starts it slowly.
LIMIT = 300.0
#: What a proof returns: whether the promise holds, the figure in words, and its numbers.
Found = tuple[bool, str, Mapping[str, float]]


# --- what is trained -----------------------------------------------------------------------------


def _network(dropout: float = 0.2) -> nn.Sequential:
    layers = nn.Linear(FEATURES, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, CLASSES)
    return nn.Sequential(*layers)


def _loaders(batch: int = BATCH, samples: int = SAMPLES) -> tuple[DataLoader[Any], DataLoader[Any]]:
    draws = torch.Generator().manual_seed(SEED)
    x = torch.randn(samples + 91, FEATURES, generator=draws)  # 46 and 45 on two ranks
    y = (x[:, :CLASSES] + 0.5 * x[:, CLASSES : 2 * CLASSES]).argmax(1)
    train, val = TensorDataset(x[:samples], y[:samples]), TensorDataset(x[samples:], y[samples:])
    return DataLoader(train, batch, shuffle=True), DataLoader(val, batch)


def _optimizer(net: nn.Module) -> tuple[torch.optim.AdamW, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)


class Net(TaskModule):
    """The network as a task, which also notes the loss of each step."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = _network(dropout)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss."""
        x, y = batch
        scores = self.net(x)
        loss = functional.cross_entropy(scores, y)
        self.log("accuracy", (scores.argmax(1) == y).float().mean(), prog_bar=True)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Likewise."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Those of the loop by hand."""
        optimizer, schedule = _optimizer(self.net)
        return [optimizer], [schedule]


class Light(Net):
    """With the plainest optimizer: Adam of torch reads its own count of steps."""

    def configure_optimizers(self) -> Any:
        """Just that."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _trainer(folder: Path, **options: Any) -> Trainer:
    """Returns a Trainer as a user makes one, but for its screen and its folder."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{"max_epochs": EPOCHS, "gradient_clip_val": CLIP, "seed": SEED, **quiet, **options},
        default_root_dir=folder,
    )


# --- equal to a loop by hand ---------------------------------------------------------------------


def _loop_by_hand(device: torch.device) -> tuple[list[Tensor], list[float], nn.Module]:
    """The loop as people write it: losses of all steps, of all validations, and the network."""
    torch.manual_seed(SEED)
    net = _network().to(device)
    optimizer, schedule = _optimizer(net)
    train, val = _loaders()
    losses, val_losses = [], []
    for _ in range(EPOCHS):
        net.train()
        for inputs, target in train:
            inputs, target = inputs.to(device), target.to(device)
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(inputs), target)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.detach())
        net.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        with torch.no_grad():
            for inputs, target in val:
                inputs, target = inputs.to(device), target.to(device)
                loss = functional.cross_entropy(net(inputs), target)
                total += loss.double() * len(target)
                count += len(target)
        val_losses.append(float(total / count))
        schedule.step()
    return losses, val_losses, net


def equal_to_a_loop_by_hand(folder: Path, task: type[Net] = Net) -> Found:
    """Losses and weights are those of a loop by hand, bit for bit."""
    trainer = _trainer(folder, fused=False, devices=1)
    mine = task()
    history = trainer.fit(mine, *_loaders())
    losses, val_losses, net = _loop_by_hand(resolve_device(devices=1))
    pairs: list[tuple[Tensor, Tensor]] = [
        *zip(mine.net.parameters(), net.parameters(), strict=True)
    ]
    pairs.append((torch.stack(mine.losses), torch.stack(losses)))
    pairs.append((torch.tensor(history["val_loss"]), torch.tensor(val_losses)))
    differ = sum(int((one.cpu() != two.cpu()).sum()) for one, two in pairs)
    weights = sum(p.numel() for p in net.parameters())
    numbers = {"steps": len(losses), "validations": EPOCHS, "weights": weights, "differ": differ}
    text = f"{len(losses)} losses, {EPOCHS} validations, {weights:,} weights: {differ} differ"
    return differ == 0, text, numbers


# --- killed and resumed --------------------------------------------------------------------------


class _Steps(Callback):
    """Says each step on a line, and waits for one: however busy the machine, it is killed in time."""

    def on_train_batch_end(
        self, trainer: Trainer, task: TaskModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sys.stdout.write(f"step {trainer.global_step}\n")
        sys.stdout.flush()
        sys.stdin.readline()  # at once in the second life, which is given nothing to read


def _live(folder: Path, *callbacks: Callback) -> None:
    """One life of a run that goes on where the last one was killed."""
    saves = ModelCheckpoint(every_n_train_steps=8, every_n_epochs=1)
    trainer = _trainer(folder, log_every_n_steps=1, callbacks=[*callbacks, saves], devices=1)
    trainer.fit(Net(), *_loaders(), ckpt_path="auto")


def killed_and_resumed(folder: Path) -> Found:
    """A run killed by ``kill -9`` at any step, and resumed, ends as one that was never killed."""
    _live(folder / "whole")
    at, last, place = 16 + secrets.randbelow(EPOCHS * LENGTH - 16), 0, folder / "killed"
    words = ("-m", "lightkit.proofs", "live", str(place))
    with _process(folder / "log.txt", *words, stdin=subprocess.PIPE) as first:
        assert first.stdin is not None
        for last in _steps(first.stdout or ()):
            with contextlib.suppress(BrokenPipeError):  # it has failed; its code is looked at
                os.write(first.stdin.fileno(), b"\n")
            if last == at:
                time.sleep(secrets.randbelow(40) / 10_000)  # somewhere in the step that follows
                first.kill()  # SIGKILL
                break
    if first.returncode != -signal.SIGKILL:
        raise RuntimeError(f"not killed: code {first.returncode}. {_end_of(folder / 'log.txt')}")
    began = next(_steps(_lines(folder / "log.txt", *words))) - 1
    numbers = {"killed_at": last, "resumed_at": began}
    if not began:
        return False, f"killed at step {last}, began anew", numbers
    one, two = _left_by(folder / "whole"), _left_by(place)
    found = [*compare(one, two, "run", ["*.seconds", "*.time"])]
    text = f"killed at step {last} of {EPOCHS * LENGTH}, went on from {began}: "
    text += f"{len(found)} values differ" + (f" ({': '.join(found[0])})" if found else "")
    return not found, text, {**numbers, "differ": len(found)}


def _steps(lines: Iterable[str]) -> Iterator[int]:
    """Yields the steps among what a process says."""
    return (int(line[5:]) for line in lines if line.startswith("step "))


def _left_by(folder: Path) -> dict[str, Any]:
    """Returns all that must be equal of a run: the state at its end, the rows of its curves."""
    (file,) = folder.glob("**/metrics.jsonl")  # a run that goes on has one folder
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    state = checkpoint.read_checkpoint(file.parent / "checkpoints" / "last.ckpt")
    parts = ("model", "optimizers", "schedulers", "loop", "history", "rng")
    return {"rows": rows, **{part: state[part] for part in parts}}


# --- processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _process(
    log: Path, *words: str, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """Starts Python with these words, in the folder of this very lightkit, and waits for its end."""
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(  # noqa: S603  this very Python
            [sys.executable, *words],
            cwd=Path(lk.__file__).parents[1],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    began, clock = time.monotonic(), threading.Timer(LIMIT, process.terminate)
    clock.start()
    with ended(process):
        try:
            yield process
            process.communicate()
            if time.monotonic() - began > LIMIT:
                raise RuntimeError(f"a process took more than {LIMIT:.0f} s. {_end_of(log)}")
        finally:
            clock.cancel()


def _lines(log: Path, *words: str) -> list[str]:
    """Returns the lines that a process wrote, which must have ended well."""
    with _process(log, *words) as process:
        lines = [*(process.stdout or ())]
    if process.returncode:
        raise RuntimeError(f"a process ended with code {process.returncode}. {_end_of(log)}")
    return lines


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return " ".join(line.strip() for line in lines[-4:])[-300:]


# --- two ranks -----------------------------------------------------------------------------------


def _train_ranks(folder: Path, batch: int) -> None:
    trainer = _trainer(folder, accelerator="cpu", max_epochs=2, log_every_n_steps=1)
    trainer.fit(Net(dropout=0.0), *_loaders(batch, samples=400))  # 10 batches of both together


def two_ranks_equal_one(folder: Path) -> Found:
    """Two processes train as one does on their batches together."""
    _train_ranks(folder / "one", 2 * BATCH)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--log-dir", str(folder / "torchrun"), "-m", "lightkit.proofs", "ranks"]
    _lines(folder / "log.txt", *words, str(folder / "two"))
    one, two = _left_by(folder / "one"), _left_by(folder / "two")
    apart = max(float((one["model"][k] - two["model"][k]).abs().max()) for k in one["model"])
    steps = (one["loop"]["global_step"], two["loop"]["global_step"])
    numbers = {"steps": steps[0], "apart": apart}
    text = f"{steps[0]} steps under torchrun: weights apart by at most {apart:.1e}"
    if steps[0] != steps[1]:
        return False, f"{steps[0]} steps alone, {steps[1]} steps on two ranks", numbers
    rows = zip(one["rows"], two["rows"], strict=True)
    most = max(abs(a[name] - b[name]) for a, b in rows for name in a if "loss" in name)
    numbers["losses_apart"] = most
    return max(apart, most) <= NEAR, f"{text}, losses by {most:.1e}", numbers


# --- no waiting between two rows -----------------------------------------------------------------


class _Reads(Callback):
    """Counts where Python reads a tensor, by step, after the first row; on CUDA all that waits."""

    def __init__(self, every: int, last: int) -> None:
        self.every, self.last, self.step = every, last, 0
        self.steps: list[int] = []
        self._open = contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: Trainer, task: TaskModule, batch: Any, batch_idx: int
    ) -> None:
        self.step = batch_idx + 1
        if self.step > self.last:
            self.close()
        elif self.step == self.every + 1:  # the first steps load kernels, and alarms look at them
            self._open.enter_context(_Operations(self._note))
            self._open.enter_context(_Calls(self._note))
            if task.device.type == "cuda":
                self._open.enter_context(warnings.catch_warnings())
                warnings.simplefilter("always")
                warnings.showwarning = lambda *_, **__: self._note()
                torch.cuda.set_sync_debug_mode("warn")
                self._open.callback(torch.cuda.set_sync_debug_mode, "default")

    def close(self) -> None:
        """Counts no longer."""
        self._open.close()

    def _note(self) -> None:
        self.steps.append(self.step)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees torch itself read: a number, or how many values a mask leaves."""

    READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.READS & {*func.tags}:
            self.note()
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Sees tensors read as a whole, which on the CPU is no operation."""

    READS = frozenset({"tolist", "numpy", "__array__", "cpu", "__repr__"})

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.READS:
            self.note()
        return func(*args, **(kwargs or {}))


def no_syncs_between_rows(folder: Path, task: type[Net] = Light) -> Found:
    """Nothing waits for the device but the one read of each row of the log."""
    every, steps = 10, 100
    reads = _Reads(every, steps)
    trainer = _trainer(folder, max_epochs=1, log_every_n_steps=every, callbacks=reads, devices=1)
    try:
        trainer.fit(task(), _loaders(batch=4)[0])
    finally:
        reads.close()
    at_rows = {step for step in reads.steps if step % every == 0}
    between = sum(step % every > 0 for step in reads.steps)
    rows = steps // every - 1
    numbers = {"steps": rows * (every - 1), "between": between, "rows": rows}
    if len(at_rows) < rows:
        return False, f"the counter saw {len(at_rows)} of {rows} reads of rows", numbers
    text = (
        f"{between} in {rows * (every - 1)} steps, and {len(reads.steps) - between} at {rows} rows"
    )
    return between == 0, text, numbers


# --- what a step costs ---------------------------------------------------------------------------


class _Bare(Light):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class _Beside:
    """A loader that takes the time of its steps, and of as many by hand before and after them.

    Both meet what else the machine does; the clock is that of the thread.
    """

    def __init__(self, rounds: int, chunk: int = 20) -> None:
        self.rounds, self.chunk = rounds, chunk
        self.ratios: list[float] = []
        x, y = torch.randn(8, FEATURES), torch.randint(0, CLASSES, (8,))
        self.batch = (x, y)
        self.net = _network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def __len__(self) -> int:
        return 2 * self.chunk * (self.rounds + 10)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(-10, self.rounds):  # the first ten warm up
            before = self._by_hand()
            began = time.thread_time()
            for _ in range(2 * self.chunk):
                yield self.batch
            ours = time.thread_time() - began
            theirs = before + self._by_hand()
            if number >= 0:
                self.ratios.append(ours / theirs)

    def _by_hand(self) -> float:
        net, optimizer = self.net, self.optimizer
        began = time.thread_time()
        for _ in range(self.chunk):
            x, y = self.batch
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return time.thread_time() - began


def cost_of_a_step(
    folder: Path,
    rounds: int = 100,
    task: type[TaskModule] = _Bare,
    most: Mapping[str, float] = MOST,
) -> Found:
    """The host time of a step of a tiny network on the CPU, where that of the Trainer shows most."""
    off = {"logger": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "max_epochs": 1, "gradient_clip_val": None}
    ratios = {}
    for name, more in {"bare": off, "full": {}}.items():
        ratios[name] = float("inf")
        for _ in range(3):  # a busy machine gets another try
            loader = _Beside(rounds)
            _trainer(folder, **options, **more).fit(task(), loader)
            ratios[name] = min(ratios[name], statistics.median(loader.ratios))
            if ratios[name] <= most[name]:
                break
    text = f"{ratios['bare']:.3f} of one by hand (at most {most['bare']:.2f}), "
    text += f"{ratios['full']:.3f} with curves and checkpoints (at most {most['full']:.2f})"
    return all(ratios[name] <= most[name] for name in ratios), text, ratios


# --- checkpoints ---------------------------------------------------------------------------------


def plain_checkpoints(folder: Path) -> Found:
    """``torch.load(weights_only=True)``, which runs no code of a file, reads every checkpoint."""
    saves = ModelCheckpoint(every_n_epochs=1, save_top_k=-1)
    task = Net()
    _trainer(folder, callbacks=saves, max_epochs=2, devices=1).fit(task, *_loaders())
    files = sorted(folder.glob("**/*.ckpt"))
    loaded = [torch.load(file, weights_only=True, map_location="cpu") for file in files]
    held = next(c["model"] for c, f in zip(loaded, files, strict=True) if f.stem == "last")
    differ = sum(not torch.equal(held[name], v.cpu()) for name, v in task.state_dict().items())
    size = sum(file.stat().st_size for file in files)
    numbers = {"files": len(files), "bytes": size, "differ": differ}
    text = f"torch.load(weights_only=True) reads all {len(files)} files ({size / 1e3:.0f} kB)"
    return differ == 0, f"{text}; {differ} weights differ", numbers


def _child(kind: str, folder: str) -> None:
    """What the processes do that are started here."""
    torch.set_num_threads(1)
    if kind == "live":
        _live(Path(folder), _Steps())
    else:
        _train_ranks(Path(folder), BATCH)


if __name__ == "__main__":
    from lightkit import proofs  # its classes are those of this process's parent

    proofs._child(*sys.argv[1:])
