"""The contents of a checkpoint, with stand-ins for the rooms above this one."""

from __future__ import annotations

import logging
import math
import types

import pytest
import torch
from torch import nn

from lightkit import rng
from lightkit.checkpoint import collect, read_checkpoint, restore, write_checkpoint
from lightkit.distributed import SingleDevice
from lightkit.errors import CheckpointError, ConfigError
from lightkit.flow import Flow
from lightkit.history import History
from lightkit.hooks import Callback
from lightkit.hparams import HParams
from lightkit.state import TrainState


class Part:
    """Anything with a state."""

    def __init__(self, **state) -> None:
        self.state = state
        self.calls: list[str] = []

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.state = dict(state)

    def settle(self):
        self.calls.append("settle")

    def local_state(self):
        return {"window": self.state["sums"]}


class Counting(Callback):
    def __init__(self, count: int = 0, key: str = "Counting") -> None:
        self.count, self.key = count, key

    @property
    def state_key(self) -> str:
        return self.key

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Silent(Callback):
    pass


class Net(nn.Linear):
    def __init__(self, width: int = 3) -> None:
        super().__init__(2, width)
        self.hparams = HParams(width=width, act=nn.ReLU)


class Run:
    """The attributes of a fit's run that a checkpoint is made of."""

    def __init__(self, fill: int = 0, width: int = 3) -> None:
        self.task = Net(width)
        self.state = TrainState(epoch=fill, global_step=10 * fill, seconds=0.5 * fill)
        self.plan = Part(optimizers=[{"lr": fill}], schedulers=[{"last_epoch": fill}])
        self.precision = Part(scale=fill)
        self.metrics = Part(sums=torch.full((2,), float(fill)))
        self.callbacks: list[Callback] = [Counting(fill), Silent()]
        self.history = History([{"epoch": 1, "val_loss": 0.5}] * fill)
        self.hooks = types.SimpleNamespace(on_save_checkpoint=(), on_load_checkpoint=())
        self.datamodule: object = Part(fold=fill)
        self.datamodule.hparams = {"batch_size": 8}  # type: ignore[attr-defined]
        self.data = {"position": fill}
        self.run_id = "id" * fill
        self.strategy = SingleDevice()
        self.flow = Flow()
        self.rng = None

    def completed(self):
        return self.state.state_dict()

    def switched_now(self):
        return {}

    def data_state(self):
        return self.data

    def load_data_state(self, state):
        self.data = state


def test_everything_goes_into_a_file_and_back(tmp_path):
    run, other = Run(4), Run()
    write_checkpoint(collect(run), tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["lightkit"]["format"] == 1
    assert loaded["lightkit"]["global_step"] == 40
    assert loaded["lightkit"]["run"] == "idididid"
    assert loaded["task_class"].endswith("test_contents.Net")
    assert loaded["hparams"]["width"] == 3
    assert loaded["datamodule_hparams"] == {"batch_size": 8}
    assert len(loaded["rng"]) == 1

    restore(other, read_checkpoint(tmp_path / "a.ckpt"))
    assert torch.equal(other.task.weight, run.task.weight)
    assert other.state == run.state
    for name in ("plan", "precision", "datamodule"):
        assert getattr(other, name).state == getattr(run, name).state
    assert torch.equal(other.metrics.state["sums"], torch.full((2,), 4.0))
    assert other.callbacks[0].count == 4
    assert other.history == run.history
    assert isinstance(other.history, History)
    assert other.data == {"position": 4}
    Net().load_state_dict(loaded["model"])


def test_a_history_comes_back_as_it_was(tmp_path):
    rows = [
        {"epoch": 1, "train_loss": 0.1 + 0.2, "note": "first", "mixed": 1},
        {"epoch": 2, "train_loss": math.nan, "val_loss": math.inf, "mixed": 2.0},
        {},
        {"epoch": 4, "val_loss": -0.0, "huge": 2**70, "none": None},
    ]
    run, other = Run(), Run()
    run.history = History(rows)
    write_checkpoint(collect(run), tmp_path / "a.ckpt")
    restore(other, read_checkpoint(tmp_path / "a.ckpt"))
    for row, before in zip(other.history, rows, strict=True):
        assert {k: repr(v) for k, v in row.items()} == {k: repr(v) for k, v in before.items()}


def test_the_rows_of_a_history_cost_a_save_little():
    """A list of dicts costs twenty times as much: each number of it is pickled by itself."""
    run = Run()
    run.history = History({"epoch": i, "train_loss": 0.5, "val_loss": 0.5} for i in range(1000))
    saved = collect(run)["history"]
    assert [t.dtype for t in saved["values"].values()] == [torch.int64, *2 * [torch.float64]]


def test_the_oldest_files_hold_the_rows_of_a_history():
    run, other = Run(2), Run()
    restore(other, {**collect(run), "history": list(run.history)})
    assert other.history == run.history


def test_the_random_states_are_saved_and_restoring_leaves_them_alone():
    run, other = Run(), Run()
    checkpoint = collect(run)
    first = torch.rand(3)
    before = torch.get_rng_state()
    restore(other, checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    rng.set_rng_state(checkpoint["rng"][0])
    assert torch.equal(torch.rand(3), first)


def test_before_a_resumed_run_goes_on_the_random_states_are_those_it_goes_on_from():
    run = Run()
    run.rng = {"of": "the file"}
    assert collect(run)["rng"] == [{"of": "the file"}]


def test_weights_only(tmp_path):
    checkpoint = collect(Run(2), weights_only=True)
    assert sorted(checkpoint) == [
        "datamodule_hparams",
        "hparams",
        "lightkit",
        "model",
        "task_class",
    ]
    with pytest.raises(CheckpointError, match=r"holds weights only.*task\.load_weights\(path\)"):
        restore(Run(), checkpoint)
    with pytest.raises(CheckpointError, match="a run of Lightning"):
        restore(Run(), {"state_dict": {}, "pytorch-lightning_version": "2"})


def test_hooks_may_add_and_take(tmp_path):
    run, other = Run(1), Run()
    run.hooks.on_save_checkpoint = (lambda c: c.update(mine={"path": tmp_path}),)
    write_checkpoint(collect(run), tmp_path / "a.ckpt")
    order = []
    other.hooks.on_load_checkpoint = (
        lambda c: order.append((c["mine"]["path"], other.state.epoch)),
        lambda c: c["model"].update(bias=torch.full((3,), 7.0)),
    )
    restore(other, read_checkpoint(tmp_path / "a.ckpt"))
    assert order == [(str(tmp_path), 0)]  # before anything is restored
    assert other.task.bias.tolist() == [7.0] * 3


def test_what_a_hook_adds_and_cannot_be_stored_is_refused(tmp_path):
    run = Run()
    run.hooks.on_save_checkpoint = (lambda c: c.update(mine=[Silent()]),)
    with pytest.raises(CheckpointError, match=r"checkpoint\.mine\.\[0\] cannot be stored.*Silent"):
        write_checkpoint(collect(run), tmp_path / "a.ckpt")


def test_what_a_run_was_about_to_do_travels():
    run, other = Run(1), Run()
    run.flow.stop_reason = "enough"
    # One more step comes before it is followed.
    assert collect(run)["flow"] == {"stop_reason": None, "batches_per_step": 1}
    run.flow.ending = True
    checkpoint = collect(run)
    assert checkpoint["flow"]["stop_reason"] == "enough"
    other.flow.accumulate = 2
    restore(other, checkpoint)
    assert other.flow.accumulate == 2
    checkpoint["flow"]["accumulate"] = 5
    restore(other, checkpoint)
    assert other.flow.accumulate == 5


def test_the_position_is_that_of_the_last_completed_step():
    run, other = Run(1), Run()
    run.completed = lambda: {"epoch": 1, "global_step": 9, "batch_idx": 4}
    checkpoint = collect(run)
    restore(other, checkpoint)
    assert (other.state.global_step, other.state.batch_idx) == (9, 4)


def test_files_of_before_these_were_there_are_restored():
    run, other = Run(1), Run()
    checkpoint = collect(run)
    del checkpoint["flow"], checkpoint["lightkit"]["run"]
    restore(other, checkpoint)
    assert other.state == run.state


def test_without_a_datamodule():
    run = Run(1)
    run.datamodule = None
    checkpoint = collect(run)
    assert "datamodule" not in checkpoint
    restore(Run(), checkpoint)
    restore(run, collect(Run(2)))
    assert run.state.epoch == 2


def test_two_callbacks_with_one_key():
    run = Run()
    run.callbacks = [Silent(), Silent()]  # without state they do not clash
    collect(run)
    run.callbacks = [Counting(1), Counting(2)]
    with pytest.raises(ConfigError, match=r"under the key 'Counting'.*override state_key"):
        collect(run)
    run.callbacks = [Counting(1), Counting(2, key="Other")]
    assert collect(run)["callbacks"] == {"Counting": {"count": 1}, "Other": {"count": 2}}


def test_a_state_that_no_callback_takes_is_a_warning(caplog):
    run, other = Run(1), Run()
    other.callbacks = [Counting(9, key="Countin")]
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        restore(other, collect(run))
    assert "'Counting' that this run does not have. Did you mean 'Countin'?" in caplog.text
    assert other.callbacks[0].count == 9


def test_another_architecture_changes_nothing_but_says_what_differs():
    other = Run(width=5)
    with pytest.raises(CheckpointError) as caught:
        restore(other, collect(Run(3)))
    message = str(caught.value)
    assert "The weights of the checkpoint (step 30, " in message
    assert "test_contents.Net) do not fit Net: 2 of another shape: weight (file (3, 2)" in message
    assert other.state == TrainState()


def test_the_tensors_are_the_live_ones():
    run = Run()
    model = collect(run)["model"]
    assert model["weight"].data_ptr() == run.task.weight.data_ptr()
