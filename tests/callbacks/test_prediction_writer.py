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


class Kept(lk.callbacks.BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.batches, self.epochs = [], []

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        self.batches.append((prediction["number"], batch_indices, len(batch), dataloader_idx))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.epochs.append((predictions, batch_indices))


def written(interval, loaders):
    kept = Kept(interval)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    lk.Trainer(callbacks=[kept], **quiet).predict(Double(), loaders, return_predictions=False)
    return kept


def test_code_of_ones_own_gets_batches_or_all_of_them():
    each = written("batch", loader(5))
    assert each.batches == [(0, range(2), 2, 0), (1, range(2, 4), 2, 0), (2, range(4, 5), 1, 0)]
    assert each.epochs == []
    ((predictions, indices),) = written("epoch", loader(5)).epochs
    assert [one["number"] for one in predictions] == [0, 1, 2]
    assert indices == [range(2), range(2, 4), range(4, 5)]
    both = written("batch_and_epoch", [loader(2), loader(4)])
    assert [where[3] for where in both.batches] == [0, 1, 1]
    ((predictions, indices),) = both.epochs
    assert [len(of_loader) for of_loader in predictions] == [1, 2]
    assert indices == [[range(2)], [range(2), range(2, 4)]]


def test_places_of_samples_that_nobody_knows_are_none():
    shuffled = DataLoader(torch.arange(4.0), 2, shuffle=True)
    assert [where[1] for where in written("batch", shuffled).batches] == [None, None]


def test_an_interval_that_is_none():
    with pytest.raises(ConfigError, match="Did you mean 'epoch'"):
        Kept("epochs")
