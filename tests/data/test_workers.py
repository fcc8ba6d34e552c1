from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightkit.data import BatchStream, Feed
from lightkit.data.workers import WorkerStart, mix, seed_process, seeded


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


@pytest.mark.parametrize("index", [[1, 2], 3, (1, 2), "name", None])
def test_an_index_seeds_the_process_that_unpickles_it(index: Any) -> None:
    sent = pickle.dumps([seeded(5, index), 1])
    seed_process(5)
    wanted = drawn()
    seed_process(6)
    assert pickle.loads(sent) == [index, 1]
    assert drawn() == wanted


def test_a_batch_of_indices_looks_like_its_list() -> None:
    assert seeded(5, [1, 2]) == [1, 2]
    assert type(pickle.loads(pickle.dumps(seeded(5, [1, 2])))) is list


def test_seeds_are_the_same_everywhere() -> None:
    assert mix(1, 2, 3) == 6087047714123848686
    assert len({mix(a, b) for a in range(-20, 20) for b in range(20)}) == 800
    assert all(0 <= mix(n) < 2**63 for n in range(100))


class Slow(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.02)
        return torch.tensor([index, os.getpid()])


def start(worker_id: int) -> None:
    random.seed(100 + worker_id)


def test_the_users_own_start_is_called() -> None:
    copy = pickle.loads(pickle.dumps(WorkerStart(start)))
    assert copy.own is start
    loader = DataLoader(Slow(), 4, num_workers=1, worker_init_fn=start)
    assert Feed(loader).view.worker_init_fn.own is start
    assert loader.worker_init_fn is start


def test_workers_live_through_signals_and_end_with_the_pass() -> None:
    loader = DataLoader(Slow(), 2, num_workers=2)
    stream = BatchStream(loader, feed=Feed(loader))
    workers = stream._iterator._workers  # type: ignore[union-attr]
    batches = [stream.fetch(), stream.fetch()]  # one of each worker: both have begun
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        for worker in workers:
            os.kill(worker.pid, number)
    batches += list(stream)
    assert {int(pid) for batch in batches for pid in batch[:, 1]} == {w.pid for w in workers}
    assert sorted(int(i) for batch in batches for i in batch[:, 0]) == list(range(12))
    assert not any(w.is_alive() for w in workers)


def test_a_worker_that_dies_is_found_out() -> None:
    loader = DataLoader(Slow(), 2, num_workers=1)
    stream = BatchStream(loader, feed=Feed(loader))
    stream.fetch()
    # torch's handler of SIGCHLD may be the first to know, so the kill stands in the block too.
    with pytest.raises(RuntimeError, match="worker"):  # noqa: PT012
        os.kill(stream._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[union-attr]
        list(stream)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer")])
def test_a_broken_connection_to_a_worker_that_died_is_said_in_words(error) -> None:
    loader = DataLoader(Slow(), 2, num_workers=1)
    stream = BatchStream(loader, feed=Feed(loader), name="training loader")
    stream.fetch()
    worker = stream._iterator._workers[0]  # type: ignore[union-attr]
    with contextlib.suppress(RuntimeError):  # what torch's handler of SIGCHLD raises
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    def broken():
        raise error

    stream._next = broken
    with pytest.raises(RuntimeError, match=r"worker.*exit code -9.*the training loader"):
        stream.fetch()


SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from lightkit.data import BatchStream, Feed
loader = DataLoader(TensorDataset(torch.arange(99)), 2, num_workers=1, persistent_workers=True)
stream = BatchStream(loader, feed=Feed(loader))
stream.fetch()
"""


def test_workers_that_nobody_ended_do_not_keep_the_interpreter() -> None:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - begun < 25  # they would live half a minute after SIGTERM
