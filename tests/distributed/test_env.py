from __future__ import annotations

import pytest

from lightkit.distributed import LaunchEnv, launched, require_single_process
from lightkit.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def test_plain_python_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launched() == LaunchEnv(0, 0, 1, 1)
    require_single_process(launched())


def test_torchrun_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, "3142", strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == LaunchEnv(rank=3, local_rank=1, world_size=4, local_world_size=2)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4.*trains in one process.*plain python"):
        require_single_process(launched())


def test_one_process_under_torchrun_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, "0011", strict=True):
        monkeypatch.setenv(name, value)
    require_single_process(launched())


def test_garbage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        launched()
