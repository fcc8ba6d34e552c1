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


def test_truncate_takes_back_what_came_after_the_offset(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    offset = logger.offset()
    logger.log_metrics({"a": 2.0}, 2)
    logger.close()

    again = opened(tmp_path)
    again.truncate(offset)
    assert again.offset() == offset
    again.log_metrics({"a": 3.0}, 2)
    again.close()
    assert [row["a"] for row in rows(tmp_path)] == [1.0, 3.0]


def test_truncate_never_makes_the_file_longer(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    size = logger.offset()
    logger.truncate(size + 1000)
    logger.log_metrics({"a": 2.0}, 2)
    logger.close()
    assert [row["a"] for row in rows(tmp_path)] == [1.0, 2.0]


def test_a_torn_last_line_is_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"')
    logger = opened(tmp_path)
    logger.log_metrics({"a": 2.0}, 2)
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_purge_step_takes_back_that_step_and_later(tmp_path):
    logger = opened(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"a": float(step)}, step)
    logger.close()
    opened(tmp_path, purge_step=21).close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]


def test_flush_and_close_may_be_called_at_any_time(tmp_path):
    logger = JSONLLogger()
    logger.flush()
    logger.close()
    assert logger.offset() == 0
    logger.truncate(5)
    logger.log_metrics({"a": 1.0}, 1)  # nothing is open: nothing is written
    logger.open(tmp_path)
    logger.flush()
    logger.close()
    logger.flush()
    logger.close()
    assert rows(tmp_path) == []
