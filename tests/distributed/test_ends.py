"""A process that ends takes the others with it, soon, and everybody can read why."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.distributed.harness import finish, start, torchrun

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


def test_errors_and_values_that_cannot_be_sent_are_told_to_all(tmp_path) -> None:
    zero, one = torchrun(f"{SCENES}:words", 2, tmp_path)
    assert zero["config"] == one["config"] == ("ConfigError", "wrong")
    assert zero["key"] == one["key"] == ("KeyError", "'k'")
    assert zero["odd"] == ("Odd", "odd 3 in there")
    assert one["odd"] == ("PeerError", "rank 0 ended with Odd: odd 3 in there")
    assert zero["lock"] == ("Unpicklable", "holds a lock")
    assert one["lock"] == ("PeerError", "rank 0 ended with Unpicklable: holds a lock")
    for name, rank in (("result", 0), ("share", 0), ("gather", 1)):
        assert zero[name] == one[name]
        kind, text = zero[name]
        assert kind == "UsageError"
        assert f"rank {rank} holds what cannot be sent" in text
        assert "cannot pickle '_thread.lock' object" in text
    assert zero["after"] == one["after"] == [5, 5]
    assert zero["again"]
    assert one["again"]


def test_who_does_not_come_is_named(tmp_path) -> None:
    outcome = finish(start(f"{SCENES}:late", 2, tmp_path), tmp_path)
    assert outcome.results[0] == (
        "PeerError",
        "rank 0 waited in 'flush at step 50': rank 1 did not come within 3 s; it was last in 'x'",
    )


@pytest.mark.parametrize("place", ["flush", "backward"])
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_raw(tmp_path, how, place) -> None:
    outcome = ended("raw", tmp_path, how=how, place=place)
    wanted = ["[rank1]: ValueError: boom"] if how == "raise" else []
    assert tracebacks(outcome.output) == wanted


@pytest.mark.parametrize(
    ("how", "place", "workers"),
    [
        ("raise", "step", 0),
        ("raise", "evaluation", 0),
        ("raise", "dataset", 2),
        ("raise", "hook", 0),
        ("kill", "step", 2),
        ("exit", "hook", 0),
        ("memory", "step", 0),
    ],
)
def test_a_rank_of_a_fit(tmp_path, how, place, workers) -> None:
    outcome = ended("fit", tmp_path, how=how, place=place, workers=workers)
    print(tracebacks(outcome.output))


@pytest.mark.parametrize(
    ("how", "place", "code", "words"),
    [
        ("term", "named", 143, "ended after SIGTERM: waited in 'flush at step 50' for"),
        ("term", "torch", 143, "ended after SIGTERM: waited in wait (/x/torch/autograd/graph.py)"),
        ("fail", "named", 1, "rank 1 ended with ValueError: boom"),
    ],
)
def test_a_wait_in_c_is_ended(tmp_path, how, place, code, words) -> None:
    outcome = finish(start(f"{SCENES}:stuck", 2, tmp_path, how=how, place=place), tmp_path)
    assert words in outcome.output
    assert "in stuck\n" in outcome.output  # the stack of the thread that waits
    assert f"exitcode  : {code} " in outcome.output


def test_work_is_never_ended(tmp_path) -> None:
    zero, one = torchrun(f"{SCENES}:stuck", 2, tmp_path, how="both", place="work")
    assert zero > 8
    assert one is None
