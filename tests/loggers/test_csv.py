from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from lightkit.loggers import CSVLogger


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def opened(folder, **kwargs):
    logger = CSVLogger()
    logger.open(folder, **kwargs)
    return logger


def test_the_header_grows_when_new_names_come(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"epoch": 0, "train_loss": 0.5}, 50)
    logger.log_metrics({"epoch": 0, "val_loss": 0.7, "val_acc": 0.9}, 60)
    logger.log_metrics({"epoch": 1, "train_loss": 0.25}, 100)
    logger.close()
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines() == [
        "step,epoch,train_loss,val_loss,val_acc",
        "50,0,0.5,,",
        "60,0,,0.7,0.9",
        "100,1,0.25,,",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_row_is_in_the_file_at_once(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    assert len(table(tmp_path)) == 1
    logger.close()


def test_nan_and_inf_come_back(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": math.nan, "b": -math.inf}, 1)
    logger.close()
    (row,) = table(tmp_path)
    assert math.isnan(float(row["a"]))
    assert float(row["b"]) == -math.inf


def test_numbers_come_back_exactly(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 0.1 + 0.2}, 1)
    logger.close()
    assert float(table(tmp_path)[0]["a"]) == 0.1 + 0.2


def test_names_with_commas_and_quotes(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({'a,"b"': 1.0}, 1)
    logger.close()
    assert table(tmp_path)[0]['a,"b"'] == "1.0"


def test_a_continued_run_keeps_its_rows_and_takes_back_later_ones(tmp_path):
    logger = opened(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"a": float(step)}, step)
    logger.close()
    again = opened(tmp_path, purge_step=21)
    again.log_metrics({"a": 5.0, "b": 6.0}, 25)
    again.close()
    assert [(row["step"], row["a"], row["b"]) for row in table(tmp_path)] == [
        ("10", "10.0", ""),
        ("20", "20.0", ""),
        ("25", "5.0", "6.0"),
    ]


def test_hyperparameters_are_json_and_unknown_types_are_text(tmp_path):
    logger = opened(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 8}, "path": Path("x")})
    logger.close()
    read = json.loads((tmp_path / "hparams.json").read_text())
    assert read == {"lr": 0.1, "net": {"width": 8}, "path": "x"}


def test_flush_and_close_may_be_called_at_any_time(tmp_path):
    logger = CSVLogger()
    logger.flush()
    logger.close()
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_hyperparams({"lr": 0.1})
    logger.open(tmp_path)
    logger.flush()
    logger.close()
    logger.flush()
    logger.close()
    assert table(tmp_path) == []
