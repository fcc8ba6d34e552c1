"""Two machines for tests: two network namespaces, joined by a cable of their own.

Each has its own addresses, its own loopback and its own processes; the file system is one, as a
cluster's shared one is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.harness import begin

INTERFACE = "lk0"  # of the cable, on both machines
PORT = 29431


class Node:
    """One machine.

    Args:
        name: The name of its network namespace.
        address: Its address on the cable.
        first: Whether the machines meet here.
    """

    def __init__(self, name: str, address: str, first: str):
        self.name, self.address, self.first = name, address, first

    def torchrun(
        self, target: str, root: Path, nodes: str, *flags: str, patience: int = 2, **arguments
    ) -> subprocess.Popen[str]:
        """Starts torchrun over ``module:function`` with two processes; arguments are plain types.

        The machines have one host name, that of the real one, so each says what torchrun would
        else find by names: its address, and whether it is the one where the others are awaited.

        Args:
            target: The function.
            root: Where its processes leave what it returns.
            nodes: How many machines take part, as torchrun is told.
            flags: More for torchrun.
            patience: Seconds after which a silent machine counts as gone.
            arguments: Of the function.
        """
        root.mkdir(parents=True, exist_ok=True)
        meeting = f"is_host={int(self.address == self.first)},last_call_timeout=1"
        meeting += f",keep_alive_interval=1,keep_alive_max_attempt={patience}"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-W", "error"]
        command += ["-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=2"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.first}:{PORT}"]
        command += ["--rdzv-id=job", f"--local-addr={self.address}", f"--rdzv-conf={meeting}"]
        command += [*flags, "-m", "tests.distributed.member", target, json.dumps(arguments)]
        # torch 2.13 lets a machine that comes later wait for ever where the store is shared.
        more = {"GLOO_SOCKET_IFNAME": INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return begin([*command, str(root)], more)

    def die(self) -> None:
        """Kills every process of the machine at once."""
        for line in _ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line), signal.SIGKILL)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two() -> Iterator[tuple[Node, Node]]:
    """Makes two machines, and takes them away with all of their processes."""
    mark = uuid.uuid4().hex[:8]
    nodes = [Node(f"lk-{mark}-{i}", f"10.231.7.{i}", "10.231.7.1") for i in (1, 2)]
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        first, second = nodes
        cable = ("link", "add", INTERFACE, "netns", first.name, "type", "veth", "peer", "name")
        _ip(*cable, INTERFACE, "netns", second.name)
        for node in nodes:
            inside = ("-n", node.name)
            _ip(*inside, "addr", "add", f"{node.address}/30", "dev", INTERFACE)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", INTERFACE, "up")
        yield first, second
    finally:
        for node in nodes:
            with contextlib.suppress(OSError):
                node.die()
                _ip("netns", "del", node.name)


@functools.cache
def missing() -> str:
    """Returns why this machine cannot play two; "" where it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    try:
        with two():
            return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no network namespaces can be made here ({error})"
