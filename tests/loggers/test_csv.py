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


def test_rewind_gives_back_rows_and_header_of_the_mark(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 0.1}, 10)
    logger.log_metrics({'b,"c"': 2.0}, 99)  # an evaluation counts its rows on its own
    mark, kept = logger.mark(), (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"a": 3.0}, 10)
    logger.log_metrics({"later": 4.0}, 30)
    logger.close()
    again = opened(tmp_path, purge_step=11)
    again.rewind(mark)
    assert (tmp_path / "metrics.csv").read_bytes() == kept
    assert again.mark() == mark
    again.log_metrics({"a": 5.0, "new": 6.0}, 25)
    again.close()
    assert list(table(tmp_path)[0]) == ["step", "epoch", "a", 'b,"c"', "new"]
    assert [(row["step"], row["a"], row["new"]) for row in table(tmp_path)] == [
        ("10", "0.1", ""),
        ("99", "", ""),
        ("25", "5.0", "6.0"),
    ]


def test_an_existing_table_is_continued_without_its_unfinished_last_row(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,a\n10,0,0.5\n12")
    logger = opened(tmp_path)
    logger.log_metrics({"epoch": 1, "a": 2.0}, 120)
    logger.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,a\n10,0,0.5\n120,1,2.0\n"


def test_rewind_says_where_rows_are_missing_or_nothing_can_be_taken_back(tmp_path, caplog):
    logger = opened(tmp_path)
    logger.rewind({})
    assert not caplog.records
    logger.log_metrics({"a": 1.0}, 1)
    logger.rewind({})
    assert "does not say how many rows there were" in caplog.text
    logger.rewind({**logger.mark(), "rows": 7})
    logger.close()
    assert "metrics.csv has 1 rows where the checkpoint counts on 7: rows of before" in caplog.text
    assert len(table(tmp_path)) == 1


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
