"""A file that would run code when it is unpickled without care never does, wherever it is given."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest
import torch

import lightkit as lk
from lightkit import cli
from lightkit.callbacks import ModelCheckpoint
from lightkit.checkpoint import is_valid, latest
from lightkit.errors import CheckpointError
from tests.small import Net, loader


class Evil:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def trainer(folder: pathlib.Path, **options) -> lk.Trainer:
    return lk.Trainer(
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **{"max_epochs": 1} | options,
    )


@pytest.fixture
def marker(tmp_path) -> pathlib.Path:
    return tmp_path / "executed"


@pytest.fixture
def run(tmp_path) -> lk.Trainer:
    t = trainer(tmp_path / "runs")
    t.fit(Net(), loader(), loader())
    return t


@pytest.fixture
def evil(tmp_path, run, marker) -> pathlib.Path:
    """A real checkpoint, with something of the attacker's in it."""
    contents = torch.load(run.checkpoint_callback.last_model_path, weights_only=True)
    contents["loop"]["global_step"] = 10**6  # newer than all others
    contents["lightkit"]["global_step"] = 10**6
    path = tmp_path / "evil.ckpt"
    torch.save(contents | {"extra": Evil(marker)}, path)
    return path


ENTRIES = {
    "fit": lambda t, path: t.fit(Net(), loader(), ckpt_path=path),
    "validate": lambda t, path: t.validate(Net(), loader(), ckpt_path=path),
    "test": lambda t, path: t.test(Net(), loader(), ckpt_path=path),
    "predict": lambda t, path: t.predict(Net(), loader(), ckpt_path=path),
    "load_from_checkpoint": lambda t, path: Net.load_from_checkpoint(path),
    "load_weights": lambda t, path: Net().load_weights(path),
    "load_weights, not strict": lambda t, path: Net().load_weights(path, strict=False),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_named_explicitly(tmp_path, evil, marker, entry):
    with pytest.raises(CheckpointError, match=r"mkdir.*nothing was executed"):
        ENTRIES[entry](trainer(tmp_path / "other"), evil)
    assert not marker.exists()


def test_the_attack_is_real(evil, marker):
    torch.load(evil, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["step_999999.ckpt", "last.ckpt"])
def test_among_the_files_of_a_folder_it_is_passed_over(run, evil, marker, caplog, name):
    folder = run.run_dir / "checkpoints"
    good = latest(folder)
    (folder / name).unlink(missing_ok=True)
    shutil.copy(evil, folder / name)
    assert latest(folder) == good
    assert name in caplog.text
    is_valid(folder / name)
    assert not marker.exists()


@pytest.mark.parametrize("given", ["last", "auto"])
def test_by_a_word_for_the_newest(tmp_path, run, evil, marker, given):
    folder = run.run_dir / "checkpoints"
    (folder / "last.ckpt").unlink()
    shutil.copy(evil, folder / "last.ckpt")
    shutil.copy(evil, folder / "step_999999.ckpt")
    t = trainer(tmp_path / "runs", max_epochs=2)
    t.fit(Net(), loader(), loader(), ckpt_path=given)
    assert t.global_step == 10
    assert not marker.exists()


def test_as_the_best_of_a_run(tmp_path, run, evil, marker):
    folder = run.run_dir / "checkpoints"
    (folder / "best.ckpt").unlink()
    shutil.copy(evil, folder / "best.ckpt")
    with pytest.raises(CheckpointError, match="nothing was executed"):
        trainer(tmp_path / "runs").test(Net(), loader(), ckpt_path="best")
    saver = ModelCheckpoint(monitor="val_loss", restore_best=True)
    saver_path = tmp_path / "b"
    t = trainer(saver_path, callbacks=[saver, Swap(evil)])
    with pytest.raises(CheckpointError, match="nothing was executed"):
        t.fit(Net(), loader(), loader())
    assert not marker.exists()


class Swap(lk.Callback):
    """Puts another file in the place of the best one before it is restored."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def on_train_end(self, trainer, task):
        shutil.copy(self.path, trainer.checkpoint_callback.best_model_path)


def test_by_the_command(tmp_path, evil, marker, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from tests.small import Net, loader\n"
        "import lightkit as lk\n"
        "class Data(lk.DataModule):\n"
        "    def train_dataloader(self): return loader()\n"
        "    def val_dataloader(self): return loader()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {"task": {"class_path": "mine.Net"}, "data": {"class_path": "mine.Data"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    arguments = ["fit", "--config", "config.yaml", "--ckpt_path", str(evil)]
    code = cli.main(arguments)
    assert code not in (0, None)
    output = capsys.readouterr()
    assert "nothing was executed" in output.out + output.err
    assert not marker.exists()
