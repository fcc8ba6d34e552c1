"""The rehearsal: that nothing of it remains, and what it finds."""

from __future__ import annotations

import collections
import json
import logging
import os
import random
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightkit as lk
from lightkit import rehearsal
from lightkit.callbacks import EMA, SWA, EarlyStopping, ModelCheckpoint, Unfreeze
from lightkit.differences import compare
from lightkit.errors import ConfigError
from tests.distributed.harness import torchrun


def dataset(samples: int = 40) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x.sum(1, keepdim=True))


class Net(lk.TaskModule):
    """With everything in which traces may stay: dropout, batch norm, metric, attribute, draws."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
        self.head = nn.Linear(8, 1)
        self.seen, self.losses = 0, []

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        noise = random.random() + np.random.rand()
        loss = nn.functional.mse_loss(self(batch[0] + 0.01 * noise), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("own", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]) + torch.randn(()), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": plateau}


class Plain(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        parts = (self.body.parameters(), self.head.parameters())
        return [torch.optim.Adam(part, lr=0.01) for part in parts]


class OneCycle(Net):
    """Its schedule takes its length from the trainer, and ends an hour before a shorter one."""

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        assert steps > 10
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [OneCycleLR(optimizer, 0.1, steps, pct_start=10 / steps)]


class Drawing(Dataset):
    """Draws from generators of its own, in a transform too, and counts."""

    def __init__(self):
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.transform = types.SimpleNamespace(numpy=np.random.default_rng(3))
        self.count, self.recent = 0, []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.count += 1
        self.recent.append(index)
        drawn = self.python.random() + self.transform.numpy.random() + 0.01 * self.count
        x = torch.randn(4, generator=self.torch) + drawn
        return x, x.sum(0, keepdim=True)


class Stream(IterableDataset):
    """A stream that knows its place."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        for _ in range(24):
            self.next += 1
            x = torch.full((4,), float(self.next % 7))
            yield x, x[:1]


class Placed(Stream):
    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def shuffled(**options) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(dataset(), 4, shuffle=True, generator=generator, **options)


class Data(lk.DataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append("setup")
        self.train, self.val = torch.utils.data.random_split(dataset(), [32, 8])

    def train_dataloader(self):
        self.calls.append("train")
        return DataLoader(self.train, 4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 4)

    def teardown(self, stage):
        self.calls.append("teardown")


TASKS = {
    "plain": (Net, {}),
    "manual": (Manual, {}),
    "one cycle": (OneCycle, {}),
    "accumulation": (Net, {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "averages": (Net, {"callbacks": lambda: [EMA(0.9), EarlyStopping("val_loss", patience=9)]}),
    "swa": (Net, {"callbacks": lambda: SWA(0.05)}),
    "unfreeze": (Net, {"callbacks": lambda: Unfreeze({1: "body"})}),
    "by steps": (Net, {"val_check_interval": "3 steps", "limit_train_batches": 7}),
    "reloaded": (Net, {"reload_dataloaders_every_n_epochs": 1}),
}
LOADERS = {
    "generator": shuffled,
    "global": lambda: DataLoader(dataset(), 4, shuffle=True),
    "workers": lambda: shuffled(num_workers=2),
    "persistent": lambda: shuffled(num_workers=1, persistent_workers=True),
    "drawing": lambda: DataLoader(Drawing(), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
    "placed": lambda: DataLoader(Placed(), 4),
    "tensors": lambda: lk.TensorLoader(*dataset().tensors, batch_size=4, shuffle=True),
    "list": lambda: [dataset()[i : i + 4] for i in range(0, 40, 4)],
}
CASES = [(task, "generator") for task in TASKS] + [("plain", loader) for loader in LOADERS]


def ends_of(tmp_path, task: str, loader: str, rehearse: bool, val=None) -> dict:
    kind, options = TASKS[task]
    options = dict(options)
    if callable(options.get("callbacks")):
        options["callbacks"] = options["callbacks"]()
    lk.seed_everything(5, verbose=False)
    model, train = kind(), LOADERS[loader]()
    val = DataLoader(dataset(12), 4, shuffle=True) if val is None else val
    given: dict = {"train_dataloaders": train, "val_dataloaders": val}
    if "reload_dataloaders_every_n_epochs" in options:
        given = {"datamodule": Data()}
    trainer = lk.Trainer(
        max_epochs=3,
        rehearse=rehearse,
        default_root_dir=tmp_path / f"{rehearse}",
        logger=lk.loggers.JSONLLogger(),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, **given)
    rows = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    for name in ("lightkit", "loggers", "history"):
        del saved[name]
    saved["loop"].pop("seconds")
    saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "Checkpoint" not in k}
    return {
        "losses": model.losses,
        "seen": model.seen,
        "rows": [{k: v for k, v in json.loads(row).items() if "time" not in k} for row in rows],
        "saved": saved,
        "random": lk.rng.rng_state(),
        "calls": getattr(given.get("datamodule"), "calls", None),
    }


@pytest.mark.parametrize(("task", "loader"), CASES)
def test_a_fit_is_the_same_bit_for_bit_with_and_without_it(tmp_path, caplog, task, loader):
    caplog.set_level(logging.INFO, "lightkit")
    without = ends_of(tmp_path, task, loader, rehearse=False)
    assert "rehearsed" not in caplog.text
    found = ends_of(tmp_path, task, loader, rehearse=True)
    assert "rehearsed: " in caplog.text
    assert "not rehearsed" not in caplog.text
    assert list(compare(without, found, "", [])) == []
    name = TASKS[task][0].__name__
    assert [path.name for path in (tmp_path / "True").iterdir()] == [name]  # its folder is gone
    assert [path.name for path in (tmp_path / "True" / name).iterdir()] == ["version_0"]
    assert {path.name for path in tmp_path.iterdir()} == {"True", "False"}


def test_a_data_module_prepares_itself_once(tmp_path):
    data = Data()
    lk.Trainer(
        max_epochs=1,
        rehearse=True,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Net(), datamodule=data)
    assert data.calls == ["prepare_data", "setup", "train", "teardown"]
    assert data.trainer.rehearsing is False


class Held(Plain):
    """With functions that hold the task itself, one where nobody looks for it."""

    def __init__(self):
        super().__init__()
        self.call, self.last = [lambda x: self.body(x)], {}
        self.head.register_forward_hook(lambda module, inputs, output: self.last.update(x=output))

    def forward(self, x):
        found = self.head(self.call[0](x))
        assert found is self.last["x"]
        return found


def test_a_function_of_the_task_leaves_no_trace_in_it(quiet):
    task = Held()
    before = {name: b.clone() for name, b in task.named_buffers()}
    seen = []

    def look(trainer, task):
        seen.append([torch.equal(b, before[name]) for name, b in task.named_buffers()])
        seen.append([p.grad for p in task.parameters()])

    trainer = quiet(rehearse=True)
    trainer.on("fit_start", look)
    trainer.fit(task, shuffled())
    assert seen == [[True] * 3, [None] * 6]


# --- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rehearsed"),
    [
        ({"max_epochs": 10}, False),  # 100 steps
        ({"max_epochs": 11}, True),
        ({"max_epochs": 11, "rehearse": False}, False),
        ({"max_epochs": 1, "rehearse": True}, True),
        ({"max_epochs": 11, "overfit_batches": 2}, False),
        ({"max_epochs": 11, "fast_dev_run": True, "rehearse": True}, False),
        ({"max_epochs": -1, "max_time": {"seconds": 1}, "max_steps": 30}, False),
    ],
)
def test_it_comes_before_fits_that_are_not_short(quiet, caplog, options, rehearsed):
    caplog.set_level(logging.INFO, "lightkit")
    trainer = quiet(**options)
    trainer.on("train_start", lambda trainer: trainer.stop("seen"))
    trainer.fit(Net(), shuffled(), DataLoader(dataset(8), 4))
    assert ("rehearsed:" in caplog.text) is rehearsed


def test_a_resumed_fit_is_not_rehearsed(tmp_path, caplog):
    caplog.set_level(logging.INFO, "lightkit")
    options = {"default_root_dir": tmp_path, "enable_progress_bar": False, "rehearse": True}
    options["enable_model_summary"] = False
    lk.Trainer(max_epochs=1, **options).fit(Plain(), shuffled())
    assert caplog.text.count("rehearsed:") == 1
    lk.Trainer(max_epochs=2, **options).fit(Plain(), shuffled(), ckpt_path="last")
    assert caplog.text.count("rehearsed:") == 1


class Looks(lk.Callback):
    def __init__(self):
        self.events, self.sanity = [], []

    def on_sanity_check_start(self, trainer, task):
        self.events.append("sanity check")

    def on_validation_start(self, trainer, task):
        self.sanity.append(trainer.sanity_checking)


class Asks(Net):
    def __init__(self):
        super().__init__()
        self.told = Asks.told = []

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.told.append((self.trainer.rehearsing, self.trainer.sanity_checking))

    def __deepcopy__(self, memo):
        other = Asks()
        other.load_state_dict(self.state_dict())
        self.told = other.told = Asks.told
        return other


def test_it_takes_the_place_of_the_sanity_check(quiet):
    task, val = Asks(), DataLoader(dataset(16), 4)
    quiet(rehearse=True).fit(task, shuffled(), val)
    assert task.told == [(True, True)] * 2 + [(False, False)] * 4
    task = Asks()
    quiet(rehearse=True, num_sanity_val_steps=1).fit(task, shuffled(), val)
    assert task.told == [(True, True)] * 2 + [(False, True)] + [(False, False)] * 4


def test_who_listens_to_the_sanity_check_gets_it(quiet):
    looks = Looks()
    quiet(rehearse=True, callbacks=looks).fit(Net(), shuffled(), DataLoader(dataset(8), 4))
    assert looks.events == ["sanity check"]
    assert looks.sanity == [True, False]


class Once(IterableDataset):
    def __init__(self):
        self.lines = iter(range(40))

    def __iter__(self):
        for number in self.lines:
            yield torch.full((4,), float(number)), torch.ones(1)


class Stuck(Net):
    def __init__(self):
        super().__init__()
        self.lock = __import__("threading").Lock()


class Sized(Net):
    def __init__(self):
        super().__init__()
        self.body[0] = nn.LazyLinear(8)


@pytest.mark.parametrize(
    ("task", "train", "why"),
    [
        (Net, lambda: DataLoader(Once(), 4), "holds a range_iterator, which is read only once"),
        (
            Net,
            lambda: iter(list(shuffled())),
            r"the loader (list_iterator) gives its batches only once",
        ),
        (
            Stuck,
            shuffled,
            "Stuck or its data cannot be copied: cannot pickle '_thread.lock' object",
        ),
        (Sized, shuffled, "layers of the task get their sizes from the first batch"),
    ],
)
def test_where_it_cannot_be_the_sanity_check_stays(quiet, caplog, task, train, why):
    looks, count = Looks(), []
    trainer = quiet(rehearse=True, callbacks=looks)
    trainer.on("train_batch_end", lambda: count.append(1))
    trainer.fit(task(), train(), DataLoader(dataset(8), 4))
    assert len(count) == 10  # none of the batches is missing
    assert looks.events == ["sanity check"]
    (line,) = [r for r in caplog.records if "rehearsed" in r.getMessage()]
    assert line.getMessage().startswith("not rehearsed: ")
    assert why in line.getMessage()
    assert line.levelno == logging.WARNING  # for it was asked for


# --- what it does --------------------------------------------------------------------------------


class Elsewhere(lk.loggers.Logger):
    """A logger that sends: none of it may be seen twice."""

    def __init__(self):
        self.sent = []

    @property
    def experiment(self):
        return self.sent

    def log_metrics(self, metrics, step):
        self.sent.append(step)


class Sends(Net):
    def validation_step(self, batch, batch_idx):
        assert isinstance(self.logger, Elsewhere)
        self.logger.experiment.append("from the step")
        self.logger.send_picture(1)
        return super().validation_step(batch, batch_idx)


def test_loggers_and_callbacks_see_nothing_of_it(quiet):
    calls = []

    class Sees(lk.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            calls.append(batch_idx)

    logger = Elsewhere()
    logger.send_picture = lambda picture: logger.sent.append("picture")
    trainer = quiet(rehearse=True, logger=logger, callbacks=Sees(), limit_train_batches=4)
    trainer.on("train_batch_end", lambda: calls.append("function"))
    trainer.fit(Sends(), shuffled(), DataLoader(dataset(4), 4))
    assert calls == [0, "function", 1, "function", 2, "function", 3, "function"]
    assert logger.sent == [4, "from the step", "picture", 4]


def test_it_ends_early_where_batches_are_slow(quiet, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lightkit")
    now = [0.0]
    monkeypatch.setattr(rehearsal, "_clock", lambda: now[0])

    class Slow(Plain):
        def training_step(self, batch, batch_idx):
            now[0] += 1.5
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 0.6
            return super().validation_step(batch, batch_idx)

    options = {"rehearse": True, "accumulate_grad_batches": 3, "enable_checkpointing": True}
    val = [DataLoader(dataset(8), 4), DataLoader(dataset(12), 4)]
    quiet(**options).fit(Slow(), shuffled(), val)
    assert "rehearsed: 1 batch of training, 2 of validation, a checkpoint of " in caplog.text
    assert "kB, 2.7 s" in caplog.text


def test_a_large_checkpoint_is_not_written(quiet, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lightkit")
    monkeypatch.setattr(rehearsal, "LARGEST", 100)
    quiet(rehearse=True, enable_checkpointing=True).fit(Plain(), shuffled())
    assert "a checkpoint of 592 bytes (not written: too large to be tried), " in caplog.text


class Writes(Elsewhere):
    """A logger with things that tasks ask for."""

    folder = "pictures"

    def __init__(self):
        super().__init__()
        self.project = "digits"

    @property
    def experiment(self):
        return collections.defaultdict(list)


class Asking(Net):
    def on_fit_start(self):
        self.folder = os.path.join(self.logger.folder, self.logger.project)

    def validation_step(self, batch, batch_idx):
        self.logger.experiment["pictures"].append(batch_idx)
        self.logger.experiment["best"] = 1
        assert [*self.logger.experiment["rows"]] == []
        return super().validation_step(batch, batch_idx)


def test_what_tasks_do_with_loggers_that_send(quiet, caplog):
    caplog.set_level(logging.INFO, "lightkit")
    quiet(rehearse=True, logger=Writes()).fit(Asking(), shuffled(), DataLoader(dataset(8), 4))
    assert "rehearsed: 2 batches of training, 2 of validation" in caplog.text


class Warms(lk.Callback):
    """What ported code has: a callback without which the task cannot train."""

    def on_train_epoch_start(self, trainer, task):
        task.temperature = 1.0 / (1 + trainer.current_epoch)


class Warm(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.temperature


def test_an_error_for_want_of_what_is_left_out(quiet, caplog):
    """A fit that is well is not refused."""
    tasks = []
    for rehearse in (False, None):
        lk.seed_everything(5, verbose=False)
        tasks.append(Warm())
        trainer = quiet(max_epochs=11, rehearse=rehearse, callbacks=Warms())
        trainer.fit(tasks[-1], shuffled(), DataLoader(dataset(8), 4))
    assert tasks[0].losses == tasks[1].losses
    assert len(tasks[0].losses) == 110
    (said,) = [r for r in caplog.records if "rehearsed" in r.getMessage()]
    assert said.levelno == logging.WARNING
    for part in ("AttributeError: 'Warm' object", "in training_step)", "for want of Warms"):
        assert part in said.getMessage()
    caplog.clear()
    trainer = quiet(rehearse=True, callbacks=Warms())
    with pytest.raises(AttributeError, match="temperature") as raised:
        trainer.fit(Warm(), shuffled())
    assert "(It is without Warms: " in text_of(raised) + caplog.text


class Whole(Plain):
    """It counts on the whole epoch at its end."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_last_batch:
            self.whole = True

    def on_train_epoch_end(self):
        assert self.whole
        if len(self.losses) % 10:
            raise ValueError("where is the rest?")


def test_the_end_of_an_epoch_that_is_cut(quiet, caplog):
    quiet(max_epochs=11).fit(Whole(), shuffled())
    assert "not rehearsed: it failed with ValueError: where is the rest? (test_reh" in caplog.text
    assert "for want of the rest of the epoch" in caplog.text


# --- what it finds -------------------------------------------------------------------------------


def text_of(raised) -> str:
    return "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])


def fails(tmp_path, kind, error, task, **options) -> str:
    """Returns what is said of a fit that fails; it leaves nothing behind, and was not begun."""
    trainer = lk.Trainer(
        max_epochs=100,
        default_root_dir=tmp_path / "runs",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with pytest.raises(kind, match=error) as raised:
        trainer.fit(task, shuffled(), DataLoader(dataset(8), 4))
    assert list(tmp_path.iterdir()) == []
    return text_of(raised)


class BadValidation(Net):
    def validation_step(self, batch, batch_idx):
        raise ValueError("not like this")


class BadEnd(Net):
    def on_train_epoch_end(self):
        raise KeyError("nothing there")


class BadSave(Net):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = object()


noted = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from 3.11 on")


@noted
@pytest.mark.parametrize(
    ("task", "kind", "error", "when", "options"),
    [
        (BadValidation, ValueError, "not like this", "in its first validation, after 10 steps", {}),
        (
            BadValidation,
            ValueError,
            "not like this",
            "in its first validation, after 25 steps",
            {
                "val_check_interval": 50,
                "check_val_every_n_epoch": None,
                "accumulate_grad_batches": 2,
            },
        ),
        (BadEnd, KeyError, "nothing there", "at the end of its first epoch", {}),
    ],
)
def test_what_fails_says_when_the_fit_would_have(tmp_path, task, kind, error, when, options):
    text = fails(tmp_path, kind, error, task(), **options)
    assert text.count(f"the fit would have failed {when}. Trainer(rehearse=False)") == 1


def test_a_checkpoint_that_cannot_be_written(tmp_path, caplog):
    text = fails(tmp_path, lk.errors.CheckpointError, "mine", BadSave())
    assert "the fit would have failed at its first save" in text + caplog.text


class Forgets(Net):
    """Its hook gives something else than it stored."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = torch.zeros(3)


def test_a_checkpoint_that_comes_back_otherwise(tmp_path, monkeypatch):
    from lightkit import checkpoint

    read = checkpoint.read_checkpoint
    monkeypatch.setattr(
        checkpoint, "read_checkpoint", lambda path: {**read(path), "mine": torch.ones(3)}
    )
    fails(tmp_path, lk.errors.CheckpointError, "holds something else: mine", Forgets())


@pytest.mark.parametrize(
    "watcher", [EarlyStopping("val_los"), ModelCheckpoint(monitor="val_los", save_last=False)]
)
def test_a_monitored_name_that_nobody_logs(tmp_path, caplog, watcher):
    error = r"monitors 'val_los', which is not among .*'val_loss'"
    text = fails(tmp_path, ConfigError, error, Net(), callbacks=watcher)
    assert "Did you mean 'val_loss'?" in text
    assert "after 10 steps" in text
    assert text.count("rehearse=False") == 1
    assert "This came in the rehearsal" not in caplog.text  # it says so itself


def test_a_schedule_that_reads_what_nobody_logs(tmp_path):
    class Typo(Net):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            found["lr_scheduler"]["monitor"] = "val" + "_acc"
            return found

    fails(tmp_path, ConfigError, "ReduceLROnPlateau monitors 'val_acc'", Typo())


class Later(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            self.log("now_and_then", 1.0)
        return super().training_step(batch, batch_idx)


class Composes(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            for name in ("seldom",):
                self.log(f"{name}_seen", 1.0)
        return super().training_step(batch, batch_idx)


class Logs(lk.Callback):
    def on_validation_epoch_end(self, trainer, task):
        task.log("of_callback", 1.0)


class Guards(Net):
    """As ported code does: nothing of the sanity check is logged."""

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("guarded", 1.0)


@pytest.mark.parametrize(
    ("task", "monitor", "callbacks", "said"),
    [
        (Later, "now_and_then", [], 1),
        (Composes, "seldom_seen", [], 1),
        (Net, "of_callback", [Logs()], 0),
        (Guards, "guarded", [], 0),
    ],
)
def test_a_name_that_may_come_later_is_no_error(quiet, caplog, task, monitor, callbacks, said):
    callbacks = [*callbacks, EarlyStopping(monitor, check_on_train_epoch_end=True)]
    quiet(rehearse=True, callbacks=callbacks).fit(task(), shuffled(), DataLoader(dataset(8), 4))
    assert caplog.text.count("which is well only if it comes later") == said


def test_a_disk_that_is_full(tmp_path, monkeypatch, caplog):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails(tmp_path, ConfigError, "A checkpoint has .* kB, and 1 kB are free", Net())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    saver = ModelCheckpoint(every_n_epochs=1, every_n_train_steps=50, save_top_k=-1)
    trainer = lk.Trainer(
        max_epochs=100,
        callbacks=saver,
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.on("train_start", lambda trainer: trainer.stop("seen"))
    trainer.fit(Plain(), shuffled())
    size, needed = re.search(r"may take (.*) MB \((.*) kB each\), and 200 kB", caplog.text).groups()
    assert float(size) * 1000 / float(needed) == pytest.approx(122, rel=0.02)  # 100 + 20 + last + 1


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    access, barred = os.access, tmp_path.parent
    monkeypatch.setattr(os, "access", lambda path, mode: path != barred and access(path, mode))
    saver = ModelCheckpoint(barred / "elsewhere" / "files")
    error = f"Checkpoints shall go to {saver.dirpath}, and {barred} cannot be written"
    fails(tmp_path, ConfigError, re.escape(error), Net(), callbacks=saver)


def test_what_the_task_holds_of_its_data_is_not_copied(quiet):
    class Holds(Plain):
        def __init__(self):
            super().__init__()
            self.data, self.loader = Data(), shuffled()
            self.data.large = self.loader.dataset.large = np.zeros(5000)

        def training_step(self, batch, batch_idx):
            assert self.data is self.trainer.datamodule
            assert self.data.large is self.loader.dataset.large
            assert self.loader is self.trainer.train_dataloader
            return super().training_step(batch, batch_idx)

    task = Holds()
    task.data.train_dataloader = lambda: task.loader
    quiet(rehearse=True, limit_val_batches=0).fit(task, datamodule=task.data)


def test_a_last_batch_of_one_sample_before_batch_norms(quiet, caplog):
    train = DataLoader(dataset(41), 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        quiet(rehearse=True).fit(Plain(), train)
    assert "The last training batch of each epoch has 1 sample" in caplog.text
    assert "(body.1)" in caplog.text
    caplog.clear()
    quiet(rehearse=True).fit(Plain(), DataLoader(dataset(41), 4, drop_last=True))
    quiet(rehearse=True, limit_train_batches=9).fit(Plain(), train)
    assert "1 sample" not in caplog.text


def test_ctrl_c_in_it_ends_the_fit(tmp_path):
    import signal

    class Interrupted(Net):
        def training_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch, batch_idx)

    fails(tmp_path, KeyboardInterrupt, None, Interrupted())


def test_two_ranks_rehearse_together(tmp_path):
    found = torchrun(
        "tests.distributed.scenes_rehearsal:fitting", 2, tmp_path, folder=str(tmp_path)
    )
    for with_it, without, said, events in found:
        assert with_it == without
        assert events == ["sanity"]  # where one rank cannot be copied, none is rehearsed
        assert said == found[0][2] or not said
    assert "rehearsed: 2 batches of training, 2 of validation" in found[0][2]
