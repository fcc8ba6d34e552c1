"""A warm process that forks lives: importing torch takes seconds, a fork takes milliseconds.

It imports everything once, with one thread and nothing computed, so that a fork is as good as a new
process. One request is a line of JSON ``{"call": "module:function", "arguments": {...}, "log":
path}``; it answers with a line holding the process id and, when that has ended, one with its status.
"""
# ruff: noqa: F401

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil

import torch._dynamo  # the first optimizer imports it, which takes a second
import torch.utils.tensorboard

import lightkit
import tests.faults.victim


def serve() -> None:
    """Answers requests until the pipe is closed. A forked life returns from here and exits."""
    for module in pkgutil.walk_packages(lightkit.__path__, "lightkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    gc.freeze()
    while request := _line():
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: a fork would not be a whole process"
        pid = os.fork()
        if pid == 0:
            _live(request)
            return
        _say(pid)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _line() -> dict:
    data = b""
    while not data.endswith(b"\n"):
        more = os.read(0, 1)  # unbuffered: a life must not take what is meant for its parent
        if not more:
            return {}
        data += more
    return json.loads(data)


def _say(number: int) -> None:
    os.write(1, f"{number}\n".encode())


def _live(request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    module, _, function = request["call"].partition(":")
    getattr(importlib.import_module(module), function)(request["arguments"])


if __name__ == "__main__":
    serve()
