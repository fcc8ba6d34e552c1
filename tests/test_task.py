"""What a user's task can do, with a trainer and without."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.errors import CheckpointError, NotRunningError, UsageError
from lightkit.task import overrides, require_steps


class Net(lk.TaskModule):
    def __init__(self, width: int = 2, lr: float = 0.1, *, net=None, tags=()):
        super().__init__()
        self.net = net or nn.Linear(width, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).pow(2).mean()
        self.log("own", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_own", self(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        defaults = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
        }
        return lk.Trainer(**defaults | options)

    return make


def data(batches=2):
    return DataLoader(torch.ones(batches, 2), 1)


# --- arguments and checkpoints ---------------------------------------------------------------------


def test_arguments_are_captured():
    task = Net(3, tags=["a"])
    assert dict(task.hparams) == {"width": 3, "lr": 0.1, "net": None, "tags": ["a"]}
    assert task.hparams.width == 3


def test_a_task_is_rebuilt_from_the_checkpoint_of_a_fit(trainer, tmp_path):
    task = Net(lr=0.05)
    run = trainer(enable_checkpointing=True)
    run.fit(task, data(), data())
    path = run.checkpoint_callback.last_model_path or run.checkpoint_callback.best_model_path
    again = Net.load_from_checkpoint(path)
    assert again.hparams == task.hparams
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True)
    )
    assert Net.load_from_checkpoint(path, lr=7.0).hparams.lr == 7.0
    bare = Net(2)
    bare.load_state_dict(torch.load(path, weights_only=True)["model"])
    assert torch.equal(bare.net.weight, task.net.weight)


def test_a_network_as_argument_is_asked_for(trainer, tmp_path):
    task = Net(net=Inner())

    class Save(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    trainer(callbacks=[Save()]).fit(task, data())
    with pytest.raises(CheckpointError, match="net"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt")
    again = Net.load_from_checkpoint(tmp_path / "a.ckpt", net=Inner())
    assert torch.equal(again.net.layer.weight, task.net.layer.weight)
    inner = lk.TaskModule.load_weights
    fresh = Net(net=Inner())
    inner(fresh, tmp_path / "a.ckpt")
    assert torch.equal(fresh.net.layer.weight, task.net.layer.weight)


# --- copies ------------------------------------------------------------------------------------------


class Copies(lk.Callback):
    """Copies the task in the middle of a run in three ways."""

    def __init__(self):
        self.copies = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        file = io.BytesIO()
        torch.save(task, file)
        file.seek(0)
        self.copies += [
            copy.deepcopy(task),
            pickle.loads(pickle.dumps(task)),
            torch.load(file, weights_only=False),
        ]
        self.size = len(pickle.dumps(task))


def test_copies_made_during_a_run_are_tied_to_nothing(trainer):
    callback, task = Copies(), Net()
    trainer(callbacks=[callback]).fit(task, data(1))
    for other in callback.copies:
        assert other._link.trainer is None
        assert other._link.metrics is None
        assert torch.equal(other.net.weight, task.net.weight)
        assert other.hparams == task.hparams
        other.training_step(torch.ones(1, 2), 0)  # its log goes nowhere
        with pytest.raises(NotRunningError):
            _ = other.trainer
    assert callback.size < 10_000  # the trainer is not dragged along
    trainer().fit(callback.copies[0], data(1))


# --- without a trainer -------------------------------------------------------------------------------


def test_a_task_is_an_ordinary_module():
    task = Net()
    loss = task.training_step(torch.ones(3, 2), 0)
    loss.backward()
    assert task.net.weight.grad is not None
    task.validation_step(torch.ones(3, 2), 0)
    task.log("x", object())
    task.log_dict({"y": object()})
    assert (task.current_epoch, task.global_step) == (0, 0)
    assert (task.global_rank, task.local_rank) == (0, 0)
    assert (task.logger, task.loggers) == (None, [])
    assert set(task.state_dict()) == {"net.weight", "net.bias"}
    task.manual_backward(task.training_step(torch.ones(3, 2), 0))
    with pytest.raises(NotRunningError, match="Net has no trainer yet"):
        _ = task.trainer
    with pytest.raises(NotRunningError, match="only while fit runs"):
        task.optimizers()


def test_predictions_take_the_input_of_a_pair():
    task = Net()
    x = torch.ones(3, 2)
    assert torch.equal(task.predict_step((x, 1), 0), task(x))
    assert torch.equal(task.predict_step(x, 0), task(x))


def test_device_and_type():
    class Empty(lk.TaskModule):
        pass

    class Buffer(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("b", torch.zeros(1, device="meta"))

    assert (Empty().device, Empty().dtype) == (torch.device("cpu"), torch.float32)
    assert Buffer().device.type == "meta"
    task = Net().to(torch.float64)
    assert (task.device.type, task.dtype, task.on_gpu) == ("cpu", torch.float64, False)


def test_freezing():
    task = Net()
    task.freeze()
    assert not any(p.requires_grad for p in task.parameters())
    assert not task.training
    assert not task.net.training
    task.unfreeze()
    assert all(p.requires_grad for p in task.parameters())
    assert task.training
    assert task.net.training


def test_print_goes_where_the_lines_of_the_run_go(trainer, capsys):
    class Talks(Net):
        def on_train_start(self):
            self.print("two", 2, sep="-")

    trainer().fit(Talks(), data(1))
    assert "two-2\n" in capsys.readouterr().out


# --- within a run ------------------------------------------------------------------------------------


class Manual(Net):
    """Steps two optimizers itself, one of them clipped, and moves their schedules."""

    def __init__(self, algorithm="norm"):
        super().__init__()
        self.automatic_optimization = False
        self.other, self.algorithm = nn.Linear(2, 1), algorithm
        self.norms, self.rates = [], []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, net in ((first, self.net), (second, self.other)):
            optimizer.zero_grad()
            self.manual_backward(100 * net(batch).pow(2).mean() + net.weight.sum())
            self.clip_gradients(optimizer, 0.5, self.algorithm)
            gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
            self.norms.append(
                gradients.abs().max() if self.algorithm == "value" else gradients.norm()
            )
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.rates.append(first.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (self.net, self.other)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_manual_optimization(trainer, algorithm):
    task = Manual(algorithm)
    before = [p.clone() for p in task.parameters()]
    trainer().fit(task, data(2))
    assert task.global_step == 2  # steps of training, whatever the number of optimizers
    assert [float(n) for n in task.norms] == pytest.approx([0.5] * 4, rel=1e-3)
    assert task.rates == [5e-4, 2.5e-4]
    assert not any(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


def test_clipping_by_hand_means_true_gradients_under_fp16(trainer):
    class Look(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(0.1 * self.net(batch).float().mean())
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()

        def on_before_optimizer_step(self, optimizer):
            seen.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm()))

    seen = []
    trainer(precision="16-mixed").fit(Look(), data(2))
    assert seen == pytest.approx([0.05] * 2, rel=1e-3)


def test_toggling_optimizers(trainer):
    class Toggles(Manual):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.toggle_optimizer(first)
            seen.append(learning(self))
            self.manual_backward(self.other(self.net(batch).expand(-1, 2)).mean())
            seen.append([p.grad is not None for p in self.parameters()])
            self.toggle_optimizer(second)  # without an end of the first
            seen.append(learning(self))
            self.untoggle_optimizer(second)
            seen.append(learning(self))

    def learning(task):
        return [p.requires_grad for p in task.parameters()]

    seen, task = [], Toggles()
    task.net.bias.requires_grad_(False)
    trainer().fit(task, data(1))
    assert [name for name, _ in task.named_parameters()] == [
        "net.weight", "net.bias", "other.weight", "other.bias",
    ]  # fmt: skip
    only_net = [True, False, False, False]
    assert seen == [only_net, only_net, [False, False, True, True], [True, False, True, True]]


def test_one_optimizer_and_scheduler_come_alone(trainer):
    seen = []

    class Look(Net):
        def on_train_start(self):
            seen.append((self.optimizers(), self.lr_schedulers()))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Without(Look):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer().fit(Look(), data(1))
    trainer().fit(Without(), data(1))
    (optimizer, scheduler), (_, none) = seen
    assert len(optimizer.param_groups) == 1
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    assert none is None


def test_clipping_takes_the_trainers_value(trainer):
    class Clips(Net):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            self.net.weight.grad.fill_(100.0)
            self.clip_gradients(optimizer)
            self.given = (gradient_clip_val, gradient_clip_algorithm)
            self.largest = float(self.net.weight.grad.max())

    task = Clips()
    trainer(gradient_clip_val=0.25, gradient_clip_algorithm="value").fit(task, data(1))
    assert task.given == (0.25, "value")
    assert task.largest == 0.25


def test_the_trainer_stays_known_after_the_run(trainer):
    task = Net()
    run = trainer()
    run.fit(task, data(2))
    assert task.trainer is run
    assert (task.current_epoch, task.global_step) == (1, 2)
    with pytest.raises(NotRunningError):
        task.optimizers()


def test_what_a_call_needs():
    assert overrides(Net(), "validation_step")
    assert not overrides(Net(), "test_step")
    with pytest.raises(UsageError, match="got Linear"):
        require_steps(nn.Linear(1, 1), {})
    with pytest.raises(UsageError, match="TaskModule defines no training_step, which fit calls"):
        require_steps(lk.TaskModule(), {"training_step": "fit calls"})


@pytest.mark.parametrize("step", ["validation_step", "configure_optimizers", "test_step"])
def test_steps_that_are_missing_say_so(step):
    arguments = () if step == "configure_optimizers" else (None, 0)
    with pytest.raises(NotImplementedError, match="TaskModule must define"):
        getattr(lk.TaskModule(), step)(*arguments)
