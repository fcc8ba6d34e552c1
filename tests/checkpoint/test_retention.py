from __future__ import annotations

import pytest
import torch

from lightkit.checkpoint.retention import Retention


def run(retention: Retention, scores: list[float | None]) -> Retention:
    for step, value in enumerate(scores, start=1):
        score = None if value is None else torch.tensor(value)
        enters = retention.enters(score)
        if enters or retention.keep_newest:
            retention = retention.accept(str(step), step, score, enters)
    return retention


@pytest.mark.parametrize(
    ("mode", "keep", "newest", "scores", "stays", "best"),
    [
        ("min", 1, True, [3.0, 1.0, 2.0], ["2", "3"], "2"),
        ("min", 1, False, [3.0, 1.0, 2.0], ["2"], "2"),
        ("max", 1, True, [3.0, 1.0, 2.0], ["1", "3"], "1"),
        ("min", 2, False, [3.0, 1.0, 2.0, 0.5], ["2", "4"], "4"),
        ("min", 2, True, [3.0, 1.0, 2.0, 5.0], ["2", "3", "4"], "2"),
        ("min", -1, False, [3.0, 1.0, 2.0], ["1", "2", "3"], "2"),
        ("min", 0, True, [3.0, 1.0, 2.0], ["3"], ""),
        ("min", 0, False, [3.0, 1.0], [], ""),
        ("min", 1, True, [1.0, 1.0], ["1", "2"], "1"),  # equal is not better
        ("min", 1, True, [float("nan"), 2.0, float("nan")], ["2", "3"], "2"),
        ("min", 1, False, [2.0, float("-inf")], ["1"], "1"),
        ("max", 3, False, [float("nan"), float("inf")], [], ""),
        ("min", 1, True, [None, 2.0, None], ["2", "3"], "2"),
        ("min", -1, False, [None, 2.0, float("nan")], ["1", "2", "3"], "2"),
    ],
)
def test_which_files_stay(mode, keep, newest, scores, stays, best):
    after = run(Retention(mode, keep, True, newest), scores)
    assert list(after.written) == stays
    assert after.best_path == best
    expected = sorted(set(map(str, range(1, len(scores) + 1))) - set(stays))
    written = sorted({*after.garbage, *after.written})
    assert set(after.garbage) <= set(expected)
    assert not set(after.garbage) & set(after.written)
    if newest or keep == -1:
        assert written == sorted(map(str, range(1, len(scores) + 1)))


@pytest.mark.parametrize(
    ("keep", "newest", "stays"),
    [
        (1, True, ["3"]),
        (1, False, ["3"]),
        (0, True, ["3"]),
        (0, False, []),
        (-1, True, list("123")),
    ],
)
def test_without_a_monitor_the_newest_counts(keep, newest, stays):
    after = run(Retention("min", keep, False, newest), [None, None, None])
    assert list(after.written) == stays
    assert after.best_path == after.newest == ("3" if stays else "")
    assert after.best == {}


def test_a_file_of_the_same_name_is_replaced_and_not_removed():
    first = Retention("min", 1, True, False).accept("best", 1, torch.tensor(2.0), True)
    second = first.accept("best", 5, torch.tensor(1.0), True)
    assert second.written == {"best": 5}
    assert second.garbage == []
    assert second.best_score == torch.tensor(1.0)
    assert first.written == {"best": 1}  # the state before stays as it was, for a failed save


def test_a_loaded_state_in_the_same_folder_forgets_files_that_are_gone(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths[1:]:
        open(path, "w").close()
    loaded = Retention("min", 3, True, True)
    state = Retention("min", 3, True, True)
    for step, path in enumerate(paths):
        state = state.accept(path, step, torch.tensor(float(step)), True)
    loaded.load_state_dict(state.state_dict())
    loaded.adopt(tmp_path, same=True, own=True)
    assert list(loaded.written) == list(loaded.best) == paths[1:]
    assert loaded.best_path == paths[1]
    assert loaded.best_score == torch.tensor(1.0)


def test_a_loaded_state_in_another_folder_never_touches_the_old_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    (old / "a").touch()
    state = Retention("min", 1, True, True).accept(str(old / "a"), 1, torch.tensor(1.0), True)
    state.garbage = [str(old / "x")]
    branched = Retention("min", 1, True, True)
    branched.load_state_dict(state.state_dict())
    branched.adopt(new, same=False, own=False)
    assert (branched.written, branched.best, branched.garbage) == ({}, {}, [])
    assert branched.best_path == str(old / "a")  # still the best there is
    worse = branched.accept(str(new / "b"), 2, torch.tensor(5.0), True)
    assert worse.best_path == str(old / "a")
    assert worse.garbage == []
    (old / "a").rename(new / "a")  # the folder was moved
    moved = Retention("min", 1, True, True)
    moved.load_state_dict(state.state_dict())
    moved.adopt(new, same=False, own=True)
    assert moved.best_path == str(new / "a")
    assert list(moved.written) == [str(new / "a")]


def test_another_run_in_the_same_folder_owns_nothing_but_judges_by_its_best(tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    state = Retention("min", 1, True, True)
    for step, path in enumerate(paths):
        open(path, "w").close()
        state = state.accept(path, step, torch.tensor(float(step)), step == 0)
    state.garbage = [paths[1]]
    other = Retention("min", 1, True, True)
    other.load_state_dict(state.state_dict())
    other.adopt(tmp_path, same=True, own=False)
    assert (other.written, other.best, other.garbage, other.newest) == ({}, {}, [], "")
    assert (other.best_path, other.best_score) == (paths[0], torch.tensor(0.0))
    after = other.accept(str(tmp_path / "c"), 2, torch.tensor(3.0), True)
    assert (after.garbage, after.best_path) == ([], paths[0])
    # A file of the name of the best one is another file.
    over = other.accept(paths[0], 2, torch.tensor(3.0), True)
    assert (over.best_path, over.best_score) == (paths[0], torch.tensor(3.0))
    over = other.accept(paths[0], 2, None, False)
    assert (over.best_path, over.best_score) == ("", None)
