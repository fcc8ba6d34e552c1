"""Runs a program in a pseudo-terminal and tells what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

_TOKEN = re.compile(r"\x1b\[(\d*)([AJK])|\x1b\[[\d;]*m|.", re.DOTALL)


def render(raw: str, columns: int = 80, *, colors: bool = False) -> list[str]:
    """The lines that a terminal of this width, without end, shows after ``raw``.

    With ``colors`` the command of its color stands around each character that has one.
    """
    lines: list[list[str]] = [[]]
    row = column = 0
    color = ""
    for token in _TOKEN.finditer(raw):
        number, command = token.group(1), token.group(2)
        text = token.group()
        if command == "A":
            row = max(0, row - int(number or 1))
        elif command == "J":
            del lines[row][column:], lines[row + 1 :]
        elif command == "K":
            del lines[row][column:]
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
        elif text.startswith("\x1b"):
            assert text.endswith("m"), f"unknown command {text!r}"
            color = text if colors and text != "\x1b[0m" else ""
        else:
            if column == columns:
                row, column = row + 1, 0
            while len(lines) <= row:
                lines.append([])
            lines[row] += [" "] * (column - len(lines[row]))
            lines[row][column : column + 1] = [f"{color}{text}\x1b[0m" if color else text]
            column += 1
        while len(lines) <= row:
            lines.append([])
    return ["".join(line).rstrip() for line in lines]


def run(code: str, *, columns: int = 80, keys=(), env=None, timeout: float = 60.0):
    """Runs Python code in a pseudo-terminal.

    Args:
        code: The program.
        columns: Width of the terminal.
        keys: Pairs (text, bytes): what is typed once the text has been seen after the last key.
        env: Environment variables to set (None as value: unset).
        timeout: Seconds after which the program is killed.

    Returns:
        The exit status and all output as text.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(env),
        start_new_session=True,
        preexec_fn=_make_interruptible,
    )
    os.close(theirs)
    seen, in_time = converse(ours, lambda: process.poll() is not None, keys, timeout)
    if not in_time:
        process.kill()
    status = process.wait()
    os.close(ours)
    assert in_time, f"still running after {timeout} s; it wrote:\n{seen}"
    return status, seen


def converse(ours: int, gone, keys=(), timeout: float = 60.0) -> tuple[str, bool]:
    """Reads what a program writes to its terminal, and types.

    Args:
        ours: Our side of the terminal.
        gone: Tells whether the program has ended.
        keys: As in `run`.
        timeout: Seconds to go on for.

    Returns:
        All output as text, and whether the program ended in time.
    """
    seen, mark, waiting = "", 0, list(keys)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if not select.select([ours], [], [], 0.1)[0]:
            if gone():
                return seen, True
            continue
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other side is closed
            return seen, True
        if not data:
            return seen, True
        seen += data.decode(errors="replace").replace("\r\n", "\n")
        if waiting and waiting[0][0] in seen[mark:]:
            mark = len(seen)
            os.write(ours, waiting.pop(0)[1])
    return seen, False


def enter(terminal: str) -> None:
    """Moves this process, a fork that leads no group yet, onto a terminal of its own."""
    os.setsid()
    theirs = os.open(terminal, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(theirs, target)
    _make_interruptible()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TERM"] = "xterm-256color"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)


def _make_interruptible() -> None:
    """Makes Ctrl-C a signal that is heard: what a shell starts in the background ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_in_pipe(code: str, env=None, timeout: float = 60.0):
    """The same with a pipe instead of a terminal; stderr goes into it too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(env),
        timeout=timeout,
    )
    return done.returncode, done.stdout


def environment(changes):
    """A terminal with colors, whatever this test runs in."""
    env = dict(os.environ, TERM="xterm-256color", OMP_NUM_THREADS="1")
    for name in (
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
        "LINES",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
    ):
        env.pop(name, None)
    for name, value in (changes or {}).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    return env
