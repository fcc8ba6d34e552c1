from __future__ import annotations

import sys

from lightkit.distributed import told
from lightkit.errors import ConfigError, PeerError


def test_errors_of_others_end_with_one_line(monkeypatch, capsys) -> None:
    shown, failed = [], []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(error))
    told.install(2, failed.append)
    own = ValueError("boom")
    peer = PeerError("rank 2 waited in 'x': rank 1 ended with ValueError: boom")
    other, marked = PeerError("rank 0 ended with Odd: 3"), told.mark(ConfigError("wrong"))
    for error in (own, peer, other, marked):
        sys.excepthook(type(error), error, None)
    assert shown == [own]
    assert failed == [own, peer, other, marked]
    assert capsys.readouterr().err.splitlines() == [
        "rank 2 waited in 'x': rank 1 ended with ValueError: boom",
        "rank 2: rank 0 ended with Odd: 3",
        "rank 2 ended with rank 0: ConfigError",
    ]
    assert not told.is_rank_zeros(peer)
    assert told.is_rank_zeros(marked)


def test_an_error_in_a_line() -> None:
    assert told.in_a_line(ValueError("boom")) == "ValueError: boom"
    assert told.in_a_line(ValueError("a\nb\n  c")) == "ValueError: a ... c"
    assert len(told.in_a_line(ValueError("x" * 5000))) <= 300
