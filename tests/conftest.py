"""What every test may rely on: one thread, a fixed seed, no launcher's environment."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
# As where this Python's environment is active: its programs are known by their names.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import numpy as np
import pytest
import torch

import lightkit as lk

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite that a shell runs in the background has handed down that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: What torchrun and SLURM set. A test that wants one sets it itself.
LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same start for every test, whatever ran before it."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    logger = logging.getLogger("lightkit")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logging.getLogger("lightkit.hints").setLevel(logging.NOTSET)
    logger.propagate = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def quiet(tmp_path: Path) -> Callable[..., lk.Trainer]:
    """Makes trainers that show nothing and write nothing."""

    def make(**options: Any) -> lk.Trainer:
        defaults = {
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path / "runs",
        }
        return lk.Trainer(**defaults | options)

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
