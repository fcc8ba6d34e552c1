"""Runs that go on with another number of ranks, and what the ranks of one run see of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.distributed import scenes_runs
from tests.distributed.harness import finish, start, torchrun

SCENES = "tests.distributed.scenes_runs"


def _samples(root: Path) -> dict[int, list[int]]:
    """Returns the samples of each optimizer step, of all ranks and lives together."""
    found: dict[int, list[int]] = {}
    for path in root.glob("diary_*.jsonl"):
        for line in path.read_text().splitlines():
            kind, step, what = json.loads(line)
            if kind == "step":
                found.setdefault(step, []).extend(what)
    return {step: sorted(what) for step, what in sorted(found.items())}


def test_a_run_goes_on_with_fewer_ranks_and_takes_the_same_steps(tmp_path):
    root, alone = tmp_path / "elastic", tmp_path / "alone"
    for folder in (root, alone):
        folder.mkdir()
    one = scenes_runs.part_of_a_run(str(alone), until=15, accumulate=4)
    found = []
    said = []
    for processes, until in ((4, 2), (2, 8)):  # in the middle of the first epoch, of the second
        ranks = tmp_path / f"ranks_{processes}"
        ranks.mkdir()
        life = {"place": str(root), "until": until}
        outcome = finish(start(f"{SCENES}:part_of_a_run", processes, ranks, **life), ranks)
        assert outcome.code == 0, outcome.output
        said.append(outcome.output)
        ends = outcome.results
        assert len({end["run_dir"] for end in ends}) == 1
        assert all(torch.equal(a, b) for end in ends for a, b in zip(
            end["model"].values(), ends[0]["model"].values(), strict=True
        ))  # fmt: skip
        found.append(ends[0])
    found.append(scenes_runs.part_of_a_run(str(root), until=15))
    # Rank zero speaks for all.
    for line in (
        "saved by 4 processes, goes on with 2",
        "accumulate_grad_batches is 2 now, so that a step has 4 as before",
        "device:   cpu, 2 processes, strategy ddp",
        "step:     8 samples: 2 per batch x 2 processes x 2 batches each",
        "results:",
    ):
        assert said[1].count(line) == 1, said[1]
    assert "step:     8 samples: 2 per batch x 4 processes\n" in said[0]
    assert [end["run_dir"] for end in found] == ["version_0"] * 3
    # Every step has the samples that it has in one process which accumulates, so none is lost.
    assert _samples(root) == _samples(alone)
    steps = list(_samples(root).values())
    for epoch in (steps[:6], steps[6:12]):
        assert sorted(index for step in epoch for index in step) == list(range(48))
    for name in ("losses", "largest"):
        assert found[-1][name] == pytest.approx(one[name], rel=1e-5)
    assert found[-1]["history"] == pytest.approx(one["history"], rel=1e-5)
    for name, value in one["model"].items():
        torch.testing.assert_close(found[-1]["model"][name], value, rtol=1e-4, atol=1e-5)


def test_what_the_ranks_of_a_run_see_of_it(tmp_path):
    zero, one = torchrun(f"{SCENES}:observed", 2, tmp_path / "ranks", place=str(tmp_path))
    for name in ("run_dir", "log_dirs", "version", "best", "validated"):
        assert zero[name] == one[name], name
    assert zero["run_dir"] == str(tmp_path / "logs" / "mine" / "version_0")
    assert zero["log_dirs"] == [zero["run_dir"]] * 3
    # A loaded file that is the newest goes on in its folder.
    assert zero["later"] == one["later"] == zero["run_dir"]
    assert (zero["ledger"], one["ledger"]) == (True, False)
    assert (zero["image"], one["image"]) == ("SummaryWriter", "NullExperiment")
    assert [p.name for p in (tmp_path / "logs" / "mine").iterdir()] == ["version_0"]
    assert (tmp_path / "timed" / "last.ckpt").exists()
    # A state that is bad on one rank is saved by none, and all say so.
    assert "rank 1: Parameters are nan" in zero["errors"]["nan"]
    assert one["errors"]["nan"].startswith("Parameters are nan")
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    assert names == {"by_hand_0.ckpt", "broken_0.ckpt", "by_hand_1.ckpt"}
    saved = torch.load(tmp_path / "by_hand_1.ckpt", weights_only=True)
    assert (saved["world_size"], len(saved["rng"]), len(saved["metrics"]["ranks"])) == (2, 2, 2)
    assert not torch.equal(saved["rng"][0]["torch"], saved["rng"][1]["torch"])
    for name, text in {
        "missing": "CheckpointError: .*nowhere.ckpt does not exist",
        "unknown": "UsageError: .*there is no last.ckpt",
        "unwritable": "ConfigError: The run folder",
    }.items():
        for errors in (zero["errors"], one["errors"]):
            assert re.search(text, errors[name]), errors[name]
