"""A rank that is killed, torchrun that starts all again, and a run that ends as if nothing was."""

from __future__ import annotations

import json

import torch

from lightkit import provenance
from lightkit.runs import compare as compared
from lightkit.runs import find_runs
from tests.distributed.harness import torchrun
from tests.faults.harness import compare, curves


def _diary(path):
    """Returns what counts: a later life takes back what it does again."""
    steps, lives = {}, 0
    for line in path.read_text().splitlines():
        kind, step, what = json.loads(line)
        if kind == "life":
            steps, lives = {k: v for k, v in steps.items() if k <= step}, lives + 1
        else:
            steps[step] = what
    return steps, lives


def test_a_killed_rank_costs_nothing_but_time(tmp_path):
    scene = "tests.distributed.scenes_runs:lives"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torchrun(scene, 2, tmp_path / "a", place=str(whole))
    torchrun(scene, 2, tmp_path / "b", flags=("--max-restarts=2",), place=str(broken), dies=13)
    for workers in ("0", "2"):
        assert (broken / workers / "died").exists(), "nobody was killed"
        for rank in (0, 1):
            one, two = (torch.load(f / workers / f"end_{rank}.pt") for f in (whole, broken))
            different: list[str] = []
            compare(one, two, f"rank {rank}, {workers} workers", different)
            assert not different, "\n".join(different)
            name = f"{workers}/diary_{rank}.jsonl"
            (steps, one_life), (again, two_lives) = _diary(whole / name), _diary(broken / name)
            assert steps == again
            assert (one_life, two_lives) == (1, 2)
        ends = [torch.load(whole / workers / f"end_{rank}.pt") for rank in (0, 1)]
        for rank in (0, 1):
            assert ends[rank].pop("draws") is not None
        assert ends[0]["run_dir"] == ends[1]["run_dir"] == "runs/Net/version_0"
        different = []
        compare(*ends, "ranks", different)
        assert not different, "\n".join(different)
        folders = [next((f / workers / "runs" / "Net").iterdir()) for f in (whole, broken)]
        assert curves(folders[0]) == curves(folders[1])
        made = [provenance.read(folder) for folder in folders]
        assert [[entry["processes"] for entry in entries] for entries in made] == [[2], [2, 2]]
        (one,), (two,) = map(find_runs, folders)
        assert (one.status, two.status) == ("finished", "finished")
        assert [*compared([one, two])["configuration"]] == ["trainer.default_root_dir"]
