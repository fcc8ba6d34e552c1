from __future__ import annotations

import sys
import types

import pytest

from lightkit.distributed import (
    LaunchEnv,
    check_nodes,
    launched,
    require_launcher,
    torchrun_line,
)
from lightkit.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A process that neither torchrun nor SLURM started, of a script with two arguments."""
    for name in (*NAMES, *SLURM, "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    program(monkeypatch, "train.py", "--name", "a run")


def program(monkeypatch: pytest.MonkeyPatch, *argv: str, module: str | None = None) -> None:
    main = types.ModuleType("__main__")
    main.__spec__ = None if module is None else types.SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", list(argv))


def test_plain_python_is_one_process() -> None:
    assert launched() == LaunchEnv(0, 0, 1, 1)
    require_launcher(launched())
    check_nodes(1, launched())


def test_torchrun_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, "3142", strict=True):
        monkeypatch.setenv(name, value)
    env = launched()
    assert env == LaunchEnv(rank=3, local_rank=1, world_size=4, local_world_size=2, launched=True)
    check_nodes(2, env)
    check_nodes(None, env)
    with pytest.raises(ConfigError, match=r"num_nodes=3.*4 processes, 2 .*num_nodes=2.*--nnodes 3"):
        check_nodes(3, env)


def test_garbage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        launched()


def test_several_machines_need_torchrun() -> None:
    with pytest.raises(ConfigError, match="num_nodes=2, but plain python") as caught:
        check_nodes(2, launched())
    assert str(caught.value).endswith(
        "  torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d "
        "--rdzv-endpoint FIRST_MACHINE:29500 train.py --name 'a run'"
    )


def test_srun_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    require_launcher(launched())  # a batch script, which is one process
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(ConfigError, match=r"srun started 8 processes.*--ntasks-per-node=1") as one:
        require_launcher(launched())
    assert "  torchrun --nproc-per-node 8 train.py" in str(one.value)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ConfigError, match="torchrun --nnodes 2 --nproc-per-node 4 "):
        require_launcher(launched())
    monkeypatch.setenv("RANK", "0")
    require_launcher(launched())  # torchrun by srun
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    require_launcher(launched())


@pytest.mark.parametrize(
    ("argv", "module", "words"),
    [
        (("train.py", "--lr", "1"), None, "train.py --lr 1"),
        (
            ("/somewhere/bin/lightkit", "fit", "--config", "c.yaml"),
            None,
            "-m lightkit fit --config c.yaml",
        ),
        (("/x/lightkit/__main__.py", "fit"), "lightkit.__main__", "-m lightkit fit"),
        (("/x/my/train.py", "a b"), "my.train", "-m my.train 'a b'"),
        (("-c", "more"), None, "train.py"),
    ],
)
def test_the_line_starts_this_very_program(monkeypatch, argv, module, words) -> None:
    program(monkeypatch, *argv, module=module)
    assert torchrun_line(4) == f"torchrun --nproc-per-node 4 {words}"
