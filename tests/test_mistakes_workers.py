"""A dataset that fails, in this process and in workers: an error, never a short epoch or a hang."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightkit.errors import DataError
from tests.small import Net, loader

# Torch raises the error of a dead worker out of a signal handler, wherever this process is. Within
# multiprocessing that may be between the opening of a socket and the ``with`` that would close it.
torn_socket = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


class Fails(Dataset):
    """Its sample 9 of 20 fails."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 9:
            self.how()
        return torch.ones(4), torch.ones(1)


def value_error():
    raise ValueError("broken sample")


def index_error():
    return [1, 2][7]


def stop_iteration():
    return next(iter(()))


def leave():
    os._exit(3)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("persistent", [None, False, True])
@pytest.mark.parametrize(
    ("how", "error"),
    [(value_error, ValueError), (index_error, IndexError), (stop_iteration, DataError)],
)
def test_an_error_in_a_dataset_ends_the_fit_with_its_traceback(quiet, how, error, persistent):
    workers = 0 if persistent is None else 1
    data = DataLoader(Fails(how), 4, num_workers=workers, persistent_workers=bool(persistent))
    run = quiet(max_epochs=2)
    with pytest.raises(error) as caught:
        run.fit(Net(), data)
    text = "".join(traceback.format_exception(caught.value))
    assert f"in {how.__name__}" in text  # the line of the user, also out of a worker
    assert run.global_step == 2
    assert multiprocessing.active_children() == []


@torn_socket
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("how", [leave, be_killed])
def test_a_worker_that_dies_ends_the_fit(quiet, how, persistent):
    data = DataLoader(Fails(how), 4, num_workers=1, persistent_workers=persistent)
    run = quiet(max_epochs=2)
    # torch says which worker is gone, or that the batch it was handing over cannot be fetched.
    with pytest.raises(
        (RuntimeError, OSError, EOFError), match="worker|reset|refused|such file|^$"
    ) as caught:
        run.fit(Net(), data)
    assert run.global_step <= 2
    assert multiprocessing.active_children() == []
    del caught
    gc.collect()  # a torn socket is closed here, while its warning is expected


def test_an_error_in_a_worker_of_validation(quiet):
    with pytest.raises(ValueError, match=r"in value_error[\s\S]*broken sample"):
        quiet().fit(Net(), loader(), DataLoader(Fails(value_error), 4, num_workers=1))
    assert multiprocessing.active_children() == []


def local():
    class OfNoModule(Exception):
        pass

    raise OfNoModule("made within a function")


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(20):
            if i == 9:
                local()
            yield torch.ones(4), torch.ones(1)


@torn_socket
@pytest.mark.parametrize("kind", ["map", "persistent", "iterable"])
def test_an_error_that_cannot_be_sent_ends_the_fit_and_is_shown(quiet, tmp_path, monkeypatch, kind):
    data = DataLoader(
        Stream() if kind == "iterable" else Fails(local),
        4,
        num_workers=1,
        persistent_workers=kind == "persistent",
    )
    shown = tmp_path / "stderr.txt"
    with shown.open("w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", file)  # a forked worker writes to it too
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            quiet().fit(Net(), data)
    assert "made within a function" in shown.read_text()
    assert not multiprocessing.active_children()
