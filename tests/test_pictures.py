"""The pictures of the documentation: there, small, asking no other host, and made by the script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.browser.chromium import CHROMIUM

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("templates/*/*.md")))


def named_pictures() -> dict[Path, Path]:
    """Returns the pictures of this repository that pages show, with a page of each."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"!\[[^\]]+\]\(([^)\s]+)|<img [^>]*src=\"([^\"]+)", text):
            if "://" not in "".join(name):
                found[(page.parent / "".join(name)).resolve()] = page
    return found


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))


def test_every_picture_that_a_page_shows_is_there_and_each_is_shown():
    named = named_pictures()
    assert {page for path, page in named.items() if not path.is_file()} == set()
    assert set(PICTURES.iterdir()) <= set(named)


@pytest.mark.parametrize("path", sorted(PICTURES.iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_and_loads_nothing(path):
    data = path.read_bytes()
    assert 2_000 < len(data) < 200_000
    if path.suffix == ".svg":
        assert not re.search(rb"@import|@font-face|<script|<image|href|url\((?!#)", data)


def test_the_terminal_is_drawn_with_its_colors_as_it_stood_amid_an_epoch(script):
    def bar(done):
        return f"\r\x1b[K\nEpoch  7/12 \x1b[38;5;197m━━\x1b[0m  {done}/40  9.0 it/s\x1b[J\x1b[1A\r"

    raw = "device: <cpu>\n" + bar(1) + bar(20) + bar(39) + "\x1b[J   7/12  0.5\n"
    shown = script["while_training"](raw)
    assert shown.endswith(bar(20))
    svg = script["terminal"](shown).replace("&#160;", " ")
    for text in ("$ lightkit fit --config config.yaml", "device: &lt;cpu&gt;", "  20/40"):
        assert f">{text}" in svg
    assert "39/40" not in svg
    assert svg.count("━") == 2
    assert "#ff005f" in svg  # color 197


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium")
def test_the_script_makes_all_of_them(script, tmp_path):
    script["main"](tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in PICTURES.iterdir()}
    assert (tmp_path / "history.png").stat().st_size > 20_000
    assert (tmp_path / "tensorboard.png").stat().st_size > 50_000
    svg = (tmp_path / "terminal.svg").read_text().replace("&#160;", " ")
    for text in ("runs/DigitsNet/version_0", "15,418 parameters", "epoch  train_loss  val_loss"):
        assert text in svg
