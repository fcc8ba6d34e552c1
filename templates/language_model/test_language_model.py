"""Run with ``pytest`` in this folder."""

from pathlib import Path

import pytest
import torch
from data import SourceCode
from generate import main
from model import LanguageModel

import lightkit as lk


def test_no_character_sees_what_comes_after_it() -> None:
    task = LanguageModel()
    text = torch.randint(128, (1, 20))
    other = text.clone()
    other[0, 12] = (text[0, 12] + 1) % 128
    changed = (task(text) - task(other)).abs().amax(dim=2)[0]
    assert changed[:12].max() == 0
    assert changed[12:].min() > 0


def test_windows_follow_each_other(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("abcdefghij" * 10)
    data = SourceCode(str(tmp_path), "*.txt", characters=200, context=8)
    data.setup("fit")
    assert bytes(data.train[0].tolist()) == b"abcdefghi"
    assert bytes(data.train[1].tolist()) == b"ijabcdefg"


@pytest.mark.parametrize("files", [1, 3, 40])
def test_a_text_that_is_short_has_all_parts(files: int, tmp_path: Path) -> None:
    for number in range(files):
        (tmp_path / f"{number}.txt").write_bytes(b"\xe4 short text. " * (600 // files))
    data = SourceCode(str(tmp_path), "*.txt", context=8)
    data.setup("fit")
    train, val, test = (len(part.text) for part in (data.train, data.val, data.test))
    assert val == test == 840
    assert train >= 2 * val


def test_only_matrices_decay(tmp_path: Path) -> None:
    trainer = lk.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(LanguageModel(), datamodule=SourceCode(characters=20_000))
    decaying, free = trainer.optimizers[0].param_groups
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_learns_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(LanguageModel(width=32), datamodule=SourceCode(characters=100_000))
    assert trainer.callback_metrics["val_bits"] < 4.5  # what the frequencies of characters give

    checkpoint = trainer.checkpoint_callback.best_model_path
    capsys.readouterr()  # what the fit said
    main(checkpoint, "import ")
    written = capsys.readouterr().out
    assert len(written) == len("import ") + 500 + 1
    # The same text every time: what is drawn for it has a seed of its own.
    main(checkpoint, "import ")
    assert written == capsys.readouterr().out
