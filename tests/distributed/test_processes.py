"""What processes say to each other when something is wrong with it."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys

import pytest

from lightkit.distributed.processes import _packed, _twin
from lightkit.errors import ConfigError, PeerError
from tests.distributed.harness import ROOT, environment, finish, start, torchrun
from tests.distributed.scenes_ends import Odd, Unpicklable

SCENES = "tests.distributed.scenes_ends"


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
    assert zero["ways"] == one["ways"]
    for (kind, text), names in zip(
        zero["ways"],
        [("a save", "a flush"), ("a wait", "a folder"), ("many", "few")],
        strict=True,
    ):
        assert kind == "UsageError"
        assert "rank 0 came to {!r}; rank 1 came to {!r}".format(*names) in text
    assert zero["long"] == one["long"] == [[0.0, *range(100)], [1.0, *range(100)]]
    assert zero["after"] == one["after"] == [5, 5]
    assert zero["again"]
    assert one["again"]


def test_a_group_of_the_program_is_used_and_left_alone(tmp_path) -> None:
    for found in torchrun(f"{SCENES}:given", 2, tmp_path):
        assert found == {"shared": "from 0", "seen": ["a test"], "open": True}


def test_a_process_that_is_never_started_is_missed() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = "from tests.distributed.scenes_ends import alone; alone()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(there),
        capture_output=True,
        text=True,
        timeout=60,
    )
    start = (
        f"PeerError: rank 0 did not meet all of the 2 processes at 127.0.0.1:{port} within 2 s: "
    )
    assert done.stdout.startswith(start), done.stdout + done.stderr
    assert "GLOO_SOCKET_IFNAME" in done.stdout  # one process here, so there are two machines


def test_who_does_not_come_is_named(tmp_path) -> None:
    outcome = finish(start(f"{SCENES}:late", 2, tmp_path), tmp_path)
    soon = "rank 0 has waited for 1 s in 'flush at step 50': rank 1 was last in 'x'."
    assert outcome.output.count(soon) == 1
    assert outcome.results[0] == (
        "PeerError",
        "rank 0 waited in 'flush at step 50': rank 1 did not come within 3 s; it was last in 'x'",
    )


@pytest.mark.parametrize("error", [ConfigError("wrong"), KeyError("k"), OSError(2, "gone", "f")])
def test_errors_that_can_be_sent_stay_what_they_are(error) -> None:
    assert _twin(error) is error


@pytest.mark.parametrize("error", [Odd(3, where="there"), Unpicklable()])
def test_other_errors_are_sent_as_their_text(error) -> None:
    twin = _twin(error)
    assert isinstance(twin, PeerError)
    assert str(twin) == f"rank 0 ended with {type(error).__name__}: {error}"
    assert pickle.loads(pickle.dumps(twin)).args == twin.args


def test_what_cannot_be_packed_is_said() -> None:
    assert _packed([1, 2])[1] == ""
    data, why = _packed(lambda: 0)
    assert data == b""
    assert "lambda" in str(why)
