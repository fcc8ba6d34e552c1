"""Run with ``pytest`` in this folder."""

import sys
from pathlib import Path

import pytest
import torch
from data import Photos, SomeDigits
from model import PhotoNet, TransferNet

import lightkit as lk


def trainer(folder: Path, **options) -> lk.Trainer:
    return lk.Trainer(seed=0, accelerator="cpu", default_root_dir=folder, **options)


def test_labels_are_places_in_the_list_of_digits() -> None:
    data = SomeDigits(digits=[8, 3], samples=10)
    data.setup("fit")
    assert len(data.train) == 10
    assert set(data.val.labels.tolist()) == {0, 1}


def test_a_backbone_with_weights_rests_until_its_epoch(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_epochs=1)
    first.fit(TransferNet(classes=2), datamodule=SomeDigits([0, 1]))
    weights = first.checkpoint_callback.best_model_path
    before = torch.load(weights, weights_only=True)["model"]

    data = SomeDigits([2, 3, 4], samples=16, num_workers=1)
    task = TransferNet(classes=3, weights=weights, unfreeze_at=2)
    trainer(tmp_path, max_epochs=2).fit(task, datamodule=data)
    assert lk.is_frozen(task.backbone)
    for name, value in task.backbone.state_dict().items():
        assert torch.equal(value, before[f"backbone.{name}"])  # batch norms too

    trainer(tmp_path, max_epochs=3).fit(task, datamodule=data)
    assert not lk.is_frozen(task.backbone)


def test_learns(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=5)
    run.fit(TransferNet(classes=5), datamodule=SomeDigits([5, 6, 7, 8, 9]))
    assert run.callback_metrics["val_accuracy"] > 0.9


def test_photos_of_two_classes(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image  # comes with torchvision

    for part in ("train", "val"):
        for name, colour in (("cat", "red"), ("dog", "blue")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 50), colour).save(tmp_path / part / name / f"{number}.png")
    task = PhotoNet(classes=2, weights=None)
    task.weights = "as if there were some"
    photos = Photos(str(tmp_path), size=32, batch_size=4, num_workers=0)
    trainer(tmp_path, max_epochs=1).fit(task, datamodule=photos)
    assert photos.train.classes == ["cat", "dog"]
    assert lk.is_frozen(task.backbone)
    assert task.head.weight.requires_grad

    (tmp_path / "val" / "bird").mkdir()
    Image.new("RGB", (40, 50), "white").save(tmp_path / "val" / "bird" / "0.png")
    with pytest.raises(ValueError, match="other classes in val"):
        photos.setup("fit")


def test_what_photos_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(ImportError, match="pip install torchvision"):
        Photos("photos").setup("fit")
    with pytest.raises(ImportError, match="pip install torchvision"):
        PhotoNet()
