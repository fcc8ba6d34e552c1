"""A page in headless Chromium, driven through its debugging pipe: no package is needed.

And TensorBoard, which serves the pages.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
#: Every element, those in shadow trees too.
ALL = """
const all = [];
const walk = root => root.querySelectorAll('*').forEach(e => {
    all.push(e);
    if (e.shadowRoot) walk(e.shadowRoot);
});
walk(document);
"""
#: The points of each curve on TensorBoard's page, once all are drawn: three pictures, two runs, each
#: raw and smoothed, of which some may be below the edge of the window and not drawn yet.
CURVES = """
const points = all.filter(e => e.tagName === 'path' && getComputedStyle(e).stroke.startsWith('rgb')
                       && getComputedStyle(e).fill === 'none')
          .map(e => (e.getAttribute('d').match(/L/g) || []).length + 1).filter(n => n > 3);
return points.length >= 6 ? points : null;
"""


class Page:
    """One tab.

    Args:
        folder: An empty folder for the browser's profile.
    """

    def __init__(self, folder: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def connect() -> None:  # the browser reads from 3 and writes to 4
            moved = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(moved[0], 3)
            os.dup2(moved[1], 4)

        self._process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-pipe"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str):
        """The value of a JavaScript function body; ``all`` holds every element."""
        done = self._call(
            "Runtime.evaluate", expression=f"(() => {{{ALL}{script}}})()", returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str, timeout: float = 30.0):
        """Waits until the value is truthy and returns it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):
                if value := self.evaluate(script):
                    return value
            time.sleep(0.2)
        raise AssertionError(f"did not come within {timeout} s: {script}")

    def screenshot(self, path: Path, **clip: float) -> bytes:
        """What is in the window, or in the part of it from x and y with width, height, scale."""
        part = {"clip": clip} if clip else {}
        data = base64.b64decode(self._call("Page.captureScreenshot", format="png", **part)["data"])
        path.write_bytes(data)
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _call(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], 30)[0], "Chromium does not answer"
            data = os.read(self._in, 1 << 16)
            assert data, "Chromium has ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Runs TensorBoard on a free port of this machine; gives its address."""
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)),
            *("--host", "127.0.0.1", "--port", "0", "--load_fast", "false"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(server.stdout.readline, "")
        yield next(found.group() for line in lines if (found := re.search(r"http://\S+/", line)))
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
