"""Requirements of the comparison of Keras with Lightning: a skeleton, defaults, and debugging."""

from __future__ import annotations

import importlib
import re
import traceback

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk
from lightkit.callbacks import EarlyStopping
from lightkit.errors import ConfigError, HookNameError
from tests.small import Net, loader


class Skeleton(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_S2_01_the_skeleton_trains(quiet):
    history = quiet(max_epochs=8).fit(Skeleton(), loader())
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]


def test_S2_02_the_two_lines_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from lightkit import Trainer

    seen = []

    class Where(Skeleton):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].device.type)
            return super().training_step(batch, batch_idx)

    model, dataloader = Where(), loader()
    if torch.cuda.is_available():
        Trainer(gpus=1).fit(model, dataloader)
        assert set(seen) == {"cuda"}
    else:
        trainer = Trainer(gpus=1)  # it asks for the GPU when it needs one
        with pytest.raises(ConfigError, match="GPU"):
            trainer.fit(model, dataloader)
        Trainer(gpus=0).fit(model, dataloader)
        assert set(seen) == {"cpu"}


def test_S2_03_without_a_gpu_the_error_says_what_to_write(quiet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"gpus=1 asks for a GPU.*Trainer\(gpus=0\)"):
        quiet(gpus=1).fit(Skeleton(), loader())
    task = Skeleton()
    quiet(gpus=0).fit(task, loader())
    assert task.device == torch.device("cpu")
    quiet(accelerator="auto").fit(task, loader())
    assert task.device == torch.device("cpu")


def test_S2_04_metrics_as_attributes(quiet):
    x = torch.randn(22, 4)
    y = (x.sum(1) > 0).long()

    class Classifies(Skeleton):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)
            self.train_acc = MulticlassAccuracy(2, average="micro")
            self.right = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            self.train_acc(logits, y)
            self.log("train_acc", self.train_acc)
            self.right.append((logits.argmax(1) == y).sum().item())
            return nn.functional.cross_entropy(logits, y)

    task = Classifies()
    history = quiet(max_epochs=2).fit(task, DataLoader(TensorDataset(x, y), 4))
    wanted = [sum(task.right[:6]) / 22, sum(task.right[6:]) / 22]  # reset between epochs
    assert history["train_acc"] == pytest.approx(wanted)


def test_S2_05_each_stage_has_its_step(quiet):
    called = []

    class Steps(Net):
        def training_step(self, batch, batch_idx):
            called.append("train")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            called.append("validation")

        def test_step(self, batch, batch_idx):
            called.append("test")

        def predict_step(self, batch, batch_idx):
            called.append("predict")

    task, trainer, one = Steps(), quiet(num_sanity_val_steps=0), loader(4, seed=2)
    trainer.fit(task, loader(4), one)
    trainer.test(task, one, verbose=False)
    trainer.predict(task, one)
    assert called == ["train", "validation", "test", "predict"]


def test_S2_06_hooks_at_the_ends_and_old_names_that_say_the_new_one(quiet):
    called = []

    class Hooks(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            called.append(batch_idx)

        def on_train_epoch_end(self):
            called.append("epoch")

    quiet().fit(Hooks(), loader(8))
    assert called == [0, 1, "epoch"]
    for old, new in (
        ("training_step_end", "on_train_batch_end"),
        ("training_epoch_end", "on_train_epoch_end"),
        ("validation_epoch_end", "on_validation_epoch_end"),
    ):
        with pytest.raises(HookNameError, match=new):
            type("Old", (Net,), {old: lambda self, outputs: None})


def test_S2_07_tensorboard_without_a_line(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    trainer = lk.Trainer(max_epochs=2)
    history = trainer.fit(Net(), loader(), loader(8, seed=2))
    board = EventAccumulator(str(trainer.run_dir)).Reload()
    assert {"train_loss", "val_loss"} <= set(board.Tags()["scalars"])
    curve = [(event.step, event.value) for event in board.Scalars("val_loss")]
    assert curve == [
        (5, pytest.approx(history[0]["val_loss"])),
        (10, pytest.approx(history[1]["val_loss"])),
    ]


def test_S2_08_progress_is_shown_by_default(tmp_path, monkeypatch, capsys):
    """What a person sees in a real terminal is tested in tests/test_screen.py."""
    monkeypatch.chdir(tmp_path)
    lk.Trainer(max_epochs=2).fit(Net(), loader(), loader(8, seed=2))
    said = capsys.readouterr().out
    assert re.search(r"epoch +train_loss +val_loss", said)
    assert len(re.findall(r"^ *[12]/2 ", said, re.MULTILINE)) == 2


def test_S2_09_a_task_holds_all_that_belongs_to_it(quiet):
    counted = []

    class Counts(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            counted.append(batch_idx)

    class Whole(Net):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(8, seed=2)

        def configure_callbacks(self):
            return Counts()

    history = quiet().fit(Whole())
    assert {"train_loss", "val_loss"} <= set(history[0])
    assert counted == [0, 1, 2, 3, 4]


def test_S2_10_a_single_line_and_more_arguments_for_more(tmp_path):
    options = {"loss": "mse", "default_root_dir": tmp_path, "enable_progress_bar": False}
    net = nn.Linear(4, 1)
    assert len(lk.fit(net, loader(), epochs=2, **options)) == 2
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    history = lk.fit(net, loader(), loader(8, seed=2), epochs=9, callbacks=[stop], **options)
    assert len(history) == 2
    with pytest.raises(lk.LightkitError, match="max_steps"):
        lk.fit(net, loader(), epochs=1, max_stepz=1, **options)


def test_S2_11_two_models_two_losses_and_a_rule_of_ones_own(quiet):
    class Two(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            for net, optimizer, loss in zip(
                (self.first, self.second),
                self.optimizers(),
                (nn.functional.mse_loss, nn.functional.l1_loss),
                strict=True,
            ):
                optimizer.zero_grad()
                self.manual_backward(loss(net(x), y))
                for parameter in net.parameters():
                    parameter.grad.sign_()  # the rule: steps of one size
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=0.01) for net in self.children()]

    task = Two()
    before = [p.detach().clone() for p in task.parameters()]
    quiet(limit_train_batches=1).fit(task, loader())
    for old, new in zip(before, task.parameters(), strict=True):
        torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.01))

    class Rule(Net):  # the same within automatic optimization
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.sub_(parameter.grad.sign(), alpha=0.01)

    task = Rule()
    before = task.net.weight.detach().clone()
    quiet(limit_train_batches=1).fit(task, loader())
    torch.testing.assert_close((task.net.weight - before).abs(), torch.full((1, 4), 0.01))


def test_S2_12_a_traceback_is_short_and_ends_in_ones_own_line(quiet):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).bmm(batch[1])

    with pytest.raises(RuntimeError) as caught:
        quiet().fit(Fails(), loader())
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames == [
        "test_S2_12_a_traceback_is_short_and_ends_in_ones_own_line",
        *("fit", "fit", "train_epoch", "train_step"),
        "training_step",
    ]


@pytest.mark.parametrize(
    ("template", "task", "data"),
    [
        ("tabular", "TabularNet", "TumourData"),
        ("digits", "DigitsNet", "DigitsData"),
        ("recurrent", "RecurrentNet", "SyllableData"),
    ],
)
def test_S2_13_the_three_kinds_of_networks(quiet, template, task, data):
    """Fully connected, convolutional, recurrent: each is a template that one can begin with."""
    pytest.importorskip("sklearn")
    model = importlib.import_module(f"templates.{template}.model")
    datamodule = getattr(importlib.import_module(f"templates.{template}.data"), data)()
    history = quiet(max_epochs=3, seed=0).fit(getattr(model, task)(), datamodule=datamodule)
    assert history[-1]["val_accuracy"] > 0.9


def test_S2_14_the_loop_is_the_one_that_is_written_by_hand(quiet):
    torch.manual_seed(3)
    by_hand = Net()
    torch.manual_seed(3)
    task, val = Net(), loader(10, seed=2)
    optimizer = by_hand.configure_optimizers()
    for x, y in loader():
        loss = nn.functional.mse_loss(by_hand(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        errors = torch.cat([(by_hand(x) - y) ** 2 for x, y in val])
    order = []

    class Watches(lk.Callback):
        def on_before_zero_grad(self, trainer, task, optimizer):
            order.append("zero_grad")

        def on_before_backward(self, trainer, task, loss):
            order.append("backward")

        def on_before_optimizer_step(self, trainer, task, optimizer):
            order.append("step")

    history = quiet(fused=False, callbacks=Watches()).fit(task, loader(), val)
    assert torch.equal(task.net.weight, by_hand.net.weight)
    assert history[0]["val_loss"] == pytest.approx(errors.mean().item())
    assert order == ["zero_grad", "backward", "step"] * 5
