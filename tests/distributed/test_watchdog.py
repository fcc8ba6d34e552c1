"""A wait in C++ for what never comes is ended; work never is."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from lightkit.distributed import watchdog
from tests.distributed.harness import finish, start, torchrun

SCENES = "tests.distributed.scenes_ends"


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


def test_connections_that_do_not_close_are_left(tmp_path) -> None:
    outcome = finish(start(f"{SCENES}:unclosed", 2, tmp_path), tmp_path)
    assert "rank 1 ended: its connections to the other processes did not close" in outcome.output
    assert "exitcode  : 1 " in outcome.output


def test_work_is_never_ended(tmp_path) -> None:
    zero, one = torchrun(f"{SCENES}:stuck", 2, tmp_path, how="both", place="work")
    assert zero > 8
    assert one is None


def test_signals_are_heard_and_passed_on_to_who_listened_before() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        listen, wake = watchdog._listen()
        assert listen(0.0) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert listen(1.0) == signal.SIGTERM
        assert os.read(read, 10) == bytes([signal.SIGTERM])
        wake()
        begun = time.monotonic()
        assert listen(5.0) == 0
        assert time.monotonic() - begun < 4
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(former)
        os.close(read)
        os.close(write)


def test_a_thread_cannot_listen_but_waits() -> None:
    heard: list[int] = []
    thread = threading.Thread(target=lambda: heard.append(watchdog._listen()[0](0.01)))
    thread.start()
    thread.join()
    assert heard == [0]


def test_the_clock_of_a_thread_stands_while_it_sleeps() -> None:
    clock = watchdog._clock_of(threading.get_ident())
    begun = clock()
    time.sleep(0.2)
    assert clock() - begun < 0.1


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("/x/torch/autograd/graph.py", True),
        ("/x/torch/distributed/distributed_c10d.py", True),
        ("/x/torch/distributed/checkpoint/filesystem.py", False),  # a save
        ("/x/torch/serialization.py", False),
        ("/x/lightkit/loops.py", False),
    ],
)
def test_where_a_thread_may_wait_for_others(file, waits) -> None:
    there: dict = {}
    exec(compile("import sys\ndef here(): return sys._getframe()", file, "exec"), there)
    assert watchdog._in_torch(there["here"]()) is waits
