from __future__ import annotations

import json
import math

from lightkit.loggers import JSONLLogger


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(folder, **kwargs):
    logger = JSONLLogger()
    logger.open(folder, **kwargs)
    return logger


def test_a_row_is_one_line_and_rows_that_come_fast_are_in_the_file_together(tmp_path):
    logger = opened(tmp_path / "run")
    logger.log_metrics({"train_loss": 0.5, "epoch": 0}, 50)
    assert len(rows(tmp_path / "run")) == 1  # the first, and every one after a pause, at once
    logger.log_metrics({"train_loss": 0.25, "val_loss": 1, "epoch": 0}, 100)
    logger.flush()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith('{"step": 50, "epoch": 0, ')
    assert rows(tmp_path / "run") == [
        {"step": 50, "epoch": 0, "train_loss": 0.5},
        {"step": 100, "epoch": 0, "train_loss": 0.25, "val_loss": 1},
    ]
    logger.close()


def test_nan_and_inf_are_null_so_that_the_line_is_json(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": math.nan, "b": -math.inf, "c": 1.5}, 1)
    logger.close()
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.5}]


def test_rewind_takes_back_what_came_after_the_mark_to_the_byte(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"val_step": 1.0}, 99)  # an evaluation counts its rows on its own
    mark = logger.mark()
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert mark == {"files": {"metrics.jsonl": len(kept)}}
    logger.log_metrics({"a": 2.0}, 1)
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a"')

    again = opened(tmp_path, purge_step=2)
    again.rewind(mark)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    assert again.mark() == mark
    again.log_metrics({"a": 3.0}, 2)
    assert again.mark()["files"]["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    again.close()
    assert [(row["step"], row.get("a")) for row in rows(tmp_path)] == [(1, 1.0), (99, None), (2, 3)]


def test_rewind_never_makes_the_file_longer_and_says_that_rows_are_missing(tmp_path, caplog):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.rewind({"files": {"metrics.jsonl": 1000}})
    logger.log_metrics({"a": 2.0}, 2)
    logger.close()
    assert [row["a"] for row in rows(tmp_path)] == [1.0, 2.0]
    assert "metrics.jsonl has 22 bytes where the checkpoint counts on 1000: rows" in caplog.text


def test_rewind_without_a_mark_takes_back_nothing_and_says_so(tmp_path, caplog):
    logger = opened(tmp_path)
    logger.rewind({})
    assert not caplog.records
    logger.log_metrics({"a": 1.0}, 1)
    logger.rewind({})
    logger.close()
    assert [row["a"] for row in rows(tmp_path)] == [1.0]
    assert "does not say how many rows there were" in caplog.text


def test_a_torn_last_line_is_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    logger = opened(tmp_path)
    logger.log_metrics({"a": 2.0}, 2)
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_flush_and_close_may_be_called_at_any_time(tmp_path):
    logger = JSONLLogger()
    logger.flush()
    logger.close()
    assert logger.mark() == {}
    logger.log_metrics({"a": 1.0}, 1)  # nothing is open: nothing is written
    logger.open(tmp_path)
    logger.flush()
    logger.close()
    logger.flush()
    logger.close()
    assert rows(tmp_path) == []
