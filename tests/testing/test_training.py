"""`assert_trains`: silent where a task learns, clear where a part of it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.testing import assert_trains
from tests import small


class Net(small.Net):
    """With layers that have no part, each in its own way."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.dead = nn.Linear(4, 1)
        self.left_out = nn.Linear(4, 1)
        self.still = nn.Linear(4, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.net(x) + 0 * self.dead(x) + self.left_out(x) + self.still(x)

    def configure_optimizers(self):
        parts = [*self.net.parameters(), *self.dead.parameters(), *self.unused.parameters()]
        groups = [{"params": parts}, {"params": self.still.parameters(), "lr": 0.0}]
        return torch.optim.SGD(groups, lr=0.01)


def refused(*given, **options):
    with pytest.raises(AssertionError) as caught:
        assert_trains(*given, **options)
    return str(caught.value).splitlines()


def test_a_good_task_passes_and_stays_as_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    task, loader = small.Net(), small.loader()
    before = [p.clone() for p in task.parameters()]
    drawn = torch.get_rng_state()
    assert_trains(task, loader)
    assert_trains(lambda: small.Net(), lambda: small.loader(), steps=10)
    assert all(map(torch.equal, before, task.parameters()))
    assert torch.equal(drawn, torch.get_rng_state())
    assert [*tmp_path.iterdir()] == []
    assert caplog.text == ""


def test_each_part_that_does_not_learn_is_named_once():
    first, *lines = refused(Net(), small.loader(), steps=20)
    assert first == "In 20 steps on one batch:"
    assert [line.partition(". ")[0] for line in lines] == [
        "  2 parameters without a gradient: unused.weight, unused.bias",
        "  2 parameters with a gradient of zero alone: dead.weight, dead.bias",
        "  2 parameters in no optimizer: left_out.weight, left_out.bias",
        "  2 parameters that the steps do not change: still.weight, still.bias",
    ]


def test_names_may_be_left_out():
    ignore = ["unused.*", "dead.*", "still.*", "left_out.weight"]
    lines = refused(Net(), small.loader(), steps=5, ignore=ignore)
    assert lines[1].startswith("  1 parameter in no optimizer: left_out.bias. Pass them to")
    assert_trains(Net(), small.loader(), steps=5, ignore=[*ignore, "left_out.bias"])


def test_a_loss_that_does_not_fall():
    class Up(small.Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, maximize=True)

    _, line = refused(Up(), small.loader(), steps=20)
    assert line.startswith("  the loss did not fall: ")
    assert "(means over 2). Look at its sign" in line


def test_a_loss_that_is_not_finite():
    class Nan(small.Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    (line,) = refused(Nan(), small.loader())
    assert line.startswith("The task does not train: The training loss became nan at step 1")


def test_it_trains_on_one_batch_of_any_source():
    seen = []

    class Own(small.Net):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            return small.loader()

    class Data(lk.DataModule):
        def train_dataloader(self):
            return small.loader()

    assert_trains(Own(), steps=3)
    assert_trains(Own(), datamodule=Data(), steps=3)
    assert_trains(Own(), iter_of(small.loader()), steps=3)
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert len(seen) == 9


def iter_of(loader):
    """Returns what gives batches without a length."""

    class Stream:
        def __iter__(self):
            return iter(loader)

    return Stream()


def test_manual_optimization_several_optimizers_and_callbacks(tmp_path):
    class Two(small.Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Embedding(9, 1, sparse=True)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = (self.net(batch[0]) + self.other(torch.tensor([2, 5, 5, 1]))).square().mean()
                optimizer.zero_grad()
                self.manual_backward(-loss)  # nothing is asked of it
                optimizer.step()

        def configure_callbacks(self):
            return [lk.callbacks.ModelCheckpoint(tmp_path)]

        def configure_optimizers(self):
            one = torch.optim.SGD(self.net.parameters(), 0.01)
            return [one, torch.optim.SparseAdam(self.other.parameters(), 0.01)]

    callbacks = [lk.callbacks.ModelCheckpoint(tmp_path), lk.callbacks.LearningRateMonitor()]
    assert_trains(Two(), small.loader(), steps=4, callbacks=callbacks, gradient_clip_val=None)
    assert [*tmp_path.iterdir()] == []


def test_layers_without_sizes_schedules_of_the_validation_and_closures():
    class Plateau(small.Net):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(1)

        def configure_optimizers(self):
            optimizer = torch.optim.LBFGS(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}

    with torch.no_grad():
        made = Plateau()
        made.net(torch.ones(1, 4))
    assert_trains(made, small.loader(), small.loader(), steps=3)


def test_data_that_no_task_could_learn_at_all():
    x = torch.zeros(4, 4)
    lines = refused(small.Net(), DataLoader(TensorDataset(x, x[:, :1] + 1), 4), steps=10)
    assert [line.partition(". ")[0] for line in lines[1:]] == [
        "  1 parameter with a gradient of zero alone: net.weight"
    ]


def test_a_task_that_has_its_own_data_learns_one_batch_also_where_a_function_makes_it():
    batches = []

    class Own(small.Net):
        def training_step(self, batch, batch_idx):
            batches.append(tuple(batch[0].flatten().tolist()))
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            return small.loader()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}

        val_dataloader = train_dataloader

    assert_trains(Own, steps=10)
    assert len(set(batches)) == 1


@pytest.mark.parametrize("automatic", [True, False])
def test_a_task_that_never_steps(automatic):
    class Never(small.Net):
        automatic_optimization = automatic

        def training_step(self, batch, batch_idx):
            if batch_idx == 1:  # which never comes
                self.optimizers().step()

    lines = refused(Never(), small.loader(), steps=10)
    assert [line.partition(":")[0] for line in lines[1:]] == ["  no optimizer was stepped"]


def test_one_name_may_be_left_out_without_a_list():
    ignore = "head.*"  # as a list of letters it would be all names

    class Heads(small.Net):
        def __init__(self):
            super().__init__()
            self.head, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    _, line = refused(Heads(), small.loader(), ignore=ignore)
    assert line.startswith("  2 parameters without a gradient: other.weight, other.bias.")


@pytest.mark.parametrize("steps", [1, 0, 2.5])
def test_it_says_what_cannot_be_tried(steps):
    with pytest.raises(lk.errors.UsageError, match="from 2 on"):
        assert_trains(small.Net(), small.loader(), steps=steps)
    with pytest.raises(lk.errors.UsageError, match="train_dataloaders=lambda"):
        assert_trains(small.Net(), iter(small.loader()))
    with pytest.raises(lk.errors.UsageError, match="max_epochs, max_steps: .* steps=50"):
        assert_trains(small.Net(), small.loader(), max_steps=3, max_epochs=1)
    for given in (nn.Linear(4, 1), lambda: nn.Linear(4, 1)):
        with pytest.raises(lk.errors.UsageError, match="a TaskModule is needed, got Linear"):
            assert_trains(given, small.loader())
