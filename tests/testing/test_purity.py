"""`assert_validation_is_pure`: each thing that a validation can leave behind is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.callbacks import EMA, EarlyStopping, ModelCheckpoint
from lightkit.testing import assert_validation_is_pure
from tests import small


class Net(small.Net):
    """With layers that behave otherwise in training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1)
        )
        self.scale = 1.0


def refused(kind, **options):
    with pytest.raises(AssertionError) as caught:
        assert_validation_is_pure(kind(), small.loader(), small.loader(12), **options)
    return str(caught.value)


def test_a_good_task_passes_and_stays_as_it_is(tmp_path):
    """S0-01, G22."""

    class Full(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_error", super().validation_step(batch, batch_idx))

        def on_validation_epoch_end(self):
            self.log("val_epochs", float(self.current_epoch))

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_error"}

    task, plain = Full(), Net()
    before = [p.clone() for p in task.parameters()]
    drawn = torch.get_rng_state()
    callbacks = [EarlyStopping("val_error", patience=1), EMA(), ModelCheckpoint(tmp_path)]
    several = {"one": small.loader(12), "two": small.loader(9)}
    assert_validation_is_pure(task, small.loader(), small.loader(12), callbacks=callbacks)
    assert_validation_is_pure(plain, small.loader(), several, val_check_interval=2)
    assert all(map(torch.equal, before, task.parameters()))
    assert torch.equal(drawn, torch.get_rng_state())
    assert [*tmp_path.iterdir()] == []


def test_train_mode_in_the_step():
    class Trains(Net):
        def validation_step(self, batch, batch_idx):
            self.train()
            return super().validation_step(batch, batch_idx)

    said = refused(Trains)
    assert said.startswith("At the end of validation 1 (step 5) these differ from a run whose")
    assert "buffers.net.1.running_mean: 5 of 5 numbers differ" in said
    assert "in the run that validates, " in said
    assert "modes.net: 'train' in the run that validates, 'eval' in the other\n" in said
    assert "random states.torch: " in said
    assert "do not call train() in it" in said


def test_random_numbers():
    class Draws(Net):
        def on_validation_start(self):
            torch.rand(1)

    said = refused(Draws)
    assert "repeat itself" not in said
    assert [line.split(":")[0].strip() for line in said.splitlines()[1:2]] == [
        "random states.torch"
    ]
    assert "a generator of their own" in said


def test_a_step_of_an_optimizer():
    class Learns(Net):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                super().training_step(batch, batch_idx).backward()
            self.optimizers().optimizer.step()

    said = refused(Learns)
    assert "weights.net.0.weight: " in said
    assert "A validation must not train" in said
    assert "a backward in it" in said


def test_what_is_frozen():
    class Freezes(Net):
        def on_validation_start(self):
            self.net[3].requires_grad_(False)

    said = refused(Freezes)
    assert "requires_grad.net.3.weight: 'False' in the run that validates" in said
    assert "freezes or unfreezes" in said


def test_a_metric_that_is_made_in_the_first_validation():
    task = lk.SupervisedTask(nn.Linear(4, 1), loss="mse", metrics=["mae"])
    assert_validation_is_pure(task, small.loader(), small.loader(12))


def test_gradients_alone():
    class Leaves(Net):
        def on_validation_end(self):
            for parameter in self.parameters():
                parameter.grad = None

    said = refused(Leaves)
    assert "gradients.net.0.weight: " in said
    assert "weights." not in said


def test_a_plain_attribute_that_training_reads():
    class Scales(Net):
        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.scale *= 0.5

    said = refused(Scales)
    assert said.startswith("At step 10 these differ")
    assert "a plain attribute of the task" in said
    assert "must not train" not in said
    assert refused(Scales, val_check_interval=2).startswith("At step 4 these differ")


def test_a_run_that_does_not_repeat_itself():
    numbers = iter(range(1000))

    class Clock(Net):
        def training_step(self, batch, batch_idx):
            return next(numbers) * super().training_step(batch, batch_idx)

    assert "Nor does the run repeat itself" in refused(Clock)


def test_names_may_be_left_out():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def validation_step(self, batch, batch_idx):
            self.calls += 1
            return super().validation_step(batch, batch_idx)

    assert "buffers.calls: 1 of 1 numbers differ, by up to 3" in refused(Counts)
    for ignore in (["buffers.calls"], "buffers.*"):
        assert_validation_is_pure(Counts(), small.loader(), small.loader(12), ignore=ignore)
    assert "buffers.calls: " in refused(Counts, ignore="weights.*")


def test_it_says_where_nothing_validates():
    with pytest.raises(lk.errors.UsageError, match="There was no validation"):
        assert_validation_is_pure(Net(), small.loader())
