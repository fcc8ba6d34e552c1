"""What a failed fit leaves behind: the batch, the state before the step, and where it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import failure
from lightkit.errors import CheckpointError, NonFiniteError
from lightkit.rng import rng_state


class Net(lk.TaskModule):
    """Fails at a step; `how` says in which way."""

    def __init__(self, how: str = "shapes", at: int = 5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.how, self.at = how, at
        self.random: Any = None

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch[:2]
        if self.trainer.global_step == self.at:
            self.random = rng_state()
            if self.how == "shapes":
                x = x[:, :2]
            elif self.how == "nan":
                x = (x - 10).log()
            elif self.how == "interrupt":
                raise KeyboardInterrupt
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any) -> Tensor:
        if self.how == "validation" and not self.trainer.sanity_checking:
            return self.net(batch[0][:, :2])
        return self.training_step(batch)

    def on_train_epoch_end(self) -> None:
        if self.how == "end":
            raise ValueError("at the end")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 1.5).long()), 2)


def trainer(folder: Path, **options: Any) -> lk.Trainer:
    quiet: dict[str, Any] = {"max_epochs": 2, "logger": False, "accelerator": "cpu", "seed": 7}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "rehearse": False}
    return lk.Trainer(**{**quiet, "default_root_dir": folder, **options})


def fail(folder: Path, how: str = "shapes", data: Any = None, **options: Any) -> Any:
    """Lets a fit fail and returns the trainer, the task, the error and what is in its folder."""
    one, task = trainer(folder, **options), Net(how)
    val = loader() if how == "validation" else None
    with pytest.raises((RuntimeError, ValueError)) as raised:
        one.fit(task, loader() if data is None else data, val)
    return one, task, raised.value, one.run_dir / "failure"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "failure.json").read_text("utf-8"))


def test_G12_a_step_that_fails_leaves_its_batch_and_the_state_before_it(tmp_path: Path) -> None:
    _, task, error, folder = fail(tmp_path)
    assert {file.name for file in folder.iterdir()} == {
        *("failure.json", "traceback.txt", "batch.pt", "state.ckpt")
    }
    known = read(folder)
    assert (known["exception"], known["message"]) == ("RuntimeError", str(error))
    assert (known["step"], known["epoch"], known["batch_idx"]) == (5, 0, 5)
    assert (known["stage"], known["state"]) == ("training", "before the step")
    assert known["left_out"] == {}
    assert known["versions"]["torch"] == torch.__version__
    batch = torch.load(folder / "batch.pt", weights_only=True)["batch"]
    wanted = list(loader())[5]
    assert all(torch.equal(one, other) for one, other in zip(batch, wanted, strict=True))
    saved = torch.load(folder / "state.ckpt", weights_only=True)
    assert torch.equal(saved["rng"][0]["torch"], task.random["torch"])
    assert "in net.0: Linear" in (folder / "traceback.txt").read_text("utf-8") or not hasattr(
        error, "__notes__"
    )
    other = trainer(tmp_path / "plain", max_steps=5)  # which seeds
    plain = Net(at=-1)
    other.fit(plain, loader())
    for name, weight in plain.state_dict().items():
        assert torch.equal(saved["model"][name], weight), name


def test_a_run_can_go_on_from_its_state(tmp_path: Path) -> None:
    *_, folder = fail(tmp_path)
    again = trainer(tmp_path, max_epochs=1)
    again.fit(Net(at=-1), loader(), ckpt_path=folder / "state.ckpt")
    assert again.global_step == 10
    assert again.run_dir != folder.parent


class Data(lk.DataModule):
    """The data of `loader`."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


TASK = " --task tests.test_failure.Net"


@pytest.mark.parametrize(
    ("how", "data", "every", "words"),
    [
        ("shapes", None, 3, [TASK]),
        ("nan", None, 3, [f"{TASK} --data module.Class"]),
        ("nan", Data, 3, [f"{TASK} --data tests.test_failure.Data"]),
        ("nan", None, 100, []),  # nothing to go on from
        ("end", None, 3, []),  # the traceback tells all
    ],
)
def test_the_end_says_where_it_is_and_how_it_comes_again(
    how: str,
    data: Any,
    every: int,
    words: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver = lk.callbacks.ModelCheckpoint(every_n_train_steps=every)
    with caplog.at_level(logging.INFO, "lightkit"):
        *_, folder = fail(tmp_path, how, data and data(), log_every_n_steps=4, callbacks=[saver])
    said = [record.getMessage() for record in caplog.records]
    assert f"failure:  {folder}" in said
    told = [text for text in said if text.startswith("replay:")]
    assert [line.partition(f"lightkit replay {folder.parent}")[2] for line in told] == words


def test_a_loss_that_is_not_finite_leaves_its_step_and_a_good_checkpoint(tmp_path: Path) -> None:
    saver = lk.callbacks.ModelCheckpoint(every_n_train_steps=3)
    _, _, error, folder = fail(tmp_path, "nan", log_every_n_steps=4, callbacks=[saver])
    assert isinstance(error, NonFiniteError)
    assert error.step == 5
    known = read(folder)
    assert (known["step"], known["exception"]) == (5, "NonFiniteError")
    assert {file.name for file in folder.iterdir()} == {"failure.json", "traceback.txt"}
    assert set(known["left_out"]) == {"batch.pt", "state.ckpt"}
    good = torch.load(known["checkpoint"], weights_only=True)
    assert good["lightkit"]["global_step"] == 3
    assert all(value.isfinite().all() for value in good["model"].values())


def test_a_validation_that_fails_is_told_apart(tmp_path: Path) -> None:
    *_, folder = fail(tmp_path, "validation")
    known = read(folder)
    assert (known["stage"], known["batch_idx"], known["step"]) == ("validation", 0, 10)
    assert (folder / "batch.pt").exists()


def test_a_hook_that_fails_leaves_the_state_alone(tmp_path: Path) -> None:
    *_, folder = fail(tmp_path, "end")
    assert read(folder)["left_out"] == {"batch.pt": "the error came from no step"}
    assert (folder / "state.ckpt").exists()


def test_nothing_is_left_by_interruptions_and_before_the_first_step(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        one.fit(Net("interrupt"), loader())
    assert not (one.run_dir / "failure").exists()
    other = trainer(tmp_path)
    with pytest.raises(lk.errors.DataError):
        other.fit(Net(), [])
    assert list(tmp_path.rglob("failure")) == []


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    one = trainer(tmp_path / "runs", enable_checkpointing=False)
    with pytest.raises(RuntimeError):
        one.fit(Net(), loader())
    assert one.run_dir is None
    assert list(tmp_path.iterdir()) == []


def test_parts_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    class Odd:
        pass

    batch = [torch.rand(2, 3), torch.zeros(2).long(), {"odd": [1, Odd()]}]
    *_, folder = fail(tmp_path, data=[batch] * 8)
    known = read(folder)
    assert known["left_out"] == {"batch.pt": "batch[2]['odd'][1] (Odd) cannot be stored"}
    assert not known["batch_as_it_was"]
    stored = torch.load(folder / "batch.pt", weights_only=True)["batch"]
    assert torch.equal(stored[0], batch[0])
    assert stored[2] == {"odd": [1, None]}


def test_a_batch_of_another_class_does_not_come_back_as_it_was(tmp_path: Path) -> None:
    from collections import namedtuple

    pair = namedtuple("pair", "x y")
    batch = pair(torch.rand(2, 3), torch.zeros(2).long())
    *_, folder = fail(tmp_path, data=[batch] * 8)
    assert not read(folder)["batch_as_it_was"]


def test_what_is_too_large_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(failure, "MOST_BATCH", 10)
    monkeypatch.setattr(failure, "MOST_STATE", 10)
    *_, folder = fail(tmp_path)
    assert {file.name for file in folder.iterdir()} == {"failure.json", "traceback.txt"}
    assert "MiB are more than 0 MiB" in read(folder)["left_out"]["state.ckpt"]


def test_a_large_batch_is_not_copied_first(tmp_path: Path, monkeypatch: Any) -> None:
    def copied(*_: Any) -> None:
        raise AssertionError("copied")

    monkeypatch.setattr(failure, "MOST_BATCH", 10)
    monkeypatch.setattr(failure, "move_to_device", copied)
    *_, folder = fail(tmp_path)
    assert "MiB are more than" in read(folder)["left_out"]["batch.pt"]


def test_the_class_of_a_script_is_named_by_its_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Net, "__module__", "__main__")
    main = SimpleNamespace(__spec__=None, __file__="/somewhere/train.py")
    monkeypatch.setitem(failure.sys.modules, "__main__", main)
    *_, folder = fail(tmp_path)
    assert read(folder)["task"] == "train.Net"


def test_a_disk_that_fails_hides_nothing(
    tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(failure.checkpoint, "save_file", full)
        _, _, error, folder = fail(tmp_path / "one")
    assert "cannot be multiplied" in str(error)
    assert read(folder)["left_out"]["batch.pt"] == "no space left"
    with monkeypatch.context() as patch:
        patch.setattr(failure, "newest_checkpoint", full)
        _, _, error, _ = fail(tmp_path / "two")
    assert "cannot be multiplied" in str(error)
    assert "could not be written: no space left" in caplog.text


def test_a_later_failure_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    saver = lk.callbacks.ModelCheckpoint(every_n_train_steps=3)
    *_, folder = fail(tmp_path, callbacks=[saver])
    (folder / "old").touch()
    again, task = trainer(tmp_path), Net()
    task.at = 8
    with pytest.raises(RuntimeError):
        again.fit(task, loader(), ckpt_path="auto")
    assert again.run_dir == folder.parent
    assert read(folder)["step"] == 8
    assert not (folder / "old").exists()


def test_within_an_update_the_state_is_said_to_be_so(tmp_path: Path) -> None:
    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no step")

    task = Net(at=-1)
    task.configure_optimizers = lambda: Breaks(task.parameters(), lr=0.1)  # type: ignore[method-assign]
    one = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="no step"):
        one.fit(task, loader())
    assert read(one.run_dir / "failure")["state"] == "within an update"


def test_after_an_update_the_state_is_said_to_be_so(tmp_path: Path) -> None:
    class Fails(lk.Callback):
        def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
            raise RuntimeError("no end")

    one = trainer(tmp_path, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="no end"):
        one.fit(Net(at=-1), loader())
    known = read(one.run_dir / "failure")
    assert (known["state"], known["batch_idx"], known["step"]) == ("after the step", 0, 1)


def test_fields_that_json_cannot_hold_are_refused_quietly(tmp_path: Path) -> None:
    """An error of a fit that never began leaves nothing and changes nothing."""
    session = SimpleNamespace(run_dir=tmp_path, state=None)
    failure.leave(SimpleNamespace(_run=None, rehearsing=False), session, ValueError("x"))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_rank_that_failed_writes_and_its_step_can_be_taken_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.distributed.harness import finish, start
    from tests.distributed.scenes_failure import OnOne

    root = tmp_path / "runs"
    root.mkdir()
    job = start("tests.distributed.scenes_failure:one_fails", 2, tmp_path, folder=str(root))
    outcome = finish(job, tmp_path)
    assert outcome.code != 0
    (run,) = (root / "OnOne").iterdir()
    assert [folder.name for folder in run.glob("failure*")] == ["failure_rank_1"], outcome.output
    assert f"rank 1: error: failure: {run / 'failure_rank_1'}" in outcome.output
    folder = run / "failure_rank_1"
    known = read(folder)
    assert (known["rank"], known["processes"], known["step"]) == (1, 2, 2)
    batch = torch.load(folder / "batch.pt", weights_only=True)["batch"]
    assert torch.equal(batch[0], list(loader())[5][0])  # the third of rank 1
    from lightkit.replay import replay

    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run, task=OnOne())
    assert "cannot be multiplied" in caplog.text
