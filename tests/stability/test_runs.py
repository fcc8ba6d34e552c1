"""Runs that earlier versions left behind go on; ``tests/fixtures/format_1_later`` has them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import lightkit as lk
from lightkit.checkpoint import FORMAT, read_checkpoint
from lightkit.errors import CheckpointError
from tests.fixtures.format_1.generate import Net, loaders
from tests.fixtures.format_1_later import generate

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "format_1_later"
SHARDED = FOLDER / "sharded" / "step_000006.ckpt"
NEWEST = "Net/version_0/checkpoints/step_000014.ckpt"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=generate.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def run_dir(tmp_path, kind) -> Path:
    """A copy of a run that was interrupted in its second epoch."""
    shutil.copytree(FOLDER / kind, tmp_path / "runs")
    (found,) = (tmp_path / "runs").glob("*/version_0")
    return found


def test_an_interrupted_run_goes_on_in_its_folder_to_the_same_end(tmp_path, kind, run_dir, caplog):
    t, task = generate.trainer(kind, tmp_path / "runs"), generate.KINDS[kind][0]()
    torch.manual_seed(99)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        history = t.fit(task, *loaders(), ckpt_path="auto")
    assert [r.getMessage() for r in caplog.records if "Not stored" not in r.getMessage()] == []
    assert t.run_dir == run_dir
    assert (t.global_step, t.current_epoch) == (30, 3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    end = torch.load(FOLDER / kind / "end.pt", weights_only=True)
    assert task.state_dict().keys() == end.keys()
    for key, value in task.state_dict().items():  # not by the bit: other builds of torch round
        torch.testing.assert_close(value, end[key], msg=key)
    expected = rows(FOLDER / kind / "end.jsonl")
    assert rows(run_dir / "metrics.jsonl") == [pytest.approx(row, rel=1e-4) for row in expected]


def test_its_weights_and_its_task_come_out_of_it(kind, run_dir):
    path = run_dir / "checkpoints" / "step_000014.ckpt"
    task = generate.KINDS[kind][0]()
    given = {"net": generate.supervised().net, "scheduler": lk.one_cycle}
    given = given if kind == "supervised" else {}  # what the file notes by name only
    loaded = type(task).load_from_checkpoint(path, **given)
    task.load_weights(path)
    plain = torch.load(path, weights_only=True)["model"]  # and without lightkit
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, task.state_dict()[key])
        assert torch.equal(value, plain[key])


def test_the_averages_are_the_model_and_the_weights_are_beside_them():
    ema, plain = (read_checkpoint(FOLDER / kind / NEWEST) for kind in ("ema", "plain"))
    trained = ema["callbacks"]["EMA"]["trained"]
    assert trained.keys() == {name for name, _ in Net().named_parameters()}
    for key, value in trained.items():
        assert torch.equal(value, plain["model"][key])
        assert not torch.equal(value, ema["model"][key])


def test_one_process_goes_on_with_a_sharded_run(tmp_path):
    """With twice the batches for each step; of two processes each had its own."""
    t = generate.sharded_trainer(tmp_path, accumulate_grad_batches=2)
    t.fit(task := generate.sharded_task(), loaders()[0], ckpt_path=SHARDED)
    assert t.global_step == 8
    end = torch.load(FOLDER / "sharded" / "end.pt", weights_only=True)
    assert task.state_dict().keys() == end.keys()
    for key, value in task.state_dict().items():
        torch.testing.assert_close(value, end[key], msg=key)


def test_every_format_that_was_ever_written_has_its_files():
    found = {path.name.split("_")[1] for path in FIXTURES.glob("format_*")}
    assert found == {str(number) for number in range(1, FORMAT + 1)}
    for path in FIXTURES.glob("format_*/**/*.ckpt"):
        if path.parent != SHARDED:
            assert f"format_{read_checkpoint(path)['lightkit']['format']}" in str(path)


@pytest.fixture
def file() -> dict:
    return torch.load(FOLDER / "plain" / NEWEST, weights_only=True)


def test_a_later_format_says_to_upgrade(tmp_path, file):
    file["lightkit"] |= {"format": FORMAT + 1, "version": "9.0.0"}
    path = tmp_path / "later.ckpt"
    torch.save(file, path)
    t = generate.trainer("plain", tmp_path / "runs")
    for read in (
        Net().load_weights,
        Net.load_from_checkpoint,
        lambda path: t.fit(Net(), *loaders(), ckpt_path=path),
    ):
        with pytest.raises(CheckpointError, match=r"written by lightkit 9\.0\.0.*Upgrade lightkit"):
            read(path)


def test_what_a_later_version_adds_within_a_format_is_passed_over(tmp_path, file):
    file["added"] = {"some": torch.ones(2)}
    file["lightkit"]["added"] = 1
    torch.save(file, tmp_path / "later.ckpt")
    t = generate.trainer("plain", tmp_path / "runs")
    t.fit(Net(), *loaders(), ckpt_path=tmp_path / "later.ckpt")
    assert t.global_step == 30
