"""Writes what the templates' READMEs call your own data, small, and made by a fixed seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write(name: str, folder: Path) -> None:
    """Writes the files that the README of a template has under "With your own data"."""
    chance = np.random.default_rng(0)
    if name == "digits":
        for kind in ("cat", "dog"):
            pictures(folder / "pictures" / kind, 20, chance)
    elif name in ("gan", "vae"):
        pictures(folder / "pictures", 60, chance)
    elif name == "segmentation":
        pictures(folder / "pictures", 24, chance)
        pictures(folder / "masks", 24, chance)
    elif name == "tabular":
        rows = [
            f"{chance.normal():.3f},{'land' if chance.random() < 0.5 else 'sea'},"
            f"{chance.integers(1, 9)},1.5,{species}"
            for species in ("bear", "seal", "wolf")
            for _ in range(30)
        ]
        lines = ["weight,home,age,constant,species", *rows, "0.2,,3,1.5,bear"]
        (folder / "animals.csv").write_text("\n".join(lines), encoding="utf-8")
    elif name == "recurrent":
        lines = [
            f"{kind}\t{'ü'.join(word for _ in range(chance.integers(1, 200)))}"
            for kind, word in (("mail", "hello "), ("spam", "win now! "))
            for _ in range(40)
        ]
        (folder / "messages.tsv").write_text("\n".join([*lines, "spam\t"]), encoding="utf-8")
    elif name == "language_model":
        (folder / "books").mkdir()
        for file in ("books/1.txt", "books/2.txt", "books/3.txt", "shakespeare.txt"):
            (folder / file).write_text("To be, or not to bé.\n" * 400, encoding="utf-8")


def pictures(folder: Path, count: int, chance: np.random.Generator) -> None:
    """Writes colour pictures of chance, of 40 x 50 pixels."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        pixels = chance.integers(0, 256, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
