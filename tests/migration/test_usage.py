"""What ported code does beside its names: small programs, each one thing (S0-02)."""

from __future__ import annotations

import argparse
import functools
import re

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit import elsewhere
from lightkit.errors import CheckpointError, NotRunningError
from tests.small import Net, loader


def test_backward_may_be_overridden(quiet):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.seen = []

        def backward(self, loss, *args, **kwargs):
            self.seen.append(loss.detach())
            super().backward(loss, *args, **kwargs)

    def trained(kind, **options):
        torch.manual_seed(1)
        task = kind()
        quiet(max_epochs=1, fused=False, **options).fit(task, loader(16))
        return task

    task = trained(Own, accumulate_grad_batches=2)
    plain = trained(Net, accumulate_grad_batches=2)
    assert len(task.seen) == 4  # each batch, divided by the group's length
    for a, b in zip(task.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    scaled = trained(Own, precision="16-mixed")
    assert scaled.seen[0] > 1000  # as it is differentiated


def test_backward_of_lbfgs_and_manual_backward(quiet):
    class Own(Net):
        calls = 0

        def backward(self, loss, *args, **kwargs):
            self.calls += 1
            loss.backward(*args, **kwargs)

    class Newton(Own):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    class Manual(Own):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            assert optimizer.optimizer is self.trainer.optimizers[0]
            self.manual_backward(super().training_step(batch, batch_idx), retain_graph=True)
            optimizer.step()

    newton, manual = Newton(), Manual()
    quiet(max_steps=1).fit(newton, loader(4))
    assert newton.calls == 3
    quiet(max_steps=2).fit(manual, loader(8))
    assert manual.calls == 2


@pytest.mark.parametrize("automatic", [True, False])
def test_outputs_of_a_batch_hold_the_loss(quiet, automatic):
    class Task(Net):
        automatic_optimization = automatic

    class Watch(lk.Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"])

    watch = Watch()
    quiet(max_epochs=1, callbacks=[watch]).fit(Task(), loader(8))
    assert [loss.requires_grad for loss in watch.losses] == [False, False]


def test_a_fit_is_saved_after_its_end(quiet, tmp_path):
    torch.manual_seed(2)
    whole = Net()
    quiet(max_epochs=4).fit(whole, loader())
    torch.manual_seed(2)
    trainer, task, path = quiet(max_epochs=2), Net(), tmp_path / "after.ckpt"
    with pytest.raises(NotRunningError, match="while fit runs and when it has ended"):
        trainer.save_checkpoint(path)
    trainer.fit(task, loader())
    trainer.validate(task, loader(seed=2), verbose=False)
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    torch.manual_seed(3)
    resumed = Net()
    quiet(max_epochs=4).fit(resumed, loader(), ckpt_path=path)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = Net.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert torch.equal(loaded.net.weight, task.net.weight)


class Built(Net):
    def __init__(self, inner, make=functools.partial(torch.optim.SGD, lr=0.1), unit=nn.ReLU):  # noqa: B008
        super().__init__()
        self.save_hyperparameters(ignore="inner")
        self.inner, self.unit = inner, unit()

    def forward(self, x):
        return self.inner(self.unit(x))

    def configure_optimizers(self):
        return self.hparams.make(params=self.parameters())


def test_a_network_and_factories_among_the_hyperparameters(tmp_path):
    trainer = lk.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
    task = Built(nn.Linear(4, 1))
    trainer.fit(task, loader(), loader(seed=2))
    assert trainer.test(dataloaders=loader(), ckpt_path="best", verbose=False)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(CheckpointError, match=r"inner, make \(functools.partial\). Pass them"):
        Built.load_from_checkpoint(path)
    # `unit` is a class that was left at its default: its name is enough.
    loaded = Built.load_from_checkpoint(path, inner=nn.Linear(4, 1), make=torch.optim.SGD)
    assert torch.equal(loaded.inner.weight, task.inner.weight)
    assert loaded.hparams.unit is nn.ReLU
    other = Built(nn.Linear(4, 1), unit=nn.Tanh)
    trainer.fit(other, loader())
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(CheckpointError, match=r"unit \(torch.nn.modules.activation.Tanh\)"):
        Built.load_from_checkpoint(path, inner=nn.Linear(4, 1), make=torch.optim.SGD)


@pytest.mark.parametrize("key", elsewhere.CHECKPOINT)
def test_keys_of_a_checkpoint(key, quiet, tmp_path):
    class Saves(Net):
        def on_save_checkpoint(self, checkpoint):
            with pytest.raises(KeyError, match=re.escape(elsewhere.CHECKPOINT[key])):
                checkpoint[key]
            assert eval(elsewhere.CHECKPOINT[key]) is not None  # what it says is there
            assert key not in checkpoint
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            assert eval(elsewhere.CHECKPOINT[key]) is not None
            self.mine = checkpoint["mine"]

    trainer = quiet(max_epochs=1)
    trainer.fit(Saves(), loader(8))
    path = trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert Saves.load_from_checkpoint(path).mine == 3
    resumed = Saves()
    quiet(max_epochs=2).fit(resumed, loader(8), ckpt_path=path)
    assert resumed.mine == 3


def test_a_logger_as_it_was_written_elsewhere(tmp_path):
    class Rows(lk.loggers.Logger):
        def __init__(self):
            super().__init__()
            self.rows, self.params, self.status = [], None, None

        @property
        def name(self):
            return "rows"

        @property
        def version(self):
            return 3

        @lk.rank_zero_only
        def log_hyperparams(self, params, *args, **kwargs):
            self.params = dict(params)

        @lk.rank_zero_only
        def log_metrics(self, metrics, step):
            self.rows.append((step, metrics["train_loss"]))

        @lk.rank_zero_only
        def finalize(self, status):
            self.status = status

    logger = Rows()
    trainer = lk.Trainer(max_epochs=1, logger=logger, log_every_n_steps=1,
                         default_root_dir=tmp_path, enable_progress_bar=False)  # fmt: skip
    trainer.fit(Net(), loader())
    assert [step for step, _ in logger.rows] == [1, 2, 3, 4, 5]
    assert (logger.params, logger.status) == ({"width": 4}, "success")


def test_data_as_they_were_given(quiet):
    trainer, task = quiet(max_epochs=1), Net()
    train, val, test = loader(), loader(seed=2), [loader(seed=3), loader(seed=4)]

    class Watch(lk.Callback):
        def on_train_start(self, trainer, pl_module):
            assert trainer.train_dataloader is train
            assert trainer.val_dataloaders is val

    trainer.callbacks.append(Watch())
    assert trainer.val_dataloaders is None
    trainer.fit(task, train, val)
    trainer.test(task, test, verbose=False)
    trainer.predict(task, test[0])
    assert trainer.val_dataloaders is val
    assert trainer.test_dataloaders is test
    assert trainer.predict_dataloaders is test[0]


class Configured(Net):
    def __init__(self, hparams):
        super().__init__(hparams.width)
        self.save_hyperparameters(hparams)


@pytest.mark.parametrize("kind", [argparse.Namespace, lk.hparams.HParams])
def test_one_object_with_all_hyperparameters(kind, quiet, tmp_path, caplog):
    trainer, task = quiet(max_epochs=1), Configured(kind(width=4, lr=0.1, tf=0.5))
    trainer.fit(task, loader())
    path = trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert Configured.load_from_checkpoint(path).hparams == {"width": 4, "lr": 0.1, "tf": 0.5}
    other = Configured.load_from_checkpoint(path, tf=0.1)  # one field of it
    assert other.hparams == {"width": 4, "lr": 0.1, "tf": 0.1}
    caplog.clear()
    another = Configured.load_from_checkpoint(path, hparams=kind(width=4))
    assert another.hparams == {"width": 4}
    assert "no longer has" not in caplog.text
    with pytest.raises(lk.errors.ConfigError, match="has no argument 'tg'"):
        Configured.load_from_checkpoint(path, tg=0.1)


def test_callbacks_may_be_added_and_removed_between_calls(quiet):
    class Counts(lk.Callback):
        epochs = 0

        def on_train_epoch_start(self, trainer, pl_module):
            self.epochs += 1

        def on_validation_epoch_start(self, trainer, pl_module):
            self.epochs += 1

    first, second, third = Counts(), Counts(), Counts()
    trainer = quiet(max_epochs=1, callbacks=[first], num_sanity_val_steps=0)
    trainer.fit(Net(), loader())
    trainer.callbacks.append(second)
    trainer.fit(Net(), loader())
    trainer.callbacks.insert(0, third)
    trainer.callbacks.remove(first)
    trainer.validate(Net(), loader(), verbose=False)
    assert trainer.callbacks == [second, third]
    assert (first.epochs, second.epochs, third.epochs) == (2, 2, 1)
    trainer.callbacks.append(Counts)
    with pytest.raises(lk.errors.ConfigError, match="Make an object of it"):
        trainer.fit(Net(), loader())


def test_folds_do_not_take_up_each_other(tmp_path):
    def fold(number, ckpt_path=None, epochs=1):
        save = lk.callbacks.ModelCheckpoint(dirpath=tmp_path / f"fold{number}")
        trainer = lk.Trainer(max_epochs=epochs, callbacks=[save], logger=False,
                             default_root_dir=tmp_path, enable_progress_bar=False)  # fmt: skip
        trainer.fit(Net(), loader(8), ckpt_path=ckpt_path)
        return trainer.global_step

    assert (fold(1), fold(2)) == (2, 2)
    with pytest.raises(lk.errors.UsageError, match="that wrote to the dirpath of its ModelCheck"):
        fold(3, "last")
    assert fold(1, "last", epochs=3) == 6
    assert fold(2, "last", epochs=2) == 4


def test_metrics_are_copied_and_a_logger_is_saved(tmp_path):
    logger = lk.loggers.CSVLogger(tmp_path, name="rows")
    trainer = lk.Trainer(max_epochs=1, logger=logger, enable_progress_bar=False,
                         enable_checkpointing=False)  # fmt: skip
    trainer.fit(Net(), loader())
    kept = trainer.callback_metrics.copy()
    trainer.fit(Net(), loader())
    logger.save()
    assert type(kept) is dict
    assert kept.keys() == trainer.callback_metrics.keys()
    assert kept["train_loss"] is not trainer.callback_metrics["train_loss"]


@pytest.mark.parametrize("name", elsewhere.CALLBACK_ARGUMENTS)
def test_old_arguments_of_model_checkpoint(name):
    with pytest.raises(lk.errors.ConfigError, match=f"Write {elsewhere.CALLBACK_ARGUMENTS[name]}"):
        lk.callbacks.ModelCheckpoint(**{name: 1})
    with pytest.raises(lk.errors.ConfigError, match="Did you mean 'monitor'"):
        lk.callbacks.ModelCheckpoint(moniter="val_loss")


@pytest.mark.parametrize("name", ["get_metrics", "init_train_tqdm", "init_validation_tqdm"])
def test_what_another_progress_bar_would_have_called(name):
    with pytest.raises(lk.errors.HookNameError, match=f"Mine.{name} would never be called"):
        type("Mine", (lk.callbacks.TQDMProgressBar,), {name: lambda self, *_: None})


def test_val_check_interval_without_validation_says_nothing(quiet, caplog):
    quiet(max_epochs=1, val_check_interval=50).fit(Net(), iter_loader())
    assert "never comes" not in caplog.text
    quiet(max_epochs=1, val_check_interval=50).fit(Net(), iter_loader(), loader(8))
    assert "val_check_interval=50 never comes" in caplog.text


def test_none_where_it_is_the_default_elsewhere():
    names = ("enable_checkpointing", "enable_model_summary", "enable_progress_bar",
             "gradient_clip_algorithm", "log_every_n_steps", "precision")  # fmt: skip
    assert lk.Trainer(**dict.fromkeys(names)).options == lk.Trainer().options


def iter_loader():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader(8).dataset)

    return torch.utils.data.DataLoader(Stream(), batch_size=4)


def test_an_error_in_a_property_stays_itself():
    class Mine(lk.Trainer):
        @property
        def speed(self):
            return self.model.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = Mine().speed


def test_a_function_without_a_module_is_a_hook(quiet):
    seen = eval("lambda trainer, task: calls.append(1)", {"calls": (calls := [])})
    quiet(max_epochs=1, callbacks=[lk.callbacks.LambdaCallback(on_fit_end=seen)]).fit(
        Net(), loader()
    )
    assert calls == [1]
