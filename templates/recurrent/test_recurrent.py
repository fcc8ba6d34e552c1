"""Run with ``pytest`` in this folder."""

from pathlib import Path

import torch
from data import SyllableData, collate, encode
from model import RecurrentNet

import lightkit as lk


def test_collate_pads() -> None:
    letters, lengths, labels = collate([(encode("AB"), 2), (encode("ZEBRA"), 3)])
    assert letters.tolist() == [[1, 2, 0, 0, 0], [26, 5, 2, 18, 1]]
    assert lengths == [2, 5]
    assert labels.tolist() == [2, 3]


def test_the_padding_changes_nothing() -> None:
    net = RecurrentNet().eval()
    names = [(encode(name), 0) for name in ("GGWALB", "IT", "NZUOP")]
    together = net(*collate(names)[:2])
    alone = torch.cat([net(*collate([name])[:2]) for name in names])
    assert torch.allclose(together, alone, atol=1e-6)


def test_no_name_is_in_two_splits() -> None:
    data = SyllableData()
    data.setup("fit")
    splits = [
        {tuple(name.tolist()) for name, _ in split} for split in (data.train, data.val, data.test)
    ]
    assert sum(map(len, splits)) == len(set.union(*splits))


def test_learns(tmp_path: Path) -> None:
    trainer = lk.Trainer(seed=0, max_epochs=3, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(RecurrentNet(), datamodule=SyllableData())
    assert trainer.callback_metrics["val_accuracy"] > 0.9
