"""`Trainer.explain`: the page is unrolled line by line, and is what a recorded run has called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightkit.hook_names import LOOP_HOOKS
from tests import small

#: What the loop calls on a task beside the hooks; all of it is overridden in `recording`.
PIECES = (
    *("configure_callbacks", "prepare_data", "configure_model", "configure_optimizers"),
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("training_step", "validation_step", "test_step", "predict_step", "backward"),
    *("optimizer_zero_grad", "configure_gradient_clipping", "optimizer_step", "lr_scheduler_step"),
)
DATA = ("prepare_data", "setup", "teardown", "train_dataloader", "val_dataloader", *PIECES[8:11])
BATCHES = 5


def noting(calls, base, names):
    """Returns a class that notes, with its own name, everything of ``names`` that is called."""

    def method(name):
        def call(self, *args, **kwargs):
            calls.append((type(self).__name__, name))
            return getattr(super(made, self), name)(*args, **kwargs)

        return call

    made = type(f"Noting{base.__name__}", (base,), {name: method(name) for name in names})
    return made


class Task(small.Net):
    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.net(batch).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.net(batch).mean())
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.net(batch).mean()

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        kinds = [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 9), "interval": interval}
                 for interval in ("step", "epoch")]  # fmt: skip
        return [optimizer], kinds

    def train_dataloader(self):
        return DataLoader(torch.randn(BATCHES, 4), 1)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Data(lk.DataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(BATCHES, 4), 1)

    val_dataloader = train_dataloader


def everything(calls, *, manual=False, **options):
    """Returns a trainer and a task that note all that is called on them and on two callbacks."""
    names = [name for name in PIECES if name != "optimizer_step" or not manual]
    task = noting(calls, Task, (*LOOP_HOOKS, *names))()
    task.automatic_optimization = not manual

    class Early(lk.Callback):
        order = -1

    both = [noting(calls, kind, LOOP_HOOKS)() for kind in (lk.Callback, Early)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "rehearse": False, "num_sanity_val_steps": 1}
    trainer = lk.Trainer(callbacks=both, **{**quiet, **options})
    trainer.on("train_batch_end", lambda: calls.append(("<lambda>", "on_train_batch_end")))
    return trainer, task


def tree(page):
    """Returns the sections of a page: lists of (text, who or remark, lines within it)."""
    root = []
    levels = [root]
    for line in page.splitlines():
        if not line:
            continue
        match = re.match(r"(?P<left> *\S+(?: \S+)*)(?:  +(?P<right>.*))?$", line)
        text, right = match["left"], match["right"] or ""
        depth = (len(text) - len(text.lstrip())) // 4
        entry = (text.strip(), right, [])
        del levels[depth + 1 :]
        levels[depth].append(entry)
        levels.append(entry[2])
    return root


class Unrolled:
    """Runs a page: yields (owner, name) of each call, in order."""

    def __init__(self, page, *, epochs, groups=(), due=lambda batch: False, sanity=1):
        self.lines = tree(page)
        self.validation = [i for t, _, i in self.lines if t == "validation:"]
        self.epochs, self.groups, self.due, self.sanity = epochs, groups, due, sanity
        self.calls, self.batches, self.done, self.last = [], BATCHES, 0, (False, False)
        self.run([one for one in self.lines if not one[0].startswith(("validation:", "where "))])

    def run(self, lines):
        for text, right, inner in lines:
            self.line(text, right, inner)

    def line(self, text, right, inner):
        if text == "for each epoch:":
            for _ in range(self.epochs):
                self.done = 0
                self.run(inner)
        elif text in ("for each group of batches:", "for each batch:"):
            for number, size in enumerate(self.groups):
                self.size, self.last = size, number == len(self.groups) - 1
                if text == "for each batch:":
                    self.done += 1
                self.run(inner)
        elif text == "for each batch of the group:":
            for number in range(self.size):
                self.done, self.of_group = self.done + 1, number == self.size - 1
                self.run(inner)
        elif text == "if it is the last of the group:":
            self.run(inner if self.of_group else [])
        elif text == "unless the epoch ends here:":
            self.run([] if self.last else inner)
        elif text == "sanity check:":
            self.batches = self.sanity
            self.run(inner)
            self.batches = BATCHES
        elif text == "for each loader, for each batch:":
            for _ in range(self.batches):
                self.run(inner)
        elif text.startswith("in it, by each"):
            self.run(inner)
        elif text == "validation":
            if "batches" not in right or self.due(self.done):
                self.run(self.validation[0])
        elif right and not right.startswith("#"):
            name = re.match(r"\w+", text)[0]
            for who in right.split(", "):
                self.calls.append((who.removesuffix(" (trainer.on)"), name))
        else:
            assert not inner, text


FITS = {
    "plain": ({}, {"groups": [1] * 5}),
    "groups": ({"accumulate_grad_batches": 2}, {"groups": [2, 2, 1]}),
    "within": ({"val_check_interval": 2}, {"groups": [1] * 5, "due": lambda n: n in (2, 4)}),
    "within groups": (
        {"val_check_interval": 4, "accumulate_grad_batches": 2},
        {"groups": [2, 2, 1], "due": lambda n: n == 4},
    ),
    "manual": ({"manual": True}, {"groups": [1] * 5}),
    "clip": ({"gradient_clip_val": 1.0, "limit_train_batches": 3}, {"groups": [1] * 3}),
    "no sanity check": ({"num_sanity_val_steps": 0}, {"groups": [1] * 5}),
}


@pytest.mark.parametrize("name", FITS)
def test_the_page_is_what_a_run_calls(name, tmp_path):
    options, expected = FITS[name]
    calls = []
    trainer, task = everything(calls, max_epochs=2, default_root_dir=tmp_path, **options)
    page = trainer.explain(task)
    calls.clear()  # configure_callbacks
    trainer.fit(task)
    assert Unrolled(page, epochs=2, **expected).calls == calls


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_page_of_an_evaluation_is_what_it_calls(stage, tmp_path):
    calls = []
    trainer, task = everything(calls, default_root_dir=tmp_path)
    page = trainer.explain(task, stage=stage)
    calls.clear()
    getattr(trainer, stage)(task)
    assert Unrolled(page, epochs=1).calls == calls


def test_the_parts_of_a_data_module_stand_where_they_are_called(tmp_path):
    calls = []
    task = small.Net()
    task.training_step = task.validation_step = lambda batch, batch_idx: task.net(batch).mean()
    data = noting(calls, Data, DATA)()
    quiet = {"logger": False, "enable_checkpointing": False, "rehearse": False}
    trainer = lk.Trainer(max_epochs=2, default_root_dir=tmp_path, **quiet)
    page = trainer.explain(task, datamodule=data)
    assert calls == []
    trainer.fit(task, datamodule=data)
    unrolled = Unrolled(page, epochs=2, groups=[1] * 5, sanity=2)
    assert [call for call in unrolled.calls if call[0] == "NotingData"] == calls


def test_the_page_is_the_drawing_of_the_hooks(monkeypatch):
    from tests.test_docs import drawn_order

    monkeypatch.setattr("tests.test_pseudocode.BATCHES", 1)
    trainer, task = everything([], num_sanity_val_steps=0)
    unrolled = Unrolled(trainer.explain(task), epochs=1, groups=[1])
    drawn = drawn_order()
    found = [name for who, name in unrolled.calls if who == "NotingTask" and name in drawn]
    assert found == drawn


def test_what_the_task_and_the_data_module_both_define_is_the_tasks_in_turn():
    class Both(Task):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

        def prepare_data(self):
            pass

    class Own(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

        def prepare_data(self):
            pass

    page = lines(lk.Trainer().explain(Both(), datamodule=Own()))
    assert page["prepare_data"] == "Own, Both"
    assert page["on_after_batch_transfer"] == "Both"
    assert page["train_dataloader"] == page["val_dataloader"] == "Own"


def lines(page):
    """Returns the left sides of a page with their right sides."""
    both = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in page.splitlines() if line]
    return {left: "".join(right) for left, *right in both}


def test_every_hook_with_a_listener_is_there_and_no_other():
    class Some(lk.Callback):
        def on_save_checkpoint(self, trainer, task, checkpoint):
            pass

        def on_exception(self, trainer, task, exception):
            pass

    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lk.Trainer(callbacks=Some(), enable_checkpointing=False, **quiet)
    page = trainer.explain(small.Net(), small.loader(), small.loader())
    assert re.findall(r"\b(?:on_\w+|setup|teardown)(?=  )", page) == [
        "on_save_checkpoint",
        "on_exception",
    ]
    everyone = trainer.explain(everything([])[1], small.loader(), small.loader())
    missing = [name for name in LOOP_HOOKS if not re.search(rf"\b{name}\b", everyone)]
    assert [name for name in missing if not name.startswith(("on_test", "on_predict"))] == []


def test_listeners_stand_in_their_order():
    class A(EarlyStopping):
        pass

    class Net(small.Net):
        def on_train_epoch_end(self):
            pass

        def configure_callbacks(self):
            assert self.trainer is trainer
            return [EarlyStopping("x")]

    trainer = lk.Trainer(callbacks=[A("train_loss")], enable_model_summary=False)
    trainer.on("train_epoch_end", print, every=2, rank_zero=True, filter=lambda trainer: True)
    trainer.add_to_loss(lambda loss: loss)
    task = Net()
    page = lines(trainer.explain(task))
    handler = "print (trainer.on, every=2, filter, rank_zero=True)"
    assert page["on_train_epoch_end"] == f"Net, A, EarlyStopping, {handler}, ProgressBar"
    assert page["on_loss"] == "<lambda> (trainer.on)"
    with pytest.raises(lk.LightkitError, match="has no trainer yet"):
        _ = task.trainer


OPTIONS = {
    "for each epoch:": [
        ({}, "# at most 10 epochs"),
        ({"max_epochs": 3, "max_steps": 1234567}, "# at most 3 epochs or 1234567 steps"),
        ({"max_time": "2 min", "max_epochs": -1}, "# at most 120 seconds"),
        ({"max_steps": -1, "max_epochs": -1}, "# without end"),
        ({"max_epochs": 0}, "# at most 0 epochs"),
        ({"fast_dev_run": 2, "max_epochs": 9}, "# at most 1 epoch"),
    ],
    "for each batch:": [
        ({}, ""),
        ({"limit_train_batches": 7}, "# at most 7"),
        ({"limit_train_batches": 0.5}, "# 0.5 of them"),
        ({"limit_train_batches": 1.0}, ""),
        ({"overfit_batches": 2}, "# at most 2"),
        ({"fast_dev_run": True}, "# at most 1"),
    ],
    "for each group of batches:": [
        ({"accumulate_grad_batches": 4}, "# of 4; the last one may be smaller"),
        (
            {"callbacks": GradientAccumulationScheduler({4: 8})},
            "# of {0: 1, 4: 8}; the last one may be smaller",
        ),
    ],
    "validation": [
        ({}, "# every epoch"),
        ({"check_val_every_n_epoch": 3}, "# every 3 epochs"),
        ({"val_check_interval": 1.0}, "# every epoch"),
        ({"val_check_interval": 0.25}, "# every 0.25 of an epoch"),
        ({"val_check_interval": 3, "check_val_every_n_epoch": 2}, "# every 3 batches, every 2 epochs"),
        (
            {"val_check_interval": 30, "check_val_every_n_epoch": None},
            "# every 30 batches, counted over epochs",
        ),
        ({"val_check_interval": 2000000}, "# every 2000000 batches"),
        ({"val_check_interval": "500 steps"}, "# every 500 steps"),
        ({"val_check_interval": "10 min"}, "# every 10 min"),
        ({"val_check_interval": 0.5, "fast_dev_run": 1}, "# every epoch"),
    ],
    "no validation": [({"limit_val_batches": 0}, "# limit_val_batches=0")],
    "for each loader, for each batch:": [
        ({"limit_val_batches": 3}, "# in eval mode, without gradients; at most 3"),
    ],
    "clip the gradients": [
        ({"gradient_clip_val": 0.5}, "# their norm to 0.5"),
        (
            {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "# each element to 0.5",
        ),
    ],
    "sanity check:": [
        ({"rehearse": False}, "# batches: 2"),
        ({}, "# batches: 2, unless it was rehearsed"),
        ({"num_sanity_val_steps": -1}, "# all batches"),
        ({"num_sanity_val_steps": 1}, "# batches: 1"),
    ],
    "rehearsal": [({"rehearse": True}, "# a few batches, a validation and a save, on a copy")],
    "make the loaders anew": [({"reload_dataloaders_every_n_epochs": 2}, "# every 2 epochs")],
}  # fmt: skip


@pytest.mark.parametrize("left", OPTIONS)
def test_options_stand_there_with_their_numbers(left):
    for options, right in OPTIONS[left]:
        page = lk.Trainer(**options).explain(small.Net(), small.loader(), small.loader())
        assert lines(page).get(left) == right, options


def test_what_does_not_happen_does_not_stand_there():
    page = lk.Trainer(fast_dev_run=True).explain(small.Net(), small.loader(), small.loader())
    assert not {"sanity check:", "rehearsal", "clip the gradients", "on_loss"} & set(lines(page))
    assert "rehearsal" not in lk.Trainer(rehearse=False).explain(small.Net())
    assert "rehearsal" not in lk.Trainer(overfit_batches=1).explain(small.Net())
    for val in (None, [], {}):
        page = lines(lk.Trainer().explain(small.Net(), small.loader(), val))
        assert page["no validation"] == "# there is no loader for it"
    for data in ((iter(small.loader()),), (small.loader(), iter(small.loader()))):
        page = lines(lk.Trainer(rehearse=True).explain(small.Net(), *data))
        assert not {"sanity check:", "rehearsal"} & set(page)

    class Alone(lk.TaskModule):
        def training_step(self):
            return None

    page = lines(lk.Trainer().explain(Alone()))
    assert page["no validation"] == "# Alone has no validation_step"
    assert "for each step, without data:" in page
    assert "bring the batch to the device" not in page
    assert "loss = 0" in lk.Trainer().explain(lk.TaskModule())
    for stage, what in {"validate": "validation_step", "test": "validation_step"}.items():
        page = lines(lk.Trainer().explain(Alone(), stage=stage))
        assert page[what] == "# Alone defines none"
    assert "forward" in lines(lk.Trainer().explain(Alone(), stage="predict"))


def test_a_sharded_model_has_pieces_of_its_own_and_no_rehearsal(monkeypatch):
    class Blocks(small.Net):
        def configure_sharding(self):
            return [self.net]

        def init_weights(self):
            pass

    trainer = lk.Trainer(rehearse=True)
    assert "configure_sharding" not in trainer.explain(Blocks())
    monkeypatch.setattr(type(trainer.session.strategy), "sharded", True)
    page = [line.split()[0] for line in trainer.explain(Blocks()).splitlines() if line]
    assert page[:3] == ["configure_sharding", "init_weights", "configure_optimizers"]
    assert "rehearsal" not in page


def test_it_may_be_asked_in_a_fit_and_after_it(tmp_path):
    pages = []

    class Asks(lk.Callback):
        def on_train_start(self, trainer, task):
            pages.append(trainer.explain(task, small.loader()))
            assert task.trainer is trainer
            task.log("still", 1.0)

        def on_train_epoch_end(self, trainer, task):
            assert trainer.callback_metrics["still"] == 1

    trainer = lk.Trainer(callbacks=Asks(), default_root_dir=tmp_path, rehearse=False, max_epochs=1)
    task = small.Net()
    before = trainer.explain(task, small.loader())
    trainer.fit(task, small.loader())
    assert pages == [before]
    trainer.callbacks.append(EarlyStopping("train_loss"))
    after = lines(trainer.explain(task, small.loader()))
    assert after["on_train_epoch_end"] == "Asks, EarlyStopping, ProgressBar"
    assert after["on_load_checkpoint"] == "ModelCheckpoint"  # the one of before


def test_it_says_what_cannot_be_explained():
    with pytest.raises(lk.errors.ConfigError, match=r"stage='tests'.*Did you mean 'test'"):
        lk.Trainer().explain(small.Net(), stage="tests")
    with pytest.raises(lk.errors.UsageError, match="Net is a class"):
        lk.Trainer().explain(small.Net)


def test_a_notebook_shows_it_as_it_is():
    page = lk.Trainer().explain(small.Net())
    assert isinstance(page, str)
    assert repr(page) == str(page) == page
    assert max(map(len, page.splitlines())) < 100


def test_the_command(capsys, tmp_path, monkeypatch):
    from lightkit.cli import main

    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    assert main(["explain", "--config", "configs/digits.yaml", "--trainer.max_epochs", "7"]) == 0
    out = capsys.readouterr().out
    assert lines(out)["for each epoch:"] == "# at most 7 epochs"
    assert lines(out)["training_step"] == "DigitsNet"
    monkeypatch.setattr(lk.Trainer, "is_global_zero", False)  # under torchrun one of them speaks
    assert main(["explain", "--config", "configs/digits.yaml"]) == 0
    assert capsys.readouterr().out == ""


def test_the_page_in_the_documentation_is_what_is_printed(capsys):
    page = (Path(__file__).parents[1] / "docs/loop.md").read_text("utf-8")
    part = page.partition("## With your own hooks in it")[2]
    exec(part.partition("```python\n")[2].partition("```")[0], {"__name__": "loop"})
    shown = part.partition("<!-- the page of one trainer -->\n```text\n")[2].partition("```")[0]
    assert shown == capsys.readouterr().out
