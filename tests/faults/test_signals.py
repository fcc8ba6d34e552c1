"""Signals from outside: the state of this very step is saved, and the run goes on from there."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import signal
import termios
import time

import pytest
import torch

from tests import pseudo_terminal
from tests.faults.harness import Outcome, log_of
from tests.faults.victim import Settings

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


def shown(code: int) -> int:
    """Returns an exit code as a shell shows it: a death by a signal is 128 and its number."""
    return 128 - code if code < 0 else code


def begin(lives, root, **arguments):
    """Starts a small run; returns who waits for it and its process id."""
    return lives.start(
        "tests.faults.interrupted:wait", {"root": str(root), **arguments}, root / "log.txt"
    )


def when_ready(root, timeout: float = 30.0) -> None:
    end = time.monotonic() + timeout
    while not (root / "ready").exists():
        assert time.monotonic() < end, log_of(root)
        time.sleep(0.005)


def saved(root):
    """Returns what the newest checkpoint holds; None where there is none."""
    found = list(root.rglob("last.ckpt"))
    return torch.load(found[0], weights_only=True) if found else None


# --- the same run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "n", "number", "settings"),
    [
        ("batch_start", 9, TERM, {}),
        ("backward", 10, USR1, {}),  # within a group
        ("save_point", 6, HUP, {}),
        ("saved", 5, INT, {}),
        ("validation_batch", 6, TERM, {}),
        ("validation_end", 3, TERM, {}),
        ("epoch_end", 1, TERM, {}),
        ("epoch_start", 2, TERM, {}),
        ("sanity_batch", 1, TERM, {}),
        ("batch_start", 9, TERM, {"workers": 2}),
        ("validation_batch", 6, TERM, {"workers": 2, "persistent": True}),
        ("validation_batch", 2, TERM, {"workers": 2, "persistent": True}),
        ("batch_end", 5, TERM, {"order": "generator"}),
    ],
)
def test_it_goes_on_as_if_nobody_had_asked(lives, reference, tmp_path, place, n, number, settings):
    """Weights, optimizer, schedules, metrics, random states, history, rows, files and samples."""
    given = Settings(root=str(tmp_path), **settings)
    expected = reference(given)
    plan = dataclasses.replace(given, kill={"place": place, "n": n})
    arguments = {**dataclasses.asdict(plan), "signal": int(number)}
    nursery, pid = lives.start("tests.faults.interrupted:live", arguments, tmp_path / "log.txt")
    assert shown(nursery.wait(pid)) == 128 + number, log_of(tmp_path)
    assert lives.live(given) == 0, log_of(tmp_path)
    found = Outcome.of(tmp_path)
    assert not expected.differences(found)
    # Nothing was trained twice: it ended where it was asked, and went on from there.
    assert len(found.repeated) == len(found.batches)
    assert len(found.folders) == 1


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (USR1, 138), (HUP, 129)])
def test_exit_codes(lives, tmp_path, number, code):
    nursery, pid = begin(lives, tmp_path)
    when_ready(tmp_path)
    os.kill(pid, number)
    assert nursery.wait(pid) == code
    assert (tmp_path / "state").read_text() == f"{number.name} 8"
    assert saved(tmp_path)["loop"]["global_step"] == 8
    log = log_of(tmp_path)
    assert f"{number.name}: stopped after step 8" in log
    assert "resume:" in log
    assert "Traceback" not in log


def test_a_second_sigterm_does_not_wait_for_the_step(lives, tmp_path):
    nursery, pid = begin(lives, tmp_path, ignore=True)
    when_ready(tmp_path)
    os.kill(pid, TERM)
    time.sleep(0.1)  # two at the same time may be one
    os.kill(pid, TERM)
    assert nursery.wait(pid) == 143
    assert (tmp_path / "state").read_text() == "SIGTERM 7"
    assert saved(tmp_path) is None


def test_a_handler_of_the_program_comes_after_the_save(lives, tmp_path):
    nursery, pid = begin(lives, tmp_path, chain=True)
    when_ready(tmp_path)
    os.kill(pid, TERM)
    assert nursery.wait(pid) == 143
    assert (tmp_path / "chain").read_text() == f"{int(TERM)} True ['last.ckpt']\nback\n"


def test_a_long_validation_does_not_keep_it(lives, tmp_path):
    nursery, pid = begin(lives, tmp_path, place="validation")
    when_ready(tmp_path)
    start = time.monotonic()
    os.kill(pid, TERM)
    assert nursery.wait(pid) == 143
    took = time.monotonic() - start
    print(f"ended {took:.2f} s after the signal, in a validation of 100 s")
    assert took < 30.0  # on a busy machine
    checkpoint = saved(tmp_path)
    assert checkpoint["loop"]["pending_validation"] == "epoch"
    assert checkpoint["loop"]["global_step"] == 10


# --- Ctrl-C in a terminal ------------------------------------------------------------------------


def in_terminal(lives, root, keys, **arguments):
    """Runs it in a pseudo-terminal and types; returns exit code, output, and whether it echoes."""
    ours, theirs = pty.openpty()
    try:
        nursery, pid = begin(lives, root, terminal=os.ttyname(theirs), **arguments)
        seen, in_time = pseudo_terminal.converse(
            ours, lambda: not os.path.exists(f"/proc/{pid}"), keys
        )
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        code = nursery.wait(pid)
        assert in_time, seen
        flags = termios.tcgetattr(theirs)[3]
    finally:
        os.close(ours)
        os.close(theirs)
    return shown(code), seen, bool(flags & termios.ECHO and flags & termios.ICANON)


def endings(seen: str) -> int:
    """Returns how many processes ended in a traceback: the program may, its workers may not.

    Its one traceback may have two parts, where Ctrl-C came while Python handled an exception of its
    own, as ``pathlib`` does.
    """
    return len(re.findall(r"^KeyboardInterrupt", seen, re.MULTILINE))


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_once(lives, tmp_path, bar, workers):
    code, seen, usable = in_terminal(
        lives, tmp_path, [("ready", b"\x03")], bar=bar, workers=workers
    )
    assert code == 130
    assert usable
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h")  # the cursor
    lines = pseudo_terminal.render(seen.replace("\x1b[?25l", "").replace("\x1b[?25h", ""))
    said = [line for line in lines if line.startswith("stopping after this step")]
    assert ("━━" in seen) == bar
    assert len(said) == 1, seen
    assert any(line.startswith("resume:") for line in lines), seen
    assert endings(seen) == 1, seen
    assert (tmp_path / "state").read_text() == "SIGINT 8"
    assert saved(tmp_path)["loop"]["global_step"] == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_twice(lives, tmp_path, workers):
    keys = [("ready", b"\x03"), ("^C again: now", b"\x03")]
    code, seen, usable = in_terminal(lives, tmp_path, keys, ignore=True, bar=True, workers=workers)
    assert code == 130
    assert usable
    assert (tmp_path / "state").read_text() == "SIGINT 7"
    assert saved(tmp_path) is None
    assert endings(seen) == 1, seen
