"""What is logged, against means worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryPrecision,
    BinaryRecall,
    MulticlassAccuracy,
)

import lightkit as lk
from lightkit import losses, metrics
from lightkit.callbacks import EarlyStopping, ModelCheckpoint
from lightkit.errors import LoggingError, NonFiniteError
from lightkit.loggers import Logger

VALUES = torch.arange(10.0)  # batches of 4: means 1.5, 5.5, 8.5, mean of all 4.5
SIZES, MEANS = (4, 4, 2), (1.5, 5.5, 8.5)


class Rows(Logger):
    """Keeps the rows that a logger is given, without the epoch."""

    def __init__(self):
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[int] = []

    def log_metrics(self, metrics, step):
        metrics = dict(metrics)
        if "epoch" in metrics:
            self.epochs.append(metrics.pop("epoch"))
        self.rows.append((step, metrics))

    def of(self, name):
        return [(step, row[name]) for step, row in self.rows if name in row]


class Probe(lk.TaskModule):
    """A task whose loss is the mean of its batch, and which logs what a test says.

    Args:
        train: Called with the task and the batch in training_step; what it returns is returned in
            place of the loss.
        val: The same in validation_step.
        hooks: Other hooks by name; called with the task and the hook's arguments.
    """

    def __init__(self, train=None, val=None, **hooks):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_does, self.val_does = train, val
        for name, does in hooks.items():
            setattr(self, name, lambda *arguments, does=does: does(self, *arguments))

    def loss(self, batch):
        return batch.mean() + 0 * self.weight

    def training_step(self, batch, batch_idx):
        given = None if self.train_does is None else self.train_does(self, batch)
        return self.loss(batch) if given is None else given

    def validation_step(self, batch, batch_idx):
        return self.loss(batch) if self.val_does is None else self.val_does(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader(values=VALUES, size=4, **options):
    return DataLoader(list(values), size, **options)


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        defaults = {
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return lk.Trainer(**defaults | options)

    return make


def mean(values, weights=SIZES):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class approx_rows:
    """Equal to rows of (step, value) up to rounding."""

    def __init__(self, rows):
        self.rows = rows

    def __eq__(self, other):
        steps, values = [step for step, _ in self.rows], [value for _, value in self.rows]
        return steps == [s for s, _ in other] and [v for _, v in other] == pytest.approx(values)

    def __repr__(self):
        return repr(self.rows)


# --- rows and means ------------------------------------------------------------------------------


def test_a_row_is_the_mean_of_its_window(trainer):
    rows = Rows()
    task = Probe(lambda t, b: t.log("x", b.mean() * 2))
    trainer(logger=rows, log_every_n_steps=2, max_epochs=2).fit(task, loader())
    # steps 1-2, the ragged rest of the epoch at its end, 4, 5-6 (which ends an epoch as well)
    wanted = [(2, 3.5), (3, 8.5), (4, 1.5), (6, mean((5.5, 8.5), (4, 2)))]
    assert rows.of("train_loss") == approx_rows(wanted)
    assert rows.of("x") == approx_rows([(step, 2 * value) for step, value in wanted])
    assert rows.epochs == [0, 0, 1, 1]


def test_windows_count_steps_when_accumulating(trainer):
    rows = Rows()
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": 2}
    trainer(logger=rows, **options).fit(Probe(), loader())
    assert rows.of("train_loss") == approx_rows([(1, 3.5), (2, 8.5)])


def test_epoch_means_count_samples(trainer):
    task = Probe(lambda t, b: t.log("x", b.mean() ** 2))
    history = trainer(max_epochs=2).fit(task, loader(), loader())
    for row in history:
        assert row["train_loss"] == pytest.approx(4.5, rel=1e-12)
        assert row["val_loss"] == pytest.approx(4.5, rel=1e-12)
        assert row["x"] == pytest.approx(mean([m * m for m in MEANS]), rel=1e-12)
    assert [row["epoch"] for row in history] == [1, 2]
    assert [row["step"] for row in history] == [3, 6]
    assert set(history[0]) == {"epoch", "step", "time", "x", "train_loss", "val_loss"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(VALUES)


class Batches:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    "data",
    [
        loader(batch_sampler=BatchSampler(SequentialSampler(VALUES), 4, False), size=1),
        DataLoader(Stream(), 4),
        Batches(VALUES[:4], VALUES[4:8], VALUES[8:]),
    ],
    ids=["batch sampler", "iterable data set", "any iterable"],
)
def test_epoch_means_where_only_the_batch_tells_its_size(trainer, data):
    history = trainer().fit(Probe(), data, data)
    assert history["train_loss"] == pytest.approx([4.5], rel=1e-12)
    assert history["val_loss"] == pytest.approx([4.5], rel=1e-12)


def test_an_explicit_batch_size_wins(trainer):
    task = Probe(lambda t, b: t.log("x", b.mean(), batch_size=3 - int(b[0]) // 4))
    history = trainer().fit(task, loader())
    assert history["x"] == pytest.approx([mean(MEANS, (3, 2, 1))], rel=1e-12)


def test_batches_that_do_not_tell_their_size_warn_once_and_count_once(trainer, caplog):
    class Pairs(Probe):
        def loss(self, batch):
            return batch[0].mean() + 0 * self.weight

    data = [(VALUES[:4], torch.zeros(7)), (VALUES[4:], torch.zeros(7))]
    task = Pairs(lambda t, b: t.log_dict({"x": 1.0, "y": 2.0}))
    history = trainer(max_epochs=2).fit(task, data, data)
    assert history[0]["train_loss"] == pytest.approx((1.5 + 6.5) / 2)
    assert sum("number of samples" in r.message for r in caplog.records) == 1


def test_a_weight_that_is_returned_weighs_the_mean(trainer):
    weights = {0: 1, 4: torch.tensor(2), 8: torch.tensor([5.0])}
    task = Probe(lambda t, b: {"loss": t.loss(b), "weight": weights[int(b[0])]})
    history = trainer().fit(task, loader())
    assert history["train_loss"] == pytest.approx([mean(MEANS, (1, 2, 5))], rel=1e-12)


@pytest.mark.parametrize(
    ("reduce", "wanted", "rows"),
    [
        ("sum", 15.5, [(2, 7.0), (3, 8.5)]),
        ("min", 1.5, [(2, 1.5), (3, 8.5)]),
        ("max", 8.5, [(2, 5.5), (3, 8.5)]),
        (torch.max, 8.5, [(2, 5.5), (3, 8.5)]),
        (torch.mean, 4.5, [(2, 3.5), (3, 8.5)]),
        (min, 1.5, [(2, 1.5), (3, 8.5)]),
        (torch.sum, 15.5, [(2, 7.0), (3, 8.5)]),
    ],
)
def test_reductions(trainer, reduce, wanted, rows):
    seen = Rows()
    task = Probe(lambda t, b: t.log("x", b.mean(), reduce_fx=reduce))
    history = trainer(logger=seen, log_every_n_steps=2).fit(task, loader())
    assert history["x"] == pytest.approx([wanted])
    assert seen.of("x") == approx_rows(rows)


def test_suffixes_only_where_both_curves_are_asked_for(trainer):
    def log(task, batch):
        task.log("both", batch.mean(), on_step=True, on_epoch=True)
        task.log("window", batch.mean(), on_step=True)
        task.log("whole", batch.mean(), on_step=False, on_epoch=True)
        task.log("default", batch.mean())
        task.log("neither", batch.mean(), logger=False, prog_bar=True)

    rows = Rows()
    run = trainer(logger=rows, log_every_n_steps=2)
    history = run.fit(Probe(log), loader())
    windows, whole = [(2, 3.5), (3, 8.5)], [(3, 4.5)]
    assert rows.of("both_step") == approx_rows(windows)
    assert rows.of("both_epoch") == approx_rows(whole)
    assert rows.of("window") == rows.of("default") == approx_rows(windows)
    assert rows.of("whole") == approx_rows(whole)
    for name in ("neither", "both", "window_step", "window_epoch", "neither_step", "whole_epoch"):
        assert rows.of(name) == []
    for name in ("both", "window", "whole", "default", "neither"):
        assert history[0][name] == pytest.approx(4.5)
    metrics = run.callback_metrics
    assert float(metrics["both_epoch"]) == float(metrics["both"]) == pytest.approx(4.5)
    assert float(metrics["both_step"]) == pytest.approx(8.5)
    assert run.progress_bar_metrics == pytest.approx({"train_loss": 4.5, "neither": 4.5})
    assert run.logged_metrics.keys() == {"both_epoch", "whole"}


def test_steps_of_an_evaluation_count_on_their_own(trainer):
    rows = Rows()
    task = Probe(val=lambda t, b: t.log("v", b.mean(), on_step=True))
    history = trainer(logger=rows, max_epochs=2).fit(task, loader(), loader())
    assert rows.of("v_step") == approx_rows(list(enumerate(MEANS * 2, start=1)))
    assert rows.of("v_epoch") == approx_rows([(3, 4.5), (6, 4.5)])
    assert history["v"] == pytest.approx([4.5, 4.5])


def test_without_a_curve_over_epochs_an_evaluation_writes_none(trainer):
    rows = Rows()
    task = Probe(val=lambda t, b: t.log("v", b.mean(), on_step=True, on_epoch=False))
    history = trainer(logger=rows).fit(task, loader(), loader())
    assert rows.of("v") == approx_rows(list(enumerate(MEANS, start=1)))
    assert history["v"] == pytest.approx([4.5])


def test_an_evaluation_in_the_middle_of_an_epoch_does_not_cut_its_means(trainer):
    rows = Rows()
    options = {"log_every_n_steps": 10, "val_check_interval": 1}
    history = trainer(logger=rows, **options).fit(Probe(), loader(), loader())
    assert rows.of("train_loss") == approx_rows([(3, 4.5)])
    assert rows.of("val_loss") == approx_rows([(1, 4.5), (2, 4.5), (3, 4.5)])
    assert history["train_loss"] == pytest.approx([4.5])


def test_a_long_evaluation_keeps_few_values(trainer, monkeypatch):
    monkeypatch.setattr("lightkit.metrics._FOLD_EVERY", 10)
    waiting, rows = [], Rows()

    class Watch(lk.Callback):
        order = 90

        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
            columns = trainer.session.metrics._eval
            waiting.append(max(len(column.values) for column in columns.values()))

    task = Probe(val=lambda t, b: t.log("v", b.mean(), on_step=True))
    values = torch.arange(101.0)
    run = trainer(logger=rows, callbacks=[Watch()])
    history = run.fit(task, loader(), loader(values, 2))
    assert len(waiting) == 51
    assert max(waiting) == 9
    assert history["v"] == pytest.approx([50.0], rel=1e-12)
    assert len(rows.of("v_step")) == 51
    assert rows.of("v_step")[-1] == (51, 100.0)


# --- where values come from ----------------------------------------------------------------------


def test_the_users_own_names_win(trainer):
    def train(task, batch):
        task.log("train_loss", batch.mean() * 10)
        return {"loss": task.loss(batch), "acc": batch.max(), "own": batch.min()}

    def val(task, batch):
        task.log("val_loss", batch.mean() * 10)
        return task.loss(batch)

    history = trainer().fit(Probe(train, val), loader(), loader())
    assert history["train_loss"] == pytest.approx([45.0])
    assert history["val_loss"] == pytest.approx([45.0])
    assert history["train_acc"] == pytest.approx([mean((3, 7, 9))])
    assert history["train_own"] == pytest.approx([mean((0, 4, 8))])


def test_the_users_own_names_win_from_the_moment_they_come(trainer):
    def late(name):
        def log(task, batch):
            if batch[0]:  # not in the first batch
                task.log(name, batch.mean() * 10)
            return {"loss": task.loss(batch), "x": batch.mean()}

        return log

    def both(task, batch):
        late("train_x")(task, batch)
        return late("train_loss")(task, batch)

    history = trainer(log_every_n_steps=1).fit(Probe(both, late("val_loss")), loader(), loader())
    wanted = 10 * mean((5.5, 8.5), (4, 2))
    for name in ("train_loss", "train_x", "val_loss"):
        assert history[name] == pytest.approx([wanted]), name


def test_only_scalars_that_are_returned_are_logged(trainer):
    def val(task, batch):
        return {"loss": task.loss(batch), "n": 3, "val_named": 0.5, "pred": batch, "text": "a"}

    history = trainer().fit(Probe(val=val), loader(), loader())
    assert history[0].keys() - {"epoch", "step", "time", "train_loss"} == {
        "val_loss",
        "val_n",
        "val_named",
    }


def test_predictions_of_one_sample_are_no_loss(trainer):
    values = torch.arange(5.0)  # the last batch has one sample
    history = trainer().fit(Probe(val=lambda t, b: b * 2), loader(), loader(values))
    assert "val_loss" not in history[0]


def test_loaders_of_a_list_get_a_number_behind_the_name(trainer):
    def val(task, batch):
        task.log("plain", batch.mean())
        task.log("joint", batch.mean(), add_dataloader_idx=False)
        return task.loss(batch)

    run = trainer()
    history = run.fit(Probe(val=val), loader(), [loader(), loader(VALUES + 10)])
    row = history[0]
    assert row["val_loss/dataloader_idx_0"] == row["plain/dataloader_idx_0"] == pytest.approx(4.5)
    assert row["val_loss/dataloader_idx_1"] == row["plain/dataloader_idx_1"] == pytest.approx(14.5)
    assert row["joint"] == pytest.approx(9.5)
    first, second = run.validate(verbose=False, dataloaders=[loader(), loader(VALUES + 10)])
    assert first.keys() == {"val_loss/dataloader_idx_0", "plain/dataloader_idx_0", "joint"}
    assert second.keys() == {"val_loss/dataloader_idx_1", "plain/dataloader_idx_1", "joint"}


def test_loaders_of_a_dict_get_their_name_in_front(trainer):
    data = {"day": loader(), "night": loader(VALUES + 10)}
    history = trainer().fit(Probe(), loader(), data)
    assert history["day/val_loss"] == pytest.approx([4.5])
    assert history["night/val_loss"] == pytest.approx([14.5])


def test_hooks_and_callbacks_log_too(trainer):
    class Logs(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            task.log("callback_step", outputs["loss"] * 2)

        def on_train_epoch_end(self, trainer, task):
            task.log("callback_end", 7)

        def on_validation_epoch_end(self, trainer, task):
            task.log("callback_val_end", 8)

    rows = Rows()
    task = Probe(
        on_train_epoch_start=lambda t: t.log("start", 1),
        on_train_epoch_end=lambda t: t.log("end", t.current_epoch),
        on_train_start=lambda t: t.log("first", 5),
        on_validation_epoch_start=lambda t: t.log("val_start", 2),
        on_validation_epoch_end=lambda t: t.log("val_end", torch.tensor(3.0)),
        on_validation_batch_end=lambda t, *_: t.log("val_batch", 4.0),
        on_before_optimizer_step=lambda t, _: t.log("before", 6.0),
    )
    run = trainer(logger=rows, max_epochs=2, callbacks=[Logs()], log_every_n_steps=2)
    history = run.fit(task, loader(), loader())
    assert history["end"] == [0, 1]
    assert history[0]["first"] == 5
    assert "first" not in history[1]
    for row in history:
        assert row["callback_step"] == pytest.approx(9.0)
        assert [row[n] for n in ("start", "callback_end", "callback_val_end")] == [1, 7, 8]
        assert [row[n] for n in ("val_start", "val_end", "val_batch", "before")] == [2, 3, 4, 6]
    assert rows.of("end") == [(3, 0), (6, 1)]
    assert rows.of("val_end") == [(3, 3), (6, 3)]
    assert [step for step, _ in rows.of("callback_step")] == [2, 3, 4, 6]


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(0), r"shape \(0,\)"),
        ("text", "got str"),
        (None, "got NoneType"),
        ({"a": 1}, "got dict"),
    ],
)
def test_values_that_are_no_number(trainer, value, message):
    with pytest.raises(LoggingError, match=message) as caught:
        trainer().fit(Probe(lambda t, b: t.log("thing", value)), loader())
    assert "'thing'" in str(caught.value)


def test_a_none_in_a_dict_is_named(trainer):
    with pytest.raises(LoggingError, match=r"self.log\('b'\): got NoneType"):
        trainer().fit(Probe(lambda t, b: t.log_dict({"a": 1, "b": None})), loader())
    with pytest.raises(LoggingError, match="log_dict was given Tensor"):
        trainer().fit(Probe(lambda t, b: t.log_dict(b)), loader())


@pytest.mark.parametrize("name", ["", 3, None])
def test_names_that_are_no_text(trainer, name):
    with pytest.raises(LoggingError, match="must be a text"):
        trainer().fit(Probe(lambda t, b: t.log(name, 1)), loader())


class Reduced(lk.TaskModule):
    """Logs one value in several ways."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        loss = self.layer(batch).square().mean()
        for how in ("std", "last", "running:5"):
            self.log(how.partition(":")[0], loss, reduce_fx=how)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_other_reductions_in_a_fit(trainer):
    """S1-07: one value feeds all of them, and the running mean goes on over epochs."""
    values, made = [], trainer(max_epochs=3, log_every_n_steps=2)
    made.on("train_batch_end", lambda trainer, task, outputs: values.append(outputs["loss"]))
    history = made.fit(Reduced(), torch.utils.data.DataLoader(torch.randn(12, 2), 3))
    losses = torch.stack(values).double()
    for epoch, row in enumerate(history, 1):
        own = losses[4 * (epoch - 1) : 4 * epoch]
        assert row["std"] == pytest.approx(own.std().item(), rel=1e-12)
        assert row["last"] == own[-1].item()
        seen = losses[: 4 * epoch][-5:]
        assert row["running"] == pytest.approx(seen.mean().item(), rel=1e-12)


def test_other_reductions_resume_exactly():
    from lightkit.testing import assert_resumes_exactly

    data = torch.randn(15, 2)
    loader = torch.utils.data.DataLoader(data, 3)
    assert_resumes_exactly(Reduced, loader, log_every_n_steps=2)


@pytest.mark.parametrize("how", ["std", "last", "running:3", "sum"])
def test_a_metric_object_takes_no_other_reduction(trainer, how):
    def log(task, batch):
        metric(batch)
        task.log("thing", metric, reduce_fx=how)

    metric = MeanMetric()
    with pytest.raises(LoggingError, match=f"'thing', reduce_fx='{how}'.*makes one number"):
        trainer().fit(Probe(log), loader())


def test_an_unknown_reduction(trainer):
    with pytest.raises(LoggingError, match="mean of the last 50 values. Did you mean 'mean'?"):
        trainer().fit(Probe(lambda t, b: t.log("x", 1, reduce_fx="meann")), loader())


def test_numbers_of_all_kinds(trainer):
    import numpy as np

    def log(task, batch):
        task.log("bool", True)
        task.log("int", 3)
        task.log("numpy", np.float32(0.5))
        task.log("int64", torch.tensor(4))
        task.log("one", torch.tensor([[5.0]]))
        task.log("parameter", torch.nn.Parameter(torch.tensor(6.0)))
        task.log("half", torch.tensor(7.0, dtype=torch.bfloat16))
        task.log("double", torch.tensor(1 / 3, dtype=torch.float64))
        task.log_dict({"a": 8, "b": 9}, prog_bar=True, sync_dist=True)

    run = trainer()
    row = run.fit(Probe(log), loader())[0]
    names = ("bool", "int", "numpy", "int64", "one", "parameter", "half", "double", "a", "b")
    assert [row[n] for n in names] == [1, 3, 0.5, 4, 5, 6, 7, 1 / 3, 8, 9]
    assert run.progress_bar_metrics.keys() == {"train_loss", "a", "b"}


def test_what_changes_in_place_is_logged_as_it_was(trainer):
    class Counting(Probe):
        def __init__(self):
            super().__init__(lambda t, b: t.count(b))
            self.register_buffer("seen", torch.zeros(2))
            self.scale = torch.nn.Parameter(torch.zeros(2))

        def count(self, batch):
            self.seen += 1
            self.log("view", self.seen[0])
            self.log("part", self.scale[1])
            with torch.no_grad():
                self.scale += 1
            with torch.inference_mode():
                total = batch.sum()
                self.log("inside", batch.sum())
            self.log("inference", total)
            loss = self.loss(batch)
            loss += 0.0  # in place, and none of our business
            return loss + 0 * self.scale.sum()

    row = trainer().fit(Counting(), loader())[0]
    assert row["view"] == pytest.approx(mean((1, 2, 3)))
    assert row["part"] == pytest.approx(mean((0, 1, 2)))
    assert row["inference"] == row["inside"] == pytest.approx(mean((6, 22, 17)))
    assert row["train_loss"] == pytest.approx(4.5)


def test_a_loss_put_together_in_place(trainer):
    def train(task, batch):
        loss = task.loss(batch)
        loss += 1
        return loss

    assert trainer().fit(Probe(train), loader())["train_loss"] == pytest.approx([5.5])


def test_a_value_that_is_changed_after_it_was_logged_is_an_error(trainer):
    def train(task, batch):
        value = batch.mean()
        task.log("lost", value)
        value.zero_()

    with pytest.raises(LoggingError, match="'lost' was changed in place"):
        trainer().fit(Probe(train), loader())


def test_infinite_values_do_not_break_the_sums(trainer):
    inf = math.inf

    def log(task, batch):
        value = {0: inf, 4: -inf, 8: 1.0}[int(batch[0])]
        for name in ("mean", "sum", "min", "max"):
            task.log(name, value, reduce_fx=name)
        task.log("nan", math.nan if batch[0] else 0.0, reduce_fx="max")
        task.log("huge", 1e308, reduce_fx="sum")

    row = trainer().fit(Probe(log), loader())[0]
    assert math.isnan(row["mean"])
    assert math.isnan(row["sum"])
    assert math.isnan(row["nan"])
    assert (row["min"], row["max"], row["huge"]) == (-inf, inf, inf)


# --- places ----------------------------------------------------------------------------------------

WRONG = {
    "on_fit_start": "before",
    "on_sanity_check_start": "before",
    "on_sanity_check_end": "before",
    "configure_optimizers": "before",
    "on_validation_end": "on_validation_end",
    "on_train_end": "after training",
    "on_fit_end": "after training",
    "setup": "before",
}


@pytest.mark.parametrize("hook", WRONG)
def test_logging_in_a_wrong_place(trainer, hook):
    task = Probe(**{hook: lambda t, *_: t.log("x", 1.0)})
    with pytest.raises(LoggingError, match=WRONG[hook]) as caught:
        trainer(num_sanity_val_steps=2).fit(task, loader(), loader())
    assert "on_train_epoch_end" in str(caught.value)


@pytest.mark.parametrize("hook", ["predict_step", "on_predict_epoch_end", "on_predict_start"])
def test_logging_in_predict(trainer, hook):
    task = Probe(forward=lambda t, b: b, **{hook: lambda t, *_: t.log("x", 1.0)})
    with pytest.raises(LoggingError, match="in predict"):
        trainer().predict(task, loader())


def test_outside_a_run_logging_is_silent(trainer):
    task = Probe(lambda t, b: t.log_dict({"x": b.mean()}))
    task.training_step(VALUES, 0)
    trainer().fit(task, loader())
    task.training_step(VALUES, 0)
    task.log("y", "no number")


def test_the_sanity_check_leaves_nothing(trainer):
    metric = BinaryAccuracy()

    def val(task, batch):
        metric.update(torch.ones(len(batch)), torch.zeros(len(batch)).long())
        task.log("v", batch.mean(), on_step=True, prog_bar=True)
        task.log("acc", metric)

    class Watch(lk.Callback):
        def on_sanity_check_end(self, trainer, task):
            assert not metric.update_called
            assert trainer.callback_metrics["acc"] == 0  # its own hooks find its values

        def on_train_start(self, trainer, task):
            seen.update(trainer.callback_metrics)

    seen, rows = {}, Rows()
    run = trainer(logger=rows, num_sanity_val_steps=2, callbacks=[Watch()])
    history = run.fit(Probe(val=val), loader(), loader())
    assert seen == {}
    assert history["v"] == pytest.approx([4.5])
    assert [step for step, _ in rows.of("v_step")] == [1, 2, 3]
    assert rows.of("acc") == [(3, 0.0)]


# --- callback_metrics --------------------------------------------------------------------------------


def test_callback_metrics_hold_the_last_value_and_then_the_mean(trainer):
    seen = []

    class Watch(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            metrics = trainer.callback_metrics
            value = metrics["x"]
            assert value.ndim == 0
            assert not value.requires_grad
            assert metrics["x"] is value
            assert metrics["number"] is metrics["number"]
            assert metrics["train_loss"] is metrics["train_loss"]
            seen.append((float(value), float(metrics["number"]), float(metrics["train_loss"])))
            assert len(metrics) == len(list(metrics)) == len(set(metrics))
            assert {"x", "number", "train_loss"} <= set(metrics)
            assert "nothing" not in metrics

        def on_train_epoch_end(self, trainer, task):
            metrics = trainer.callback_metrics
            assert metrics["x"] is metrics["x"]
            seen.append(tuple(float(metrics[n]) for n in ("x", "number", "train_loss")))

        def on_validation_end(self, trainer, task):
            assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(4.5)

        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
            assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(MEANS[batch_idx])

        def on_validation_epoch_end(self, trainer, task):
            assert float(trainer.callback_metrics["late"]) == 12

    task = Probe(
        lambda t, b: t.log_dict({"x": b.mean() + t.weight, "number": 2.0}),
        on_validation_epoch_end=lambda t: t.log("late", 12),
    )
    run = trainer(max_epochs=2, callbacks=[Watch()])
    run.fit(task, loader(), loader())
    once = [(m, 2.0, m) for m in (*MEANS, 4.5)]
    assert [pytest.approx(s) for s in seen] == once * 2
    assert set(run.callback_metrics) == {"x", "number", "train_loss", "val_loss", "late"}


def test_monitors_read_what_was_logged(trainer, tmp_path):
    stopping = EarlyStopping("val_x", patience=2, mode="max")
    saving = ModelCheckpoint(monitor="val_x", mode="max", save_top_k=1)
    task = Probe(val=lambda t, b: t.log("val_x", b.mean() - t.current_epoch))
    options = {"enable_checkpointing": True, "callbacks": [stopping, saving], "max_epochs": 9}
    history = trainer(**options).fit(task, loader(), loader())
    assert history["val_x"] == pytest.approx([4.5, 3.5, 2.5])
    assert float(saving.best_model_score) == pytest.approx(4.5)


def test_a_monitor_logged_when_the_epoch_ends(trainer):
    stopping = EarlyStopping("x", patience=1, mode="min", check_on_train_epoch_end=True)
    task = Probe(on_train_epoch_end=lambda t: t.log("x", 1.0 + t.current_epoch))
    assert len(trainer(callbacks=[stopping], max_epochs=9).fit(task, loader())) == 2


# --- losses that are not finite ----------------------------------------------------------------------


def bad_at(*batches):
    """A step whose loss is not finite in some of the batches of a run, counted from 0."""
    count = [-1]

    def train(task, batch):
        count[0] += 1
        return task.loss(batch) + (math.nan if count[0] in batches else 0.0)

    return train


def test_a_loss_that_is_not_finite_stops_at_the_next_flush(trainer):
    task = Probe(bad_at(4, 5))
    with pytest.raises(NonFiniteError, match=r"became nan at step 5 \(epoch 2; 2 of the last 3"):
        trainer(max_epochs=4, log_every_n_steps=6).fit(task, loader())
    assert task.global_step == 6


def test_the_step_is_exact_when_accumulating(trainer):
    task = Probe(bad_at(3))
    with pytest.raises(NonFiniteError, match="at step 2 "):
        trainer(accumulate_grad_batches=2).fit(task, loader(size=2))


def test_the_step_is_exact_in_manual_optimization(trainer):
    task = Probe(bad_at(2))
    task.automatic_optimization = False
    with pytest.raises(NonFiniteError, match="at step 3 "):
        trainer().fit(task, loader())


def test_a_run_may_go_on_after_it(trainer, caplog):
    task = Probe(bad_at(1))
    history = trainer(terminate_on_nan=False, max_epochs=2).fit(task, loader())
    assert math.isnan(history[0]["train_loss"])
    assert history[1]["train_loss"] == pytest.approx(4.5)
    assert any("became nan at step 2" in r.message for r in caplog.records)


def test_a_loss_that_is_not_finite_is_never_saved(trainer, tmp_path):
    saved = []

    class Save(lk.Callback):
        def on_save_point(self, trainer, task):
            saved.append(trainer.global_step)
            trainer.save_checkpoint(tmp_path / "file.ckpt")

        def on_exception(self, trainer, task, exception):
            with pytest.raises(NonFiniteError, match="at step 2 "):
                trainer.save_checkpoint(tmp_path / "after.ckpt")

    with pytest.raises(NonFiniteError, match="at step 2 "):
        trainer(callbacks=[Save()]).fit(Probe(bad_at(1)), loader())
    assert saved == [1, 2]
    assert torch.load(tmp_path / "file.ckpt")["loop"]["global_step"] == 1
    assert not (tmp_path / "after.ckpt").exists()


def test_it_is_found_where_the_user_logs_train_loss(trainer):
    def train(task, batch):
        task.log("train_loss", 1.0)
        return task.loss(batch) * math.inf

    with pytest.raises(NonFiniteError, match="at step 1 "):
        trainer().fit(Probe(train), loader())


# --- torchmetrics ------------------------------------------------------------------------------------


def target(batch):
    """Targets of a batch of VALUES: the prediction is 1 above 2.5, the target 1 above 4.5."""
    return (batch > 2.5).float(), (batch > 4.5).long()


class Measured(Probe):
    """A task with metrics: 8 of 10 right, precision 5/7, recall 1."""

    def __init__(self, **hooks):
        super().__init__(lambda t, b: t.measure("train", b), lambda t, b: t.measure("val", b))
        self.train_acc, self.val_acc = BinaryAccuracy(), BinaryAccuracy()
        metrics = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryRecall()])
        self.train_all, self.val_all = metrics.clone("train/"), metrics.clone("val/")
        for name, does in hooks.items():
            setattr(self, name, lambda *arguments, does=does: does(self, *arguments))

    def measure(self, stage, batch):
        metric, many = getattr(self, f"{stage}_acc"), getattr(self, f"{stage}_all")
        if self.current_epoch % 2:
            metric(*target(batch))
        else:
            metric.update(*target(batch))
        self.log(f"{stage}_acc", metric, on_step=False, on_epoch=True, prog_bar=True)
        many.update(*target(batch))
        self.log_dict(many, on_step=False, on_epoch=True)


def test_metric_objects_are_computed_once_an_epoch_and_reset(trainer, monkeypatch):
    calls = []
    compute = BinaryAccuracy.compute
    monkeypatch.setattr(BinaryAccuracy, "compute", lambda self: calls.append(self) or compute(self))
    rows = Rows()
    run = trainer(logger=rows, max_epochs=2, num_sanity_val_steps=2, log_every_n_steps=1)
    task = Measured()
    history = run.fit(task, loader(), loader())
    for stage in ("train", "val"):
        assert history[f"{stage}_acc"] == pytest.approx([0.8, 0.8])
        assert history[f"{stage}/BinaryAccuracy"] == pytest.approx([0.8, 0.8])
        assert history[f"{stage}/BinaryPrecision"] == pytest.approx([5 / 7] * 2)
        assert history[f"{stage}/BinaryRecall"] == pytest.approx([1.0, 1.0])
        assert rows.of(f"{stage}_acc") == approx_rows([(3, 0.8), (6, 0.8)])
        assert rows.of(f"{stage}/BinaryRecall") == approx_rows([(3, 1.0), (6, 1.0)])
    assert not any(m.update_called for m in (task.train_acc, task.val_acc))
    assert not any(m.update_called for m in task.val_all.values())
    # once an epoch; calling the metric, as in the second epoch, computes every batch as well
    assert len([m for m in calls if m is task.train_acc]) == 2 + len(SIZES)
    assert run.progress_bar_metrics["val_acc"] == pytest.approx(0.8)


def test_two_evaluations_in_an_epoch_do_not_mix(trainer):
    rows = Rows()
    options = {"logger": rows, "val_check_interval": 1, "num_sanity_val_steps": 1}
    trainer(**options).fit(Measured(), loader(), loader())
    assert rows.of("val_acc") == approx_rows([(1, 0.8), (2, 0.8), (3, 0.8)])
    assert rows.of("val/BinaryPrecision") == approx_rows([(i, 5 / 7) for i in (1, 2, 3)])


def test_the_value_of_a_batch_where_the_metric_is_called(trainer):
    metric = BinaryAccuracy()

    def train(task, batch):
        metric(*target(batch))
        task.log("acc", metric, on_step=True, on_epoch=True)

    rows = Rows()
    run = trainer(logger=rows, log_every_n_steps=2)
    history = run.fit(Probe(train), loader())
    # batches have 3/4, 3/4 and 2/2 right
    assert rows.of("acc_step") == approx_rows([(2, 0.75), (3, 1.0)])
    assert rows.of("acc_epoch") == approx_rows([(3, 0.8)])
    assert history["acc"] == pytest.approx([0.8])


def test_a_metric_object_logged_when_the_epoch_ends(trainer):
    metric, other = BinaryAccuracy(), MeanMetric()

    def val_end(task):
        task.log("acc", metric)
        task.log("other", other.compute())
        other.reset()

    def val(task, batch):
        metric.update(*target(batch))
        other.update(batch)

    stopping = EarlyStopping("acc", mode="max", patience=1)
    task = Probe(val=val, on_validation_epoch_end=val_end)
    run = trainer(max_epochs=3, callbacks=[stopping])
    history = run.fit(task, loader(), loader())
    assert history["acc"] == pytest.approx([0.8, 0.8])
    assert history["other"] == pytest.approx([4.5, 4.5])


def test_a_metric_object_of_training_logged_when_the_epoch_ends(trainer):
    metric, seen = BinaryAccuracy(), []

    class Watch(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            seen.append(float(trainer.callback_metrics["acc"]))

    task = Probe(
        lambda t, b: metric.update(*target(b)), on_train_epoch_end=lambda t: t.log("acc", metric)
    )
    history = trainer(max_epochs=2, callbacks=[Watch()]).fit(task, loader())
    assert history["acc"] == pytest.approx([0.8, 0.8])
    assert seen == pytest.approx([0.8, 0.8])


def test_one_metric_object_for_several_loaders_counts_each_alone(trainer):
    metric, joint = BinaryAccuracy(), MeanMetric()

    def val(task, batch):
        metric.update(*target(batch))
        task.log("acc", metric)
        joint.update(batch)
        task.log("joint", joint, add_dataloader_idx=False)

    loaders = [loader(), loader(VALUES + 10)]
    row = trainer().fit(Probe(val=val), loader(), loaders)[0]
    assert row["acc/dataloader_idx_0"] == pytest.approx(0.8)
    assert row["acc/dataloader_idx_1"] == pytest.approx(1.0)
    assert row["joint"] == pytest.approx(9.5)


def test_one_metric_object_for_training_and_validation_is_an_error(trainer):
    metric = BinaryAccuracy()

    def step(task, batch):
        metric.update(*target(batch))
        task.log("acc", metric)

    with pytest.raises(LoggingError, match="in training and in validation"):
        trainer(val_check_interval=2).fit(Probe(step, step), loader(), loader())


def test_metric_objects_that_cannot_be_logged(trainer):
    collection = MetricCollection([BinaryAccuracy(), BinaryRecall()])
    vector = MetricCollection({"a": BinaryAccuracy(multidim_average="samplewise")})

    def fit(step):
        trainer().fit(Probe(step), loader())

    def updated(task, batch):
        metric.update(*target(batch))
        task.log("m", metric, on_step=True)

    def several_numbers(task, batch):
        vector.update(torch.ones(len(batch), 2), torch.ones(len(batch), 2).long())
        task.log_dict(vector, on_step=False, on_epoch=True)

    metric = BinaryAccuracy()
    with pytest.raises(LoggingError, match="MetricCollection with self.log_dict"):
        fit(lambda t, b: t.log("c", collection))
    with pytest.raises(LoggingError, match="updated only"):
        fit(updated)
    with pytest.raises(LoggingError, match="two metric objects"):
        fit(lambda t, b: t.log("m", BinaryAccuracy()))
    with pytest.raises(LoggingError, match="a metric object and a number"):
        fit(lambda t, b: t.log("m", metric if b[0] else 1.0))
    with pytest.raises(LoggingError, match="gives no single number"):
        fit(several_numbers)


# --- checkpoints -------------------------------------------------------------------------------------


def test_sums_metrics_and_windows_survive_a_checkpoint_within_an_epoch(trainer, tmp_path):
    class Both(Measured):
        def measure(self, stage, batch):
            super().measure(stage, batch)
            self.log(f"{stage}_x", batch.mean(), on_step=True, on_epoch=True)
            return {"loss": self.loss(batch), "max": batch.max()}

    class Save(lk.Callback):
        def on_save_point(self, trainer, task):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole = Rows()
    options = {"log_every_n_steps": 2, "max_epochs": 2, "val_check_interval": 1}
    once = trainer(logger=whole, callbacks=[Save()], **options).fit(Both(), loader(), loader())
    for step in (1, 2, 4, 5):
        rows = Rows()
        path = tmp_path / f"{step}.ckpt"
        again = trainer(logger=rows, **options).fit(Both(), loader(), loader(), ckpt_path=path)
        for a, b in zip(once, again, strict=True):
            assert {**a, "time": 0} == {**b, "time": 0}, step
        tail = [row for row in whole.rows if "val_x_step" not in row[1] and row[0] > step]
        assert [row for row in rows.rows if "val_x_step" not in row[1]] == tail


# --- nothing is read between flushes -----------------------------------------------------------------


class NoDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and not Guard.allowed:
            raise AssertionError("a tensor was read")
        return function(*args, **(kwargs or {}))


class NoFunction(torch.overrides.TorchFunctionMode):
    READS = frozenset({
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu,
        torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
        torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.nonzero,
    })  # fmt: skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.READS and not Guard.allowed:
            raise AssertionError(f"{function.__name__} read a tensor")
        return function(*args, **(kwargs or {}))


class Guard(lk.Callback):
    """Raises where a tensor is read from the first batch to the last of ``batches``."""

    order = 95
    allowed = True

    def __init__(self, batches):
        self.batches, self.modes = batches, []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx == 0:  # making the loader's iterator draws a seed and reads it
            self.modes = [NoDispatch(), NoFunction()]
            for mode in self.modes:
                mode.__enter__()
            Guard.allowed = False

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if batch_idx == self.batches - 1:
            self.close()

    def close(self):
        Guard.allowed = True
        while self.modes:
            self.modes.pop().__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["sgd", "fused adam"])
def test_nothing_is_read_between_flushes(tmp_path, monkeypatch, kind):
    steps, every = 30, 10

    class Task(Probe):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)
            self.acc = MulticlassAccuracy(2, validate_args=False)

        def training_step(self, batch, batch_idx):
            out = self.net(batch).squeeze(1)
            loss = torch.nn.functional.mse_loss(out, batch.sum(1))
            self.log("loss", loss, prog_bar=True)
            self.log("other", out.mean(), on_step=True, on_epoch=True)
            self.acc.update((out > 0).long(), (batch.sum(1) > 0).long())
            self.log("acc", self.acc, on_step=False, on_epoch=True)
            return {"loss": loss, "weight": torch.tensor(4.0), "extra": out.max()}

        def configure_optimizers(self):
            if kind == "sgd":
                return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            return torch.optim.Adam(self.parameters(), lr=0.01, fused=True)

    reads = []

    def allowed_read(values, real=metrics.read):
        reads.append(len(values))
        before, Guard.allowed = Guard.allowed, True
        try:
            return real(values)
        finally:
            Guard.allowed = before

    def allowed_zero(weight, real=losses.is_zero):  # reads host memory only, never a device's
        before, Guard.allowed = Guard.allowed, True
        try:
            return real(weight)
        finally:
            Guard.allowed = before

    looks = []

    def allowed_look(values):  # the alarms read the first step, once
        looks.append(len(reads))
        return allowed_read(values)

    monkeypatch.setattr("lightkit.metrics.read", allowed_read)
    monkeypatch.setattr("lightkit.alarms.read", allowed_look)
    monkeypatch.setattr("lightkit.loops.is_zero", allowed_zero)
    guard = Guard(steps)
    trainer = lk.Trainer(
        max_epochs=1,
        log_every_n_steps=every,
        default_root_dir=tmp_path,
        gradient_clip_val=1.0,
        callbacks=[guard],
        enable_model_summary=False,
    )
    data = DataLoader(torch.randn(4 * steps, 3), 4)
    try:
        history = trainer.fit(Task(), data)
    finally:
        guard.close()
    assert math.isfinite(history[0]["loss"])
    assert len(looks) == 1
    assert len([n for n in reads if n > every]) == steps // every


# --- values that would be lost or mixed ----------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", ["detach", "data", "buffer"])
def test_a_parameter_of_the_task_is_logged_as_it_was(trainer, how, fused):
    class Task(Probe):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.0))
            self.register_buffer("seen", torch.tensor(0.0))
            self.then = []

        def training_step(self, batch, batch_idx):
            self.seen += 1
            value = self.seen if how == "buffer" else self.weight
            self.then.append(value.item())
            self.log("x", {"detach": value.detach(), "data": value.data, "buffer": value}[how])
            return batch.mean() * self.weight

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Task()
    history = trainer(fused=fused, max_epochs=2).fit(task, loader())
    assert len(set(task.then)) == 6
    wanted = [mean(task.then[:3]), mean(task.then[3:])]
    assert history["x"] == pytest.approx(wanted, rel=1e-6)


def test_one_name_in_the_steps_and_at_the_end_is_an_error(trainer):
    def log(name):
        return lambda task, *_: task.log(name, 100.0)

    task = Probe(log("x"), on_train_epoch_end=log("x"))
    with pytest.raises(LoggingError, match="'x'.*already logged in the steps.*another name"):
        trainer().fit(task, loader())
    task = Probe(val=log("x"), on_validation_epoch_end=log("x"))
    with pytest.raises(LoggingError, match="'x'.*already logged in the steps"):
        trainer().validate(task, loader())


def test_one_name_several_times_in_a_hook_of_the_end_has_a_mean(trainer):
    def log(task):
        for value in (1.0, 2.0, 6.0):
            task.log("x", value)

    history = trainer(max_epochs=2).fit(Probe(on_train_epoch_end=log), loader())
    assert history["x"] == [3.0, 3.0]


def test_a_weight_of_an_evaluation_may_have_one_dimension(trainer):
    def val(task, batch):
        return {"loss": task.loss(batch), "weight": torch.tensor([float(batch[0] + 1)])}

    (row,) = trainer().validate(Probe(val=val), loader())
    assert row["val_loss"] == pytest.approx(mean(MEANS, (1, 5, 9)))

    def wrong(task, batch):
        return {"loss": task.loss(batch), "weight": torch.ones(3)}

    with pytest.raises(LoggingError, match=r"'weight'.*\(3,\)"):
        trainer().validate(Probe(val=wrong), loader())


def test_returned_names_need_not_be_texts(trainer):
    history = trainer().fit(Probe(lambda t, b: {"loss": t.loss(b), 0: 1.0}), loader())
    assert history["train_0"] == [1.0]


def test_the_norm_of_a_step_that_the_scaler_skipped_is_left_out(trainer):
    class Task(Probe):
        def training_step(self, batch, batch_idx):
            return self.weight * (1.0 if batch_idx else math.inf)

        def on_before_backward(self, loss):
            self.log("other", math.inf)

    options = {"precision": "16-mixed", "gradient_clip_val": 1.0, "terminate_on_nan": False}
    (row,) = trainer(**options).fit(Task(), loader())
    assert row["grad_norm"] == pytest.approx(1.0)
    assert row["other"] == math.inf
