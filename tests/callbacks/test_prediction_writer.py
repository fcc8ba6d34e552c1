"""Predictions in files; over several ranks see tests/distributed/test_evaluation.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.callbacks import PredictionWriter
from lightkit.errors import CheckpointError, ConfigError


class Double(lk.TaskModule):
    def predict_step(self, batch, batch_idx):
        return {"twice": 2 * batch, "first": batch[:1], "number": batch_idx}


def loader(count=10):
    return DataLoader(torch.arange(float(count)), 2)


def predict(folder, loaders, *, per_file=100, **options):
    writer = PredictionWriter(folder, batches_per_file=per_file)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = lk.Trainer(callbacks=[writer], **quiet | options)
    return trainer.predict(Double(), loaders, return_predictions=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["twice"], other["twice"])
        assert one["number"] == other["number"]


@pytest.mark.parametrize(("per_file", "files"), [(100, 1), (2, 3), (5, 2)])
def test_it_writes_what_predict_would_return(tmp_path, per_file, files):
    assert predict(tmp_path / "out", loader(), per_file=per_file) == []
    assert len(names(tmp_path / "out")) == files
    wanted = lk.Trainer(logger=False, enable_progress_bar=False).predict(Double(), loader())
    same(PredictionWriter.load(tmp_path / "out"), wanted)


def test_several_loaders_are_several_lists(tmp_path):
    predict(tmp_path, [loader(4), loader(6)], per_file=2)
    first, second = PredictionWriter.load(tmp_path)
    assert [len(first), len(second)] == [2, 3]
    assert torch.cat([one["twice"] for one in second]).tolist() == [0, 2, 4, 6, 8, 10]


def test_a_part_of_a_tensor_is_stored_alone(tmp_path):
    predict(tmp_path, DataLoader(torch.zeros(100_000), 100_000))
    (one,) = PredictionWriter.load(tmp_path)
    assert one["first"].untyped_storage().nbytes() == 4


def test_another_prediction_replaces_the_files(tmp_path):
    (tmp_path / "predictions_rank_notes.pt").write_text("of the user")
    predict(tmp_path, loader(), per_file=1)
    predict(tmp_path, loader(4))
    assert names(tmp_path) == ["predictions_rank_00000_part_00000.pt", "predictions_rank_notes.pt"]
    assert len(PredictionWriter.load(tmp_path)) == 2


def test_a_missing_file_is_told(tmp_path):
    predict(tmp_path, loader(), per_file=2)
    (tmp_path / "predictions_rank_00000_part_00002.pt").unlink()
    with pytest.raises(CheckpointError, match="not complete: files of rank 0 of 1 are missing"):
        PredictionWriter.load(tmp_path)


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="There are no predictions in"):
        PredictionWriter.load(tmp_path / "nowhere")


def test_a_trial_writes_nothing(tmp_path):
    predict(tmp_path / "out", loader(), fast_dev_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [0, 1.5, True])
def test_the_batches_per_file_are_checked(number):
    with pytest.raises(ConfigError, match="batches_per_file"):
        PredictionWriter("out", batches_per_file=number)
