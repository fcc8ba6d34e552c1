from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from lightkit import console


@pytest.fixture
def log(monkeypatch):
    """The logger as it is before anything is installed, put back afterwards."""
    logger = logging.getLogger("lightkit")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    yield logger
    logger.setLevel(level)
    logger.propagate = propagate


def test_info_is_plain_and_what_is_above_it_says_so(log, capsys):
    console.install()
    log.debug("not shown")
    log.info("GPU: %s", "none")
    log.warning("slow")
    log.error("broken")
    out, err = capsys.readouterr()
    assert out == "GPU: none\nwarning: slow\nerror: broken\n"
    assert err == ""


def test_installing_again_shows_nothing_twice(log, capsys):
    for _ in range(3):
        console.install()
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_the_stream_is_looked_up_for_each_line(log, monkeypatch):
    console.install()
    for _ in range(2):
        out = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        log.info("here")
        assert out.getvalue() == "here\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_warnings_are_colored_on_a_terminal_that_shows_colors(log, monkeypatch, env, colored):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **env}.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    console.install()
    log.warning("slow")
    log.info("plain")
    first = "\x1b[33mwarning: slow\x1b[0m\n" if colored else "warning: slow\n"
    assert out.getvalue() == first + "plain\n"


def test_long_lines_are_broken_between_words_on_a_terminal_alone(log, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    console.install()
    log.warning("more words than have room")
    assert capsys.readouterr().out == "warning: more words than have room\n"
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    log.warning("more words than have room")
    log.info("resume:   lightkit fit --config a", extra={"command": True})
    assert out.getvalue().splitlines() == [
        "warning: more words than",
        "         have room",
        "resume:   lightkit fit \\",
        "          --config a",
    ]


def test_handlers_of_the_user_are_enough(log, capsys):
    mine = io.StringIO()
    log.addHandler(logging.StreamHandler(mine))
    console.install()
    log.warning("slow")
    assert mine.getvalue() == "slow\n"
    assert capsys.readouterr().out == ""


def test_a_root_logger_that_shows_info_is_enough(log, capsys):
    logging.root.addHandler(logging.StreamHandler(sys.stderr))
    logging.root.level = logging.INFO
    console.install()
    log.info("once")
    assert capsys.readouterr() == ("", "once\n")


def test_a_root_logger_that_hides_info_does_not_show_warnings_twice(log, capsys):
    logging.root.addHandler(logging.StreamHandler(sys.stderr))
    console.install()
    log.info("told")
    log.warning("slow")
    assert capsys.readouterr() == ("told\nwarning: slow\n", "")


def test_a_level_set_by_the_user_stays(log, capsys):
    log.setLevel(logging.ERROR)
    console.install()
    log.warning("slow")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("root", [False, True])
def test_other_ranks_show_errors_alone_with_their_number(log, capsys, root):
    if root:  # shows everything, on all ranks
        logging.root.addHandler(logging.StreamHandler(sys.stderr))
        logging.root.level = logging.INFO
    console.install(rank=3)
    log.info("a")
    log.warning("b")
    log.error("broken")
    assert capsys.readouterr() == ("rank 3: error: broken\n", "")


def test_a_closed_pipe_raises_nothing(log, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    console.install()
    log.info("lost")
    monkeypatch.setattr(sys, "stdout", None)
    log.info("no console at all")


def test_importing_installs_nothing_and_imports_no_rich():
    code = (
        "import logging, sys, lightkit.console\n"
        "assert not logging.getLogger('lightkit').handlers\n"
        "lightkit.console.install()\n"
        "logging.getLogger('lightkit').warning('said')\n"
        "assert 'rich' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "warning: said\n", "")
