"""How runs of several processes end: what the processes of test_ends.py do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

import lightkit as lk
from lightkit.distributed import join, launched, watchdog
from lightkit.errors import ConfigError, PeerError

CPU = torch.device("cpu")


class Odd(Exception):
    """An error whose constructor takes something else than what its message is made of."""

    def __init__(self, number: int, *, where: str) -> None:
        super().__init__(f"odd {number} in {where}")


class Unpicklable(Exception):
    """An error that holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def raised(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return "", ""


def words():
    """Errors and values of every kind, over the processes; the group stays usable."""
    ranks = join(launched(), CPU)

    def fail(error):
        def call():
            raise error

        return raised(lambda: ranks.decide(call, "a decision"))

    own = threading.Lock() if ranks.rank == 1 else "plain"
    ways = [
        [lambda: ranks.gather("x" * 1000, "a save"), lambda: ranks.exchange([1.0], "a flush")],
        [lambda: ranks.wait("a wait"), lambda: ranks.share("y" * 1000, "a folder")],
        [lambda: ranks.exchange([1.0] * 100, "many"), lambda: ranks.exchange([1.0], "few")],
    ]
    found = {
        "config": fail(ConfigError("wrong")),
        "key": fail(KeyError("k")),
        "odd": fail(Odd(3, where="there")),
        "lock": fail(Unpicklable()),
        "result": raised(lambda: ranks.decide(threading.Lock, "a lock")),
        "share": raised(lambda: ranks.share(threading.Lock(), "a lock")),
        "gather": raised(lambda: ranks.gather(own, "locks")),
        "ways": [raised(way[ranks.rank]) for way in ways],
        "long": ranks.exchange([float(ranks.rank), *range(100)], "more than one message holds"),
        "after": ranks.gather(ranks.decide(lambda: 5, "a number"), "numbers"),
        "own": raised(lambda: ranks.average([torch.ones(2, dtype=torch.bool)])),
        "again": join(launched(), CPU) is ranks,
    }
    ranks.wait("the end")
    return found


def given():
    """A process group that the program opened itself is used, and left alone."""
    torch.distributed.init_process_group("gloo")
    ranks = join(launched(), CPU)
    found = {
        "shared": ranks.share(f"from {ranks.rank}", "a test"),
        "seen": [seen.place for seen in ranks._board.look().values()],
    }
    ranks.close(destroy=False)
    found["open"] = torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    return found


def alone():
    """One of two processes; the other one is never started."""
    said = raised(lambda: join(launched(), CPU, timedelta(seconds=2)))
    sys.stdout.write(": ".join(said) + "\n")
    sys.stdout.flush()
    os._exit(0)


def late():
    """Rank 1 does not come, and says afterwards where it was."""
    watchdog.LATE = 1.0
    ranks = join(launched(), CPU, timedelta(seconds=3))
    ranks.wait("x")
    if ranks.rank == 1:
        time.sleep(9)
        os._exit(0)
    said = raised(lambda: ranks.wait("flush at step 50"))
    ranks.failed(PeerError(""))
    torch.save(said, sys.argv[3] + f"/rank_{ranks.rank}.pt")
    os._exit(0)


def here() -> None:
    """Leaves the number of this process for the test to look for."""
    Path(sys.argv[3], f"pid_{os.getpid()}").touch()


def raw(how: str, place: str, rank: int = 1):
    """One rank ends in some way while the others are somewhere."""
    here()
    ranks = join(launched(), CPU)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    for step in range(4000):
        if step == 3 and ranks.rank == rank:
            end(how)
        try:
            if place == "flush":
                ranks.exchange([1.0], f"flush at step {step}")
            else:
                model(torch.randn(2, 4)).sum().backward()
        except BaseException as error:
            error = ranks.explain(error)
            ranks.failed(error)
            raise error
        time.sleep(0.005)


def end(how: str) -> None:
    """Ends this process, or what it does."""
    Path(sys.argv[3], "at").write_text(str(time.time()))
    if how == "mark":
        return
    if how == "raise":
        raise ValueError("boom")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(3)
    if how == "memory":
        raise MemoryError("no room for the batch")
    raise AssertionError(how)


class Data(torch.utils.data.Dataset):
    """Random rows; one of them ends a process."""

    def __init__(self, bad: int, how: str) -> None:
        self.bad, self.how = bad, how

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> torch.Tensor:
        if index < 8:
            here()  # also in workers
        if index == self.bad:
            end(self.how)
        return torch.full((4,), float(index))


class Net(lk.TaskModule):
    """Ends its process at a place of the loop."""

    def __init__(self, how: str, place: str) -> None:
        super().__init__()
        self.how, self.place = how, place
        self.layer = nn.Linear(4, 4)

    def _perhaps(self, place: str, batch_idx: int) -> None:
        if self.place == place and self.trainer.global_rank == 1 and batch_idx == 3:
            end(self.how)

    def training_step(self, batch, batch_idx):
        self._perhaps("step", batch_idx)
        time.sleep(0.005)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self._perhaps("evaluation", batch_idx)
        return self.layer(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._perhaps("hook", batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(how: str, place: str, workers: int = 0, root: str = ""):
    """A fit of which rank 1 ends at some place."""
    here()
    # Rank 1 has the odd batches: index 5 is in the third of them.
    data = Data(5 * 2 if place == "dataset" else -1, how)
    loader = torch.utils.data.DataLoader(data, 2, num_workers=workers)
    val = torch.utils.data.DataLoader(Data(-1, ""), 2)
    trainer = lk.Trainer(
        max_epochs=1000,
        log_every_n_steps=50,
        val_check_interval=5,
        limit_val_batches=40,
        default_root_dir=sys.argv[3],
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Net(how, place), loader, val)


class Patient(lk.TaskModule):
    """A validation that takes minutes."""

    def __init__(self, root: str):
        super().__init__()
        self.net, self.root = nn.Linear(2, 1), Path(root)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(0.01)
        if batch_idx == 3 and self.global_rank == 0 and not self.trainer.sanity_checking:
            (self.root / "at").write_text(str(time.time()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def long_validation():
    """Eight steps and a validation of a minute and a half on each rank."""
    here()
    root = sys.argv[3]
    data = torch.utils.data.TensorDataset(torch.ones(18001, 2))
    trainer = lk.Trainer(max_epochs=2, default_root_dir=root, enable_progress_bar=False)
    loader = torch.utils.data.DataLoader(data, 1)
    trainer.fit(Patient(root), torch.utils.data.DataLoader(data.tensors[0][:16, None]), loader)


def unclosed():
    """Rank 1 fails, and its connections, as those of a GPU may, cannot be closed."""
    ranks = join(launched(), CPU)
    if ranks.rank == 1:
        never = threading.Lock()
        never.acquire()
        torch.distributed.destroy_process_group = never.acquire
        raise ValueError("boom")
    ranks.wait("the end")


def stuck(how: str, place: str = "named"):
    """The main thread of rank 0 waits in C++ for what never comes; rank 1 ends or works.

    With gloo a connection that breaks ends a wait at once, so the wait is a lock that nobody
    releases, below code that has the file name of torch's backward where no name is given.
    """
    watchdog.AFTER_SIGNAL, watchdog.AFTER_FAILURE, watchdog.TICK = 3.0, 2.0, 0.2
    ranks = join(launched(), CPU)
    signal.signal(signal.SIGTERM, lambda *_: None)
    never = threading.Lock()
    never.acquire()
    wait = never.acquire
    if place == "torch":
        code = compile("def wait(lock): lock.acquire()", "/x/torch/autograd/graph.py", "exec")
        there: dict = {}
        exec(code, there)
        wait = lambda: there["wait"](never)  # noqa: E731
    begun = time.monotonic()
    if ranks.rank == 0:
        if how in ("term", "both"):
            os.kill(os.getpid(), signal.SIGTERM)
        if place == "work":  # neither in a collective nor still, and then one long call
            while time.monotonic() - begun < 4:
                time.sleep(0.05)
            time.sleep(4.5)
        elif place == "named":
            with ranks._named("flush at step 50"):
                wait()
        else:
            wait()
        return time.monotonic() - begun
    if how in ("fail", "both"):
        ranks.failed(ValueError("boom"))
    if place == "named" and how == "term":
        ranks._board.at(7, "x")
    # Rank 1 works for a while, which rank 0 must wait for; then it waits as well.
    busy = 4.0
    while time.monotonic() - begun < busy:
        time.sleep(0.05)
    if place == "work":
        return None
    with ranks._named("something else"):
        never.acquire()
    return None
