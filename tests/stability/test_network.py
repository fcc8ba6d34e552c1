"""In one process nothing of lightkit talks to a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Audit events of a program that looks for another machine, calls it or waits for its call.
EVENTS = ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr",
          "socket.gethostbyname", "socket.sendto", "urllib.Request")  # fmt: skip
CODE = f"""
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in {EVENTS} else None)
import torch, lightkit as lk
from torch.utils.data import TensorDataset
x = torch.randn(24, 4)
data = TensorDataset(x, x.sum(1, keepdim=True))
history = lk.fit(torch.nn.Linear(4, 1), data, data, loss="mse", metrics=["r2_score"], epochs=2)
assert list(history.folder.glob("events.out.tfevents.*"))  # with TensorBoard and checkpoints
task = lk.SupervisedTask(torch.nn.Linear(4, 1), loss="mse")
task.load_weights(history.folder / "checkpoints" / "best.ckpt")
during = list(seen)
import socket
with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
assert len(seen) == len(during) + 1  # it is looking
print("seen:", during)
"""


def test_a_fit_with_its_defaults(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "seen: []"
