"""What torch's compiler says in many lines, in one."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightkit.compile_report import Report, frames_in, summary, user_line

TORCH = f"{torch.__path__[0]}/nn/modules/module.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Failed to trace\n  Explanation: It cannot be.\n  Hint: Do not.\n\n  Developer debug x",
            "Failed to trace: It cannot be",
        ),
        (
            "0/3: tensor 'x' size mismatch. expected 4, actual 2\nUser stack trace:\n  File ...",
            "tensor 'x' size mismatch. expected 4, actual 2",
        ),
        ("0/0: step == 0      # if step:  # net.py:3 in f", "step == 0"),
        ("generic_jump TensorVariable()", "an if or while that depends on the value of a tensor"),
        (
            "backend='b' raised:\nRuntimeError: no\n\nSet X=1",
            "backend='b' raised: RuntimeError: no",
        ),
        ("a" * 500, "a" * 240 + " ..."),
        (
            f"Fails\n  Explanation: with fake tensors: call_{'a' * 240}(*()): got E('3 and 4')\n  Hint:",
            "E('3 and 4')",
        ),
        (
            f"Failed running call_module {'a' * 240}(*()):\nsizes 3 and 4\n\nfrom user code:",
            "sizes 3 and 4",
        ),
    ],
)
def test_summary(text, words):
    assert summary(text) == words


def test_the_line_of_the_user_is_the_innermost_of_his_own():
    here = str(Path.cwd() / "net.py")
    assert user_line([("/far/main.py", 1), (here, 7), (TORCH, 5)]) == "net.py:7"
    assert user_line([("/far/main.py", 1)]) == "/far/main.py:1"
    assert user_line([(TORCH, 5)]) == f"{TORCH}:5"  # better than nothing
    assert user_line([]) == ""


def test_frames_in_a_text():
    text = 'from user code:\n   File "/a/b.py", line 3, in f\n    x\n  File "c.py", line 12, in g'
    assert frames_in(text) == [("/a/b.py", 3), ("c.py", 12)]


def record(name="step", **fields):
    usual = {
        "co_name": name,
        "co_filename": "/a/net.py",
        "co_firstlineno": 3,
        "entire_frame_compile_time_s": 1.0,
        "fail_reason": None,
        "fail_user_frame_filename": None,
        "fail_user_frame_lineno": None,
    }
    return SimpleNamespace(**usual | fields)


class Dynamo:
    """Stands for torch._dynamo.utils, of an old version unless it is given more."""

    def __init__(self):
        self.counters, self.records = defaultdict(Counter), []

    def get_compilation_metrics(self):
        return self.records

    def compile(self, *records):
        self.counters["frames"]["total"] += 1
        self.records += records


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="lightkit")

    def say(report):
        caplog.clear()
        assert report.is_due()
        report.say()
        assert not report.is_due()
        return [r.getMessage() for r in caplog.records]

    return say


def made(dynamo):
    report = Report()
    report._dynamo = dynamo
    return report


def test_older_versions_of_torch_give_no_reasons(told):
    dynamo = Dynamo()
    report = made(dynamo)
    dynamo.compile(record(), record())
    assert told(report) == ["compiled step (/a/net.py:3) in 2.0 s"]
    dynamo.compile(record("other"))
    assert told(report) == ["compiled other (/a/net.py:3) in 1.0 s"]


def test_what_follows_a_graph_break_is_a_part_of_its_function(told):
    dynamo = Dynamo()
    dynamo.graph_break_reasons = []
    report = made(dynamo)
    dynamo.compile(record(), record("torch_dynamo_resume_in_step_at_9", co_firstlineno=9))
    stack = [SimpleNamespace(filename="/a/net.py", lineno=9)]
    dynamo.graph_break_reasons += [SimpleNamespace(reason="print", user_stack=stack)] * 2
    assert told(report) == [
        "compiled step (/a/net.py:3) in 2.0 s",
        "graph break at /a/net.py:9: print",
    ]
    dynamo.graph_break_reasons.clear()  # by somebody else
    dynamo.compile()
    assert told(report) == []


def test_recompilations(told):
    dynamo = Dynamo()
    report = made(dynamo)
    dynamo.compile(*[record(recompile_reason=f"0/{i}: n == {i}") for i in range(5)])
    lines = told(report)
    assert len(lines) == 3
    assert lines[0] == "compiled step again in 1.0 s, at /a/net.py:3: n == 0"
    assert lines[2].endswith('n == 2. Later ones are not shown; TORCH_LOGS="recompiles" shows all')
    limit = {"co_name": None, "fail_reason": "Dynamo recompile limit", "recompile_reason": "n == 7"}
    dynamo.compile(record(**limit), record(**limit))
    (line,) = told(report)
    assert line.startswith("step was compiled as often as torch allows")
    assert line.endswith("The last: n == 7")


def test_functions_that_stay_uncompiled(told):
    dynamo = Dynamo()
    report = made(dynamo)
    where = {"fail_user_frame_filename": "/a/net.py", "fail_user_frame_lineno": 5}
    dynamo.compile(
        record(fail_reason="Failed to trace\n  Explanation: It cannot be.", **where),
        record("own", fail_reason="Observed exception\n  Explanation: ValueError"),
    )
    assert told(report) == [
        "step is not compiled, because of /a/net.py:5: Failed to trace: It cannot be"
    ]
