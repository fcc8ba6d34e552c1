"""Files of earlier versions stay readable; ``tests/fixtures/format_1/generate.py`` made them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from lightkit.checkpoint import latest, read_checkpoint
from lightkit.errors import CheckpointError
from tests.fixtures.format_1 import generate

FOLDER = Path(__file__).parents[1] / "fixtures" / "format_1"


@pytest.fixture
def old(tmp_path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    for path in FOLDER.glob("*.ckpt"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", ["within_an_epoch", "end_of_an_epoch"])
def test_a_run_goes_on_to_the_same_end(tmp_path, old, name):
    t, task = generate.trainer(tmp_path / "runs"), generate.Net()
    torch.manual_seed(99)
    t.fit(task, *generate.loaders(), ckpt_path=old / f"{name}.ckpt")
    assert (t.global_step, t.current_epoch) == (30, 3)
    end = torch.load(FOLDER / "end.pt", weights_only=True)
    for key, value in task.state_dict().items():
        torch.testing.assert_close(
            value, end[key], msg=key
        )  # other builds of torch round otherwise
    assert [row["epoch"] for row in t.history] == [1, 2, 3]
    assert t.checkpoint_callback.best_model_score is not None


def test_the_newest_of_them_is_found_with_and_without_a_run(old):
    newest = old / "end_of_an_epoch.ckpt"
    assert latest(old) == latest(old, run="any") == newest


def test_a_task_and_weights_come_out_of_each(old):
    for path in sorted(old.glob("*.ckpt")):
        task = generate.Net.load_from_checkpoint(path)
        assert task.hparams.lr == 0.05
        other = generate.Net()
        other.load_weights(path)
        for one, same in zip(task.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, same)


def test_weights_alone_are_no_run(tmp_path, old):
    t = generate.trainer(tmp_path)
    with pytest.raises(CheckpointError, match="holds weights only"):
        t.fit(generate.Net(), *generate.loaders(), ckpt_path=old / "weights_only.ckpt")


def test_an_evaluation_takes_its_weights(tmp_path, old, caplog):
    t = generate.trainer(tmp_path)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        (row,) = t.validate(
            generate.Net(), generate.loaders()[1], ckpt_path=old / "within_an_epoch.ckpt"
        )
    assert row["val_loss"] > 0
    assert not caplog.records


def test_it_is_what_the_first_version_wrote():
    file = read_checkpoint(FOLDER / "within_an_epoch.ckpt")
    assert file["lightkit"].keys() == {"format", "version", "epoch", "global_step"}
    assert not {"loggers", "flow"} & file.keys()
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 100_000
