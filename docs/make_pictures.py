"""Makes the pictures of the documentation: ``python docs/make_pictures.py [folder]``.

They are of real runs of the digits template, in a project as ``lightkit new`` makes it: the
terminal while it trains, the plot of a history, and TensorBoard's page of two runs. Without Chromium (Debian's package ``chromium``) the page of TensorBoard stays as it is.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser.chromium import CHROMIUM, CURVES, Page, tensorboard  # noqa: E402
from tests.pseudo_terminal import render, run  # noqa: E402

COLUMNS = 80
COMMAND = "lightkit fit --config config.yaml"
#: What the command above does, in a process that this script can start anywhere.
FIT = "import sys; from lightkit.cli import main; sys.exit(main({arguments!r}))"
#: Two runs of the same network, for TensorBoard.
OTHER_RATE = ("--task.lr", "0.002")
#: On TensorBoard's page: away with the settings, and whether the three pictures stand in a row then.
CLOSE_SETTINGS = (
    "all.find(e => e.matches('button') && /Settings$/.test(e.textContent.trim())).click();"
)
WIDE = """
const tops = all.filter(e => e.tagName === 'SCALAR-CARD').map(e => e.getBoundingClientRect().top);
return tops.length === 3 && new Set(tops).size === 1;
"""


def main(folder: Path) -> None:
    """Writes all pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        project = Path(work) / "my-project"
        lightkit(Path(work), "new", "digits", "my-project")
        raw = lightkit(project, *COMMAND.split()[1:])
        (folder / "terminal.svg").write_text(terminal(while_training(raw)))
        plot_history(project, folder / "history.png")
        lightkit(project, *COMMAND.split()[1:], *OTHER_RATE)
        if CHROMIUM.exists():
            photograph_tensorboard(project / "runs", Path(work), folder / "tensorboard.png")


def lightkit(where: Path, *arguments: str) -> str:
    """Runs the command line in a pseudo-terminal; returns what it wrote."""
    before = Path.cwd()
    os.chdir(where)
    try:
        status, raw = run(FIT.format(arguments=list(arguments)), columns=COLUMNS)
    finally:
        os.chdir(before)
    assert status == 0, raw
    return raw


def while_training(raw: str) -> str:
    """Returns what was written until a bar amid one of the later epochs stood on the screen."""
    bar = re.compile(r"Epoch +(\d+)/\d+ [^\n]* (\d+)/(\d+)  [^\n]*\x1b\[J\x1b\[1A\r")
    found = [[*map(int, match.groups()), match.end()] for match in bar.finditer(raw)]
    return raw[: next(end for epoch, n, of, end in found if epoch > 6 and 0.3 < n / of < 0.9)]


def terminal(raw: str) -> str:
    """Returns the terminal after ``raw`` as SVG."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False
    )
    lines = [f"\x1b[1m$ {COMMAND}\x1b[0m", *render(raw, COLUMNS, colors=True)]
    for line in "\n".join(lines).rstrip().splitlines():
        console.print(Text.from_ansi(line))
    console.print()  # the picture is cut right below the letters of its last line
    svg = console.export_svg(title="my-project", unique_id="terminal")
    # No request to another host: the reader's own font will do, each word keeps its place.
    svg = re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")


def plot_history(project: Path, path: Path) -> None:
    """Draws the curves of a project's training, by a few lines that a user would write."""
    code = (
        "import sys; sys.path.insert(0, '')\n"
        "import lightkit as lk\n"
        "from data import DigitsData\n"
        "from model import DigitsNet\n"
        "trainer = lk.Trainer(max_epochs=12, seed=0, logger=False, enable_checkpointing=False)\n"
        "trainer.fit(DigitsNet(), datamodule=DigitsData()).plot(sys.argv[1])\n"
    )
    subprocess.run(  # noqa: S603  the lines above
        [sys.executable, "-c", code, str(path.resolve())],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def photograph_tensorboard(runs: Path, work: Path, path: Path) -> None:
    """Takes a picture of TensorBoard's first page, once its curves are drawn."""
    with tensorboard(runs) as address:
        page = Page(work / "profile")
        try:
            page.open(f"{address}?forceSVG=true&tagFilter=loss%7Caccuracy#timeseries")
            page.wait_for(CURVES)
            page.evaluate(CLOSE_SETTINGS)
            page.wait_for(WIDE)
            page.wait_for(CURVES)
            page.screenshot(path, x=0, y=0, width=1400, height=620, scale=1)
        finally:
            page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures")
