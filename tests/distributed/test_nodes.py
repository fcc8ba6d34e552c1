"""Several machines: two network namespaces with a cable between them, torchrun on each."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import nodes, scenes_nodes
from tests.distributed.harness import LIMIT, Outcome, finish, torchrun

TRAIN = "tests.distributed.scenes_nodes:train"


@pytest.fixture(scope="module")
def pair():
    """Two machines, or a skip that says why there are none."""
    why = nodes.missing()
    if why:
        pytest.skip(why)
    with nodes.two() as both:
        yield both


@pytest.fixture(scope="module")
def alone(pair, tmp_path_factory):
    """Four processes on one machine that nobody disturbs."""
    root = tmp_path_factory.mktemp("alone")
    return torchrun(TRAIN, 4, root / "out", folder=str(root))


def ended(process: subprocess.Popen[str], root: Path) -> Outcome:
    outcome = finish(process, root)
    assert outcome.code == 0, outcome.output
    return outcome


def same(found: dict, wanted: dict) -> None:
    """Bit for bit."""
    assert found.keys() == wanted.keys()
    for name in ("history", "step", "folder"):
        assert found[name] == wanted[name]
    assert torch.equal(found["random"], wanted["random"])
    for name, value in wanted["weights"].items():
        assert torch.equal(found["weights"][name], value), name


def wait_for(mark: Path, *processes: subprocess.Popen[str]) -> None:
    """Waits until the last rank has come to where it shall be killed."""
    limit = time.monotonic() + LIMIT
    while not mark.exists():
        assert time.monotonic() < limit, "nobody came to the place of the kill"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_two_machines_are_as_one(pair, alone, tmp_path):
    out = tmp_path / "out"
    started = [node.torchrun(TRAIN, out, "2", folder=str(tmp_path)) for node in pair]
    outcomes = [ended(process, out) for process in started]
    found = outcomes[1].results  # all ranks have ended by now
    assert sorted(one["place"] for one in found) == [(0, 0, 4), (1, 1, 4), (2, 0, 4), (3, 1, 4)]
    assert found[0]["step"] == scenes_nodes.STEPS
    for one, wanted in zip(found, alone, strict=True):
        same(one, wanted)
    spoken = "".join(outcome.output for outcome in outcomes)
    assert spoken.count("device:   cpu, 4 processes") == 1  # rank zero alone speaks


def test_a_machine_dies_and_comes_back(pair, alone, tmp_path):
    """The others end at once and wait for it; the run ends as one that nobody disturbed."""
    first, second = pair
    out, arguments = tmp_path / "out", {"folder": str(tmp_path), "dies": scenes_nodes.DIES}
    stays = first.torchrun(TRAIN, out, "2", "--max-restarts=1", **arguments)
    goes = second.torchrun(TRAIN, out, "2", "--max-restarts=1", **arguments)
    wait_for(tmp_path / "mark", stays, goes)
    second.die()
    assert goes.wait(10) != 0
    goes.communicate()
    time.sleep(1)  # the first machine has noticed by now
    assert stays.poll() is None
    comes = second.torchrun(TRAIN, out, "2", "--max-restarts=1", **arguments)
    told = ended(stays, out).output
    found = ended(comes, out).results
    assert "fell silent: killed, out of memory, or cut off?" in told
    assert "(6 steps, 1 epoch and 1 batch done)" in told
    for one, wanted in zip(found, alone, strict=True):
        same(one, wanted)


@pytest.mark.slow
def test_the_others_go_on_meanwhile(pair, tmp_path):
    """--nnodes=1:2: four processes, then two, then four again, with the same global batch."""
    first, second = pair
    quiet = {"epochs": 10, "dropout": 0.0}
    whole = torchrun(TRAIN, 4, tmp_path / "whole", folder=str(tmp_path / "whole"), **quiet)[0]
    out = tmp_path / "out"
    arguments = {"folder": str(tmp_path), "dies": scenes_nodes.DIES, "slow": 0.2, **quiet}
    flags = ("1:2", "--max-restarts=1")
    stays = first.torchrun(TRAIN, out, *flags, patience=8, **arguments)
    goes = second.torchrun(TRAIN, out, *flags, patience=8, **arguments)
    wait_for(tmp_path / "mark", stays, goes)
    second.die()
    goes.communicate()
    time.sleep(16)  # until it counts as gone, and two processes have trained for a while
    comes = second.torchrun(TRAIN, out, *flags, patience=8, **arguments)
    told = ended(stays, out).output
    found = ended(comes, out).results
    assert "saved by 4 processes, goes on with 2" in told
    assert "SIGTERM: stopped after step" in told  # to take the machine in: saved, nothing lost
    assert "saved by 2 processes, goes on with 4" in told
    assert [one["place"][2] for one in found] == [4] * 4
    for one in found:
        assert (one["step"], one["folder"]) == (whole["step"], "version_0")
        for name, value in whole["weights"].items():
            torch.testing.assert_close(one["weights"][name], value, rtol=1e-5, atol=1e-5)
