"""A process that ends takes the others with it, soon, and everybody can read why."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from tests.distributed.harness import finish, start

SCENES = "tests.distributed.scenes_ends"
#: Seconds from the end of one process to that of the whole job, on a loaded machine.
SOON = 15.0


def ended(scene: str, root, processes: int = 2, interrupt: int = 0, **arguments):
    """Runs a scene that must fail; checks the time, the exit code and that nobody is left."""
    job = start(f"{SCENES}:{scene}", processes, root, **arguments)
    if interrupt:
        while len(list(root.glob("pid_*"))) < processes or not list(root.glob("at")):
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        job.send_signal(interrupt)
    outcome = finish(job, root)
    took = time.time() - float((root / "at").read_text())
    print(f"{scene} {arguments}: the job ended after {took:.1f} s with code {outcome.code}")
    print(outcome.output)
    assert outcome.code != 0
    assert took < SOON
    deadline = time.monotonic() + 5
    pids = {int(path.name[4:]) for path in root.glob("pid_*")}
    assert len(pids) >= processes
    while alive := {pid for pid in pids if lives(pid)}:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.1)
    return outcome


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # one that nobody has waited for is no more
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def tracebacks(output: str) -> list[str]:
    """Returns the last line of each traceback that a process of the run prints."""
    lines = output.splitlines()
    found, inside = [], False
    for line in lines:
        if line.startswith("[rank"):
            inside = inside or "Traceback (most recent call last)" in line
            _, _, text = line.partition("]: ")
            if inside and text and not text.startswith((" ", "Traceback", "During", "The above")):
                found.append(line)
                inside = False
    return found


@pytest.mark.parametrize("place", ["flush", "backward"])
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_raw(tmp_path, how, place) -> None:
    outcome = ended("raw", tmp_path, how=how, place=place)
    wanted = ["[rank1]: ValueError: boom"] if how == "raise" else []
    assert tracebacks(outcome.output) == wanted


@pytest.mark.parametrize(
    ("how", "place", "workers", "guilty", "waited"),
    [
        ("raise", "step", 0, "ValueError: boom", "rank 1 ended with ValueError: boom"),
        ("raise", "evaluation", 0, "ValueError: boom", "an evaluation': rank 1 ended with Va"),
        ("raise", "hook", 0, "ValueError: boom", "rank 1 ended with ValueError: boom"),
        (
            "memory",
            "step",
            0,
            "MemoryError: no room for the batch",
            "rank 1 ended with MemoryError",
        ),
        (
            "raise",
            "dataset",
            2,
            "ValueError: Caught ValueError in DataLoader worker process 0.",
            "Caught ValueError in DataLoader worker process 0. ... ValueError: boom",
        ),
        ("kill", "step", 2, None, "rank 1 fell silent: killed, out of memory, or cut off?"),
        ("exit", "hook", 0, None, "rank 1 ended with SystemExit: 3"),
    ],
)
def test_one_rank_of_a_fit(tmp_path, how, place, workers, guilty, waited) -> None:
    outcome = ended("fit", tmp_path, how=how, place=place, workers=workers)
    found = tracebacks(outcome.output)
    assert found[:1] == ([] if guilty is None else [f"[rank1]: {guilty}"])
    # The other rank says in one line why it ended, and shows nothing of its own.
    (line,) = (line for line in outcome.output.splitlines() if line.startswith("rank 0 waited "))
    assert waited in line
    assert "[rank0]: Traceback" not in outcome.output
    _, _, cause = outcome.output.partition("Root Cause")
    assert "rank      : 1 " in cause
    assert how != "exit" or "exitcode  : 3 " in cause


def test_a_long_validation_is_broken_off_on_all_ranks_at_once(tmp_path) -> None:
    outcome = ended("long_validation", tmp_path, interrupt=signal.SIGTERM)
    assert "SIGTERM: stopped after step 8" in outcome.output
    assert "different ways" not in outcome.output
    (path,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["loop"]["global_step"] == 8
    assert saved["loop"]["pending_validation"] == "epoch"


def test_ctrl_c(tmp_path) -> None:
    outcome = ended("fit", tmp_path, interrupt=signal.SIGINT, how="mark", place="step")
    assert "ValueError" not in outcome.output
    assert "PeerError" not in outcome.output
    assert outcome.output.count("]: KeyboardInterrupt") == 1  # rank zero's
