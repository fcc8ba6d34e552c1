from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch

from lightkit.distributed import LaunchEnv, board
from lightkit.distributed.board import Board

dist = torch.distributed


@pytest.fixture
def boards():
    """Two processes' boards over one real store."""
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    made = []
    for rank in range(2):
        env = LaunchEnv(rank, rank, 2, 2, launched=True, master_port=server.port)
        made.append(Board(env, timedelta(seconds=5)))
    yield made
    del server


def test_each_reads_the_others_line(boards) -> None:
    zero, one = boards
    one.at(7, "flush at step 50")
    one.beat(waits=True)
    seen = zero.look()
    assert list(seen) == [1]
    assert (seen[1].count, seen[1].place, seen[1].end) == (7, "flush at step 50", "")
    assert seen[1].waits
    one.beat(waits=False)
    later = zero.look()[1]
    assert later.beat != seen[1].beat
    assert not later.waits


def test_failures_are_of_others_and_can_be_taken_back(boards) -> None:
    zero, one = boards
    assert not zero.another_failed()
    one.fail("ValueError: boom")
    one.fail("ValueError: boom")
    assert zero.another_failed()
    assert not one.another_failed()
    assert zero.look()[1].end == "ValueError: boom"
    one.recover()
    one.recover()
    assert not zero.another_failed()
    assert zero.look()[1].end == ""
    one.leave("ended its program without an error")
    assert not zero.another_failed()
    assert zero.look()[1].end == "ended its program without an error"


def test_a_store_that_does_not_answer_is_asked_once(boards, monkeypatch) -> None:
    zero, _ = boards
    monkeypatch.setattr(board, "PATIENCE", 0.1)

    class Silent:
        def add(self, *_):
            time.sleep(0.5)

    zero._read = Silent()
    begun = time.monotonic()
    assert not zero.another_failed()
    assert zero.look() == {}
    assert time.monotonic() - begun < 0.4


def test_a_store_that_has_gone_raises_nothing() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    env = LaunchEnv(0, 0, 2, 2, launched=True, master_port=server.port)
    alone = Board(env, timedelta(seconds=5))
    del server
    for _ in range(5):
        alone.at(1, "x")
        alone.beat(waits=False)
        time.sleep(0.02)
    alone.fail("ValueError: boom")
    assert alone.look() == {}
    assert not alone.another_failed()
