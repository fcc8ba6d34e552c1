from __future__ import annotations

import logging

import pytest

from lightkit.loggers import CSVLogger, Logger, TensorBoardLogger
from lightkit.loggers.base import flatten


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_without_save_dir_the_trainer_gives_the_folder(kind, tmp_path):
    logger = kind()
    assert (logger.log_dir, logger.name, logger.version) == (None, None, None)
    logger.open(tmp_path / "Net" / "version_3")
    logger.close()
    assert logger.log_dir == str(tmp_path / "Net" / "version_3")
    assert (logger.name, logger.version) == ("Net", 3)


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_save_dir_gives_the_layout_of_the_field(kind, tmp_path):
    (tmp_path / "digits" / "version_0").mkdir(parents=True)
    (tmp_path / "digits" / "version_10").mkdir()
    (tmp_path / "digits" / "version_x").mkdir()
    assert kind(tmp_path, "digits").log_dir == str(tmp_path / "digits" / "version_11")
    assert kind(tmp_path, "digits", 4).log_dir == str(tmp_path / "digits" / "version_4")
    assert kind(tmp_path, "digits", "first").log_dir == str(tmp_path / "digits" / "first")
    assert kind(str(tmp_path)).log_dir == str(tmp_path / "version_0")
    assert kind(tmp_path, "digits", 4).version == 4
    assert kind(tmp_path, "digits").name == "digits"


def test_the_version_is_chosen_once(tmp_path):
    logger = CSVLogger(tmp_path)
    chosen = logger.log_dir
    (tmp_path / "version_0").mkdir()
    assert logger.log_dir == chosen


def test_each_run_gets_the_next_version_unless_one_is_given(tmp_path):
    logger, fixed = CSVLogger(tmp_path), CSVLogger(tmp_path, version="same")
    for number in range(2):
        for one in (logger, fixed):
            one.open(one.next_dir())
            one.close()
        assert logger.log_dir == str(tmp_path / f"version_{number}")
        assert logger.version == number
        assert fixed.log_dir == str(tmp_path / "same")
    assert CSVLogger().next_dir() is None


def test_asking_for_the_folder_makes_none(tmp_path):
    assert TensorBoardLogger(tmp_path, "a").log_dir is not None
    assert list(tmp_path.iterdir()) == []


def test_experiment_without_a_run_takes_every_call_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    logger = TensorBoardLogger()
    logger.experiment.add_image("digit", object(), 3)
    logger.experiment.add_histogram("weights", values=object())
    logger.log_metrics({"loss": 1.0}, 1)
    logger.flush()
    logger.close()
    assert [r.message for r in caplog.records] == [
        "TensorBoardLogger has no run folder here: what is sent to .experiment is dropped"
    ]


def test_a_logger_of_ones_own_needs_log_metrics_only(tmp_path):
    class Mine(Logger):
        def __init__(self):  # without super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step):
            self.rows.append((step, dict(metrics)))

    logger = Mine()
    logger.open(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_graph(None)
    logger.log_metrics({"a": 1.0}, 5)
    logger.flush()
    logger.close()
    logger.close()
    assert logger.rows == [(5, {"a": 1.0})]
    assert logger.log_dir == str(tmp_path)


def test_a_logger_without_log_metrics_says_which_class():
    class Mine(Logger):
        pass

    with pytest.raises(NotImplementedError, match="Mine must define log_metrics"):
        Mine().log_metrics({}, 0)


def test_flatten():
    nested = {"lr": 0.1, "net": {"width": 8, "more": {"depth": 2}}, "empty": {}}
    assert flatten(nested) == {"lr": 0.1, "net/width": 8, "net/more/depth": 2, "empty": {}}
