"""The proofs hold, and each sees a promise that is broken. Those that start processes: test_prove."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from lightkit import proofs, rng, trials


@pytest.fixture(autouse=True)
def _as_in_the_command():
    with rng.preserved(), trials.silent():
        yield


def test_equal_to_a_loop_by_hand(tmp_path):
    ok, found, numbers = proofs.equal_to_a_loop_by_hand(tmp_path)
    assert ok
    assert numbers == {"steps": 105, "validations": 5, "weights": 676, "differ": 0}
    assert found == "105 losses, 5 validations, 676 weights: 0 differ"


class Draws(proofs.Net):
    def on_train_epoch_start(self):
        torch.rand(1)  # one number that a loop by hand does not draw


def test_one_random_number_too_many_is_seen(tmp_path):
    ok, found, numbers = proofs.equal_to_a_loop_by_hand(tmp_path, Draws)
    assert not ok
    assert numbers["differ"] > 700, found


def test_no_syncs_between_rows(tmp_path):
    ok, found, numbers = proofs.no_syncs_between_rows(tmp_path)
    assert ok
    assert numbers == {"steps": 81, "between": 0, "rows": 9}
    assert found == "0 in 81 steps, and 9 at 9 rows"


@pytest.mark.parametrize("read", [
    torch.Tensor.item, bool, float, torch.Tensor.tolist, torch.Tensor.cpu, np.asarray, repr,
    lambda loss: torch.equal(loss, loss), lambda loss: torch.allclose(loss, loss),
    lambda loss: loss[loss > 0], torch.Tensor.nonzero,
])  # fmt: skip
def test_each_way_of_reading_is_counted(tmp_path, read):
    class Reads(proofs.Light):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            read(loss.detach())
            return loss

    ok, found, numbers = proofs.no_syncs_between_rows(tmp_path, Reads)
    assert not ok
    assert numbers["between"] in (81, 162), found  # some read twice


def test_a_counter_that_sees_nothing_proves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs._Reads, "_note", lambda self: None)
    ok, found, _ = proofs.no_syncs_between_rows(tmp_path)
    assert (ok, found) == (False, "the counter saw 0 of 9 reads of rows")


def test_the_cost_is_a_ratio(tmp_path):
    ok, found, numbers = proofs.cost_of_a_step(tmp_path, rounds=5, most={"bare": 100, "full": 100})
    assert ok
    assert set(numbers) == {"bare", "full"}
    assert all(0.1 < ratio < 100 and math.isfinite(ratio) for ratio in numbers.values())
    assert f"{numbers['bare']:.3f} of one by hand (at most 100.00)" in found


@pytest.mark.parametrize("slow", ["bare", "full"])
def test_each_way_has_its_own_limit(tmp_path, slow):
    most = {"bare": 100.0, "full": 100.0, slow: 0.01}
    assert proofs.cost_of_a_step(tmp_path, rounds=3, most=most)[0] is False


def test_a_slow_step_is_seen(tmp_path):
    class Slow(proofs._Bare):
        def training_step(self, batch, batch_idx):
            return sum(super(Slow, self).training_step(batch, batch_idx) for _ in range(8))

    ok, _, numbers = proofs.cost_of_a_step(tmp_path, rounds=3, task=Slow)
    assert not ok
    assert min(numbers.values()) > 1.5


def test_checkpoints_are_plain_data(tmp_path):
    ok, found, numbers = proofs.plain_checkpoints(tmp_path)
    assert ok
    assert numbers["files"] >= 3
    assert numbers["differ"] == 0
    assert f"all {numbers['files']} files" in found


def test_a_checkpoint_with_other_weights_is_seen(tmp_path, monkeypatch):
    class Changed(proofs.Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["model"] = {k: v + 1 for k, v in checkpoint["model"].items()}

    monkeypatch.setattr(proofs, "Net", Changed)
    ok, found, _ = proofs.plain_checkpoints(tmp_path)
    assert not ok
    assert found.endswith("4 weights differ")


def test_a_checkpoint_that_is_not_plain_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch, "load", lambda *args, weights_only, **kwargs: {"model": {}} if weights_only else 1
    )
    with pytest.raises(KeyError):  # which the command shows as FAILED
        proofs.plain_checkpoints(tmp_path)


# --- what the proofs of several processes are made of ---------------------------------------------


def test_what_two_runs_leave_is_compared_whole(tmp_path):
    for name in ("one", "two"):
        proofs._live(tmp_path / name)
    one, two = (proofs._left_by(tmp_path / name) for name in ("one", "two"))
    ignore = ["*.seconds", "*.time"]
    assert [*proofs.compare(one, two, "run", ignore)] == []
    assert len([row for row in one["rows"] if "train_loss" in row]) >= proofs.EPOCHS * 21
    two["optimizers"][0]["state"][0]["exp_avg"][0, 0] += 1e-7
    assert len([*proofs.compare(one, two, "run", ignore)]) == 1


def test_a_process_that_fails_says_why(tmp_path):
    assert proofs._lines(tmp_path / "log", "-c", "print('step 3')") == ["step 3\n"]
    with pytest.raises(RuntimeError, match="code 1. no luck"):
        proofs._lines(tmp_path / "log", "-c", "raise SystemExit('no luck')")


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "LIMIT", 0.2)
    with pytest.raises(RuntimeError, match="took more than 0 s"):
        proofs._lines(tmp_path / "log", "-c", "import time; time.sleep(60)")


def test_an_error_here_ends_the_process(tmp_path):
    with pytest.raises(KeyError), proofs._process(tmp_path / "log", "-c", "input()") as process:
        raise KeyError
    assert process.returncode is not None


def test_ranks_validate_different_numbers_of_samples():
    """Else a mean over ranks that forgets their weights would be right."""
    assert len(proofs._loaders()[1].dataset) % 2 == 1


def test_only_steps_are_read_of_what_a_run_says():
    assert [*proofs._steps(["device: cpu\n", "step 1\n", "step 12\n"])] == [1, 12]


@pytest.mark.slow
def test_killed_and_resumed_sees_what_is_not_saved(tmp_path, monkeypatch):
    """The run that was killed trains on with weights that are not those of the other."""
    left = proofs._left_by

    def altered(folder):
        state = left(folder)
        state["model"]["net.0.bias"] += folder.name == "killed"
        return state

    monkeypatch.setattr(proofs, "_left_by", altered)
    ok, found, numbers = proofs.killed_and_resumed(tmp_path)
    assert not ok
    assert numbers["differ"] == 1
    assert "run.model.net.0.bias" in found
    json.dumps(numbers)


@pytest.mark.slow
def test_a_run_that_begins_anew_is_seen(tmp_path, monkeypatch):
    """It would end as the other one does, bit for bit."""
    monkeypatch.setattr(proofs, "_lines", lambda log, *words: ["step 1\n"])
    ok, found, numbers = proofs.killed_and_resumed(tmp_path)
    assert not ok
    assert found == f"killed at step {numbers['killed_at']}, began anew"
    assert numbers["resumed_at"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 88])
def test_a_run_is_killed_at_the_first_and_at_the_last_steps(tmp_path, monkeypatch, at):
    """However slowly its output is read: it waits for its reader."""
    monkeypatch.setattr(proofs.secrets, "randbelow", lambda end: min(at, end - 1))
    read = proofs._steps
    monkeypatch.setattr(
        proofs, "_steps", lambda lines: (time.sleep(0.02) or step for step in read(lines))
    )
    ok, found, numbers = proofs.killed_and_resumed(tmp_path)
    assert ok, found
    assert numbers["killed_at"] == 16 + at
    assert 8 <= numbers["resumed_at"] <= 17 + at
