"""Sharding over ranks: the numbers of one process, evaluations, checkpoints for any number of ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightkit as lk
from lightkit.checkpoint import is_valid, latest, read_checkpoint
from lightkit.checkpoint.sharded import consolidate
from lightkit.cli import main
from lightkit.distributed import LaunchEnv, Ranks, fsdp
from lightkit.errors import CheckpointError, ConfigError
from tests.distributed import scenes_fsdp as scenes
from tests.distributed.harness import LIMIT, ROOT, environment, finish, start, torchrun

SCENES = "tests.distributed.scenes_fsdp"
HALF = torch.bfloat16


def differ(one, other):
    """Returns by how much weights differ at most."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def ones():
    """The runs of one process, which the ranks are compared with."""
    found = {
        name: scenes.trained("auto", task, ranks=1, **more)
        for name, (task, more) in scenes.RUNS.items()
    }
    wide = scenes.trained("auto", lambda: scenes.Net(8), ranks=1, gradient_clip_val=0.3)
    return {**found, "parallel": wide}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The first scene on two ranks."""
    return torchrun(f"{SCENES}:training", 2, tmp_path_factory.mktemp("two"))


def test_two_ranks_give_the_numbers_of_one_process(two, ones):
    for name in scenes.RUNS:
        for rank in two:
            assert differ(rank[name]["weights"], ones[name]["weights"]) < 1e-6, name
            metrics, expected = rank[name]["metrics"], ones[name]["metrics"]
            assert metrics == pytest.approx(expected, abs=1e-5), name


def test_a_rank_holds_its_part_only(two):
    whole = [p.numel() for p in scenes.Net().parameters()]
    for number, size in enumerate(whole):
        assert sum(rank["local"][number] for rank in two) == size
    assert max(two[0]["local"]) <= max(whole) / 2


def test_what_is_sharded(two):
    assert two[0]["shards"] == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert two[0]["own"] == ["", "blocks.0", "blocks.1"]
    assert two[0]["clipped"]["name"] == "Net"
    assert two[0]["class"] == "tests.distributed.scenes_fsdp.Net"
    assert two[0]["signature"] == ["batch", "batch_idx"]


def test_precision(two):
    types, parameters, metrics = two[0]["mixed"]
    assert types == {(HALF, HALF)}
    assert parameters == {torch.float32}
    assert metrics["loss"] == pytest.approx(1.1, abs=0.2)
    assert two[0]["true"] == {HALF}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("16-mixed", 'Use precision="bf16-mixed"'),
        ("other", "was sharded by an earlier call with another"),
        ("single", "was sharded by an earlier call with FSDPStrategy, and stays so"),
        ("hsdp", "FSDPStrategy(replicate=2)"),
        ("three", "divides the ranks by 3, but there are 2"),
        ("no parallelism", "needs configure_parallelism(self, mesh) in Net"),
        ("manual", 'use strategy="ddp"'),
        ("newton", "LBFGS works on all parameters as one long vector"),
        ("wrong", "configure_sharding returned Linear, which is no module of Wrong"),
        ("listed", "returned a ModuleList among others, which is never called itself"),
        ("scalar", "scale of Scalar is a single number without a dimension"),
        ("tied", "blocks.0.a.weight and blocks.2.a.weight of Tied are one parameter"),
    ],
)
def test_what_is_refused(two, what, words):
    for rank in two:
        assert words in rank[what]


def test_evaluations_with_unequal_numbers_of_batches(tmp_path):
    ranks = torchrun(f"{SCENES}:evaluation", 2, tmp_path)
    lk.seed_everything(1, verbose=False)
    task = scenes.Net()
    one = lk.Trainer(max_epochs=1, enable_checkpointing=False, **scenes.QUIET)
    for count, seen in ((3, ([3], [])), (9, ([3, 3], [3])), (12, ([3, 3], [3, 3]))):
        expected = one.validate(task, scenes.data(count, 3, 1), verbose=False)
        for rank, own in zip(ranks, seen, strict=True):
            results, batches = rank[count]
            assert results[0] == pytest.approx(expected[0], abs=1e-6)
            assert batches == own  # no step ran for a batch that was not there
    one.fit(task, scenes.data(24, 12), scenes.data(9, 3, 1))
    for rank in ranks:
        assert rank["forms"] == {"DTensor"}
        assert rank[True] == rank[False] == "DTensor"
        assert differ(rank["trained"], task.state_dict()) < 1e-6
        for kind in ("Embedded", "Initialised"):
            mine, alone = rank[kind]
            assert differ(mine, alone) < 1e-6
        assert float(rank["Initialised"][0]["scale"].mean()) == 2.0
        assert float(rank["Embedded"][0]["table.weight"][2].abs().max()) == 0.0
        assert float(rank["Embedded"][0]["table.weight"].std()) > 0.5
        assert "these got no values: blocks.0.a.bias" in rank["forgotten"]
    assert torch.equal(ranks[0]["Initialised"][0]["inp.weight"],
                       ranks[1]["Initialised"][0]["inp.weight"])  # fmt: skip


# --- checkpoints --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The scene of checkpoints on two ranks, and its folder."""
    root = tmp_path_factory.mktemp("saved")
    return root, torchrun(f"{SCENES}:checkpoints", 2, root, folder=str(root))


def test_a_folder_in_the_place_of_the_file(saved):
    _, ranks = saved
    steps = [f"step_{step:06d}.ckpt" for step in (2, 4, 6, 8)]
    assert sorted(ranks[0]["files"]) == ["last.ckpt", *steps]
    inside = {tuple(files) for files in ranks[0]["files"].values()}
    assert inside == {(".metadata", "__0_0.distcp", "__1_0.distcp", "rest.ckpt")}
    assert ranks[0]["same"]  # a second name costs no bytes


def test_a_sharded_run_resumes_bit_for_bit(saved):
    _, ranks = saved
    for rank in ranks:
        assert rank["at"] == 8
        assert differ(rank["resumed"], rank["weights"]) == 0.0
        assert differ(rank["behind"], rank["weights"]) == 0.0


def test_files_that_are_written_behind_the_loop_are_kept_by_score(saved):
    _, ranks = saved
    assert {"last.ckpt", "best.ckpt", Path(ranks[0]["best"]).name} <= set(ranks[0]["kept"])
    assert len(ranks[0]["kept"]) <= 5  # two best, the newest, two second names
    assert ranks[0]["best"] == ranks[1]["best"]


def test_the_best_weights_come_back_also_to_a_run_that_goes_on(saved):
    _, ranks = saved
    for rank in ranks:
        at_once, early, resumed = rank["best weights"]
        assert differ(early, at_once) == differ(resumed, at_once) == 0.0
        assert differ(rank["weights"], at_once) > 0.0


def test_what_one_rank_cannot_write_is_an_error_of_all(saved):
    _, ranks = saved
    for rank in ranks:
        assert "rank 1" in rank["full"]
        assert "No space left on device" in rank["full"]
        assert rank["left"] == []
        assert "No space left on device" in rank["full behind"]
        steps = [f"step_{step:06d}.ckpt" for step in (4, 6, 8)]
        assert rank["warned"] == ["last.ckpt", *steps]  # training went on without the first
        assert "checkpoint.thing cannot be stored" in rank["unstorable"]


def test_one_process_reads_it(saved, tmp_path):
    root, ranks = saved
    last = root / "first" / "files" / "last.ckpt"
    task = scenes.Net()
    task.load_weights(last)
    assert differ(task.state_dict(), ranks[0]["weights"]) == 0.0
    task = scenes.Net.load_from_checkpoint(last)
    assert differ(task.state_dict(), ranks[0]["weights"]) == 0.0
    task = scenes.Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # Torch's own, as the page has it.
        own = {"model": dict(task.named_parameters())}
        dcp.load(own, checkpoint_id=last, no_dist=True)
    assert differ(task.state_dict(), ranks[0]["weights"]) == 0.0
    layer = torch.nn.Linear(5, 6)
    lk.checkpoint.load_weights(layer, last, prefix="inp.")
    assert torch.equal(layer.weight, ranks[0]["weights"]["inp.weight"])
    # The same four steps as the two ranks took, in groups of two batches.
    path = root / "first" / "files" / "step_000004.ckpt"
    task, trainer = scenes.fitted(tmp_path, path=path, size=12, strategy="auto")
    assert trainer.global_step == 8
    assert differ(task.state_dict(), ranks[0]["weights"]) < 1e-6


def test_it_is_joined_into_one_file(saved, tmp_path, capsys):
    root, ranks = saved
    last, file = root / "first" / "files" / "last.ckpt", tmp_path / "joined.ckpt"
    assert main(["export", str(last), str(file)]) == 0
    assert capsys.readouterr().out.strip() == f"written: {file}"
    joined, parts = read_checkpoint(file), read_checkpoint(last)
    assert joined["loop"] == parts["loop"]
    assert differ(joined["model"], ranks[0]["weights"]) == 0.0
    state = joined["optimizers"][0]["state"]
    assert state[0]["exp_avg"].shape == (6, 5)
    assert type(state[0]["exp_avg"]) is torch.Tensor
    assert main(["export", str(last), str(tmp_path / "weights.pt")]) == 0
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert differ(weights, ranks[0]["weights"]) == 0.0
    with pytest.raises(CheckpointError, match="no folder of a sharded run"):
        consolidate(file, tmp_path / "other.ckpt")
    assert main(["export", str(last)]) == 2


def test_more_ranks_than_saved_it(saved, ones, tmp_path):
    root, _ = saved
    shutil.copytree(root / "first" / "files" / "step_000004.ckpt", tmp_path / "two.ckpt")
    consolidate(tmp_path / "two.ckpt", tmp_path / "joined.ckpt")
    four = torchrun(f"{SCENES}:many", 4, tmp_path, folder=str(tmp_path))
    one, _ = scenes.fitted(
        tmp_path / "one", path=tmp_path / "joined.ckpt", size=12, strategy="auto", epochs=3
    )
    for rank in four:
        assert differ(rank["hsdp"]["weights"], ones["clipped"]["weights"]) < 1e-6
        assert differ(rank["parallel"]["weights"], ones["parallel"]["weights"]) < 1e-6
        for name in ("loss", "val_loss", "grad_norm"):
            expected = pytest.approx(ones["parallel"]["metrics"][name], abs=1e-5)
            assert rank["parallel"]["metrics"][name] == expected
        for loaded in rank["loaded"]:
            assert differ(loaded, one.state_dict()) < 1e-6
        assert differ(rank["split again"], rank["split"]) == 0.0
    assert len(four[0]["placements"]) == 4
    file = tmp_path / "split" / "files" / "last.ckpt"
    saved = read_checkpoint(file)
    assert differ(saved["model"], four[0]["split"]) == 0.0
    assert (saved["world_size"], len(saved["rng"])) == (2, 2)  # of four, two see the same
    # One process goes on in the middle of an epoch, with two batches for those of the two groups.
    for name in ("step_000008", "last"):
        shutil.rmtree(tmp_path / "split" / "files" / f"{name}.ckpt")
    path = tmp_path / "split" / "files" / "step_000006.ckpt"
    task, trainer = scenes.fitted(
        tmp_path / "split", scenes.Parallel(8), path=path, strategy="auto"
    )
    assert trainer.global_step == 8
    assert differ(task.state_dict(), four[0]["split"]) < 1e-6


def test_what_is_damaged_is_passed_over(saved, tmp_path):
    root, _ = saved
    files = tmp_path / "files"
    shutil.copytree(root / "first" / "files", files)
    shutil.rmtree(files / "last.ckpt")
    part = files / "step_000008.ckpt" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])
    assert not is_valid(files / "step_000008.ckpt")
    part = files / "step_000006.ckpt" / "__0_0.distcp"
    weights = read_checkpoint(files / "step_000006.ckpt")["model"]["inp.bias"]
    data = bytearray(part.read_bytes())
    data[data.index(weights[:2].numpy().tobytes())] ^= 1
    part.write_bytes(data)
    assert is_valid(files / "step_000006.ckpt")  # its bytes are looked at later
    assert latest(files) == files / "step_000004.ckpt"
    with pytest.raises(CheckpointError, match="__1_0.distcp is truncated"):
        read_checkpoint(files / "step_000008.ckpt")
    with pytest.raises(CheckpointError, match="checksum|damaged"):
        read_checkpoint(files / "step_000006.ckpt")


def test_a_kill_leaves_the_one_before(saved, tmp_path):
    outcome = finish(start(f"{SCENES}:killed", 2, tmp_path, folder=str(tmp_path)), tmp_path)
    assert outcome.code != 0
    files = tmp_path / "killed" / "files"
    names = [path.name for path in files.iterdir() if not path.name.startswith(".")]
    assert sorted(names) == ["last.ckpt", "step_000002.ckpt"]
    assert latest(files) == files / "step_000002.ckpt"
    # One process goes on with it, and takes the two batches of a step one after the other.
    task, trainer = scenes.fitted(tmp_path / "killed", path=latest(files), strategy="auto")
    assert trainer.global_step == 8
    assert differ(task.state_dict(), saved[1][0]["weights"]) < 1e-6
    left = [path.name for path in files.iterdir() if path.name.startswith(".")]
    assert left == []  # what was half written


# --- one process --------------------------------------------------------------------------------


def test_without_a_launcher_nothing_is_sharded(ones):
    result = scenes.trained("fsdp", ranks=1, gradient_clip_val=0.3)
    assert differ(result["weights"], ones["clipped"]["weights"]) == 0.0
    assert type(next(result["task"].parameters())) is torch.nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "sizes", "data"),
    [
        ({}, {"shard": 8}, (5, 8)),
        ({"replicate": "nodes"}, {"replicate": 2, "shard": 4}, (5, 8)),
        ({"replicate": 2, "tensor_parallel": 2}, {"replicate": 2, "shard": 2, "tp": 2}, (2, 4)),
    ],
)
def test_the_axes_of_the_mesh(arguments, sizes, data, monkeypatch):
    env = LaunchEnv(rank=5, local_rank=1, world_size=8, local_world_size=4, launched=True)
    monkeypatch.setattr(fsdp, "_mesh", lambda _, shape, names: dict(zip(names, shape, strict=True)))
    strategy = lk.FSDPStrategy(**arguments)
    strategy.begin(torch.device("cpu"), Ranks(env))
    assert strategy.mesh == sizes
    assert list(strategy.mesh) == list(sizes)  # torch takes the outer axis first
    assert strategy.data_ranks == data


@pytest.mark.parametrize(
    "arguments", [{"replicate": 0}, {"replicate": "all"}, {"tensor_parallel": "nodes"}]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(ConfigError, match="give a whole number"):
        lk.FSDPStrategy(**arguments)


def test_the_script_of_the_page(tmp_path, capsys):
    page = (ROOT / "docs/fsdp.md").read_text(encoding="utf-8")
    script = page.partition("<!-- file: train_large.py -->\n```python\n")[2].partition("```")[0]
    (tmp_path / "train_large.py").write_text(script, encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("torchrun "))
    command = [sys.executable, "-m", "torch.distributed.run", *line.split()[1:]]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True,
                          text=True, timeout=LIMIT)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes, strategy fsdp" in done.stdout
    folder = tmp_path / "runs/Large/version_0/checkpoints"
    drawn = page.partition("checkpoints/\n")[2].partition("```")[0]
    for name in ("last.ckpt", "rest.ckpt", "__0_0.distcp", "__1_0.distcp", ".metadata"):
        assert name in drawn
    inside = {path.name for path in (folder / "last.ckpt").iterdir()}
    assert inside == {"rest.ckpt", "__0_0.distcp", "__1_0.distcp", ".metadata"}
    assert main(["export", str(folder / "last.ckpt"), str(tmp_path / "large.ckpt")]) == 0
    assert set(read_checkpoint(tmp_path / "large.ckpt")["model"]) >= {"blocks.3.up.weight"}
