"""The loop through the Trainer: when it ends, when it validates, in which mode modules are."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.errors import ConfigError, UsageError


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(batches: int = 5, seed: int = 1) -> DataLoader:
    x = torch.randn(batches * 4, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


class Diary(lk.Callback):
    """Writes down what happens, with the position."""

    def __init__(self):
        self.seen = []

    def _note(self, trainer, word):
        self.seen.append((word, trainer.current_epoch, trainer.global_step))

    def on_validation_start(self, trainer, task):
        self._note(trainer, "sanity" if trainer.sanity_checking else "val")
        assert trainer.validating
        assert not trainer.training

    def on_train_epoch_end(self, trainer, task):
        self._note(trainer, "epoch_end")
        assert trainer.training

    def on_save_point(self, trainer, task):
        if trainer.epoch_ended or trainer.run_ending:
            self._note(trainer, "saved" + (" last" if trainer.run_ending else ""))

    def on_train_end(self, trainer, task):
        self._note(trainer, "train_end")

    def of(self, word):
        return [(epoch, step) for seen, epoch, step in self.seen if seen == word]


@pytest.fixture
def quiet(tmp_path):
    def make(**options) -> lk.Trainer:
        defaults = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path / "runs",
        }
        return lk.Trainer(**defaults | options)

    return make


# --- when it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({"max_epochs": 2}, 2, 10),
        ({"max_epochs": 0}, 0, 0),
        ({"max_steps": 0}, 0, 0),
        ({"max_steps": 3}, 0, 3),
        ({"max_steps": 5}, 1, 5),
        ({"max_steps": 12}, 2, 12),
        ({"max_epochs": -1, "max_steps": 6}, 1, 6),
        ({"max_epochs": 1, "max_steps": 100}, 1, 5),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 2, 6),
        ({"max_steps": 4, "accumulate_grad_batches": 2}, 1, 4),
    ],
)
def test_limits(quiet, options, epochs, steps):
    t = quiet(**options)
    t.fit(Net(), loader())
    assert (t.current_epoch, t.global_step) == (epochs, steps)


def test_an_end_in_the_middle_of_an_epoch(quiet):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    diary = Diary()
    t = quiet(max_steps=7, callbacks=diary)
    history = t.fit(Scheduled(), loader(), loader(2, seed=2))
    assert diary.seen == [
        ("val", 0, 5),
        ("epoch_end", 0, 5),
        ("saved", 1, 5),
        ("saved last", 1, 7),  # the state before the end of the epoch, so it can be continued
        ("epoch_end", 1, 7),
        ("train_end", 1, 7),
    ]
    assert [(row["epoch"], row["step"]) for row in history] == [(1, 5), (2, 7)]
    assert t.current_epoch == 1
    assert t.lr_schedulers[0].scheduler.last_epoch == 1
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_an_end_with_the_epoch(quiet):
    diary = Diary()
    quiet(max_steps=5, callbacks=diary).fit(Net(), loader(), loader(2, seed=2))
    assert diary.seen == [
        ("val", 0, 5), ("epoch_end", 0, 5), ("saved last", 1, 5), ("train_end", 1, 5)
    ]  # fmt: skip


def test_max_time(quiet, capsys):
    class Slow(Net):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    t = quiet(max_time={"seconds": 0.1}, max_epochs=-1)
    t.fit(Slow(), loader())
    assert 1 <= t.global_step <= 6
    assert "stopped: max_time is over" in capsys.readouterr().out


class StopAt(lk.Callback):
    def __init__(self, step, how="stop"):
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.how == "stop":
                trainer.stop("enough")
            else:
                trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 2),
        ({"min_steps": 4}, 4),
        ({"min_epochs": 1}, 5),
        ({"min_epochs": 2, "min_steps": 12}, 12),
        ({"min_epochs": 1, "min_steps": 2}, 5),
    ],
)
@pytest.mark.parametrize("how", ["stop", "should_stop"])
def test_a_request_to_stop_waits_for_the_minimum(quiet, options, steps, how, capsys):
    t = quiet(max_epochs=4, callbacks=StopAt(2, how), **options)
    t.fit(Net(), loader())
    assert t.global_step == steps
    assert t.should_stop
    reason = "enough" if how == "stop" else "trainer.should_stop was set"
    assert f"stopped: {reason}" in capsys.readouterr().out


def test_the_next_fit_does_not_remember_the_stop(quiet):
    t = quiet(max_epochs=1, callbacks=StopAt(2))
    t.fit(Net(), loader())
    t._callbacks.clear()
    t.fit(Net(), loader())
    assert t.global_step == 5


# --- when it validates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [5, 10, 15, 20]),
        ({"check_val_every_n_epoch": 2}, [10, 20]),
        ({"val_check_interval": 2}, [2, 4, 7, 9, 12, 14, 17, 19]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 2}, [7, 9, 17, 19]),
        ({"val_check_interval": 5}, [5, 10, 15, 20]),
        ({"val_check_interval": 0.5}, [2, 4, 7, 9, 12, 14, 17, 19]),
        ({"val_check_interval": 1.0}, [5, 10, 15, 20]),
        ({"val_check_interval": 1}, list(range(1, 21))),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [7, 14]),
        ({"val_check_interval": "6 steps"}, [6, 12, 18]),
        ({"val_check_interval": "1 day"}, []),
        ({"val_check_interval": 2, "accumulate_grad_batches": 2}, [1, 2, 4, 5, 7, 8, 10, 11]),
        ({"val_check_interval": 3, "accumulate_grad_batches": 2}, [2, 5, 8, 11]),
        ({"val_check_interval": "2 steps", "accumulate_grad_batches": 2}, [2, 4, 6, 8, 10, 12]),
        ({"limit_train_batches": 3, "val_check_interval": 3}, [3, 6, 9, 12]),
    ],
)
def test_when_it_validates(quiet, options, expected):
    diary = Diary()
    quiet(max_epochs=4, callbacks=diary, **options).fit(Net(), loader(), loader(2, seed=2))
    assert [step for _, step in diary.of("val")] == expected


def test_validation_by_the_clock(quiet):
    class Slow(Net):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    diary = Diary()
    quiet(max_epochs=2, callbacks=diary, val_check_interval="0.05 s").fit(
        Slow(), loader(), loader(1, seed=2)
    )
    assert 1 <= len(diary.of("val")) <= 4


def test_an_interval_longer_than_the_epoch_is_an_error(quiet):
    with pytest.raises(
        ConfigError, match="no validation would ever run.*. steps. .of the optimizer"
    ):
        quiet(max_epochs=1, val_check_interval=6).fit(Net(), loader(), loader(1))


# --- the sanity check ----------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "batches"), [(None, 2), (1, 1), (-1, 3), (10, 3), (0, 0)])
def test_the_sanity_check_tries_a_few_batches(quiet, given, batches):
    class Look(Net):
        def validation_step(self, batch, batch_idx):
            if self.trainer.sanity_checking:
                seen.append(batch_idx)
            return super().validation_step(batch, batch_idx)

    seen = []
    quiet(max_epochs=1, num_sanity_val_steps=given).fit(Look(), loader(), loader(3, seed=2))
    assert seen == list(range(batches))


def test_the_sanity_check_leaves_no_trace(quiet):
    class Look(Net):
        def validation_step(self, batch, batch_idx):
            torch.rand(1), np.random.rand(), random.random()
            self.log("bad", float("inf"))
            return super().validation_step(batch, batch_idx)

        def on_train_start(self):
            states.append(
                (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.random())
            )
            metrics.append(dict(self.trainer.callback_metrics))

    states, metrics = [], []
    for steps in (0, 2):
        lk.seed_everything(3, verbose=False)
        net, t = Look(), quiet(max_epochs=1, num_sanity_val_steps=steps)
        t.fit(net, loader(), loader(3, seed=2))
        assert t.state.validations == 1
        assert len(t.history) == 1
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]
    assert metrics == [{}, {}]


def test_hooks_of_the_sanity_check_find_its_metrics(quiet):
    """As those of a validation do: code that reads a metric there need not know of the check."""

    class Look(Net):
        def on_validation_epoch_end(self):
            found.append(float(self.trainer.callback_metrics["val_loss"]))

        def on_train_start(self):
            found.append(len(self.trainer.callback_metrics))

    found = []
    t = quiet(max_epochs=1, num_sanity_val_steps=-1)
    history = t.fit(Look(), loader(), loader(3, seed=2))
    first, there, last = found
    assert there == 0  # training begins without them
    assert history["val_loss"] == [pytest.approx(last)] != [pytest.approx(first)]


def test_an_error_in_the_sanity_check_comes_before_training(quiet):
    class Breaks(Net):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    t = quiet(max_epochs=1, num_sanity_val_steps=1)
    with pytest.raises(ZeroDivisionError):
        t.fit(Breaks(), loader(), loader(1, seed=2))
    assert t.global_step == 0
    assert not t.sanity_checking


# --- modes and gradients -------------------------------------------------------------------------


def modes(net) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


def test_modes_are_kept_for_each_module(quiet):
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.net[1].eval()

        def training_step(self, batch, batch_idx):
            seen.append(("train", modes(self)))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen.append(("val", modes(self)))

    seen, net = [], Frozen()
    before = modes(net)
    assert not before["net.1"]
    assert before["net.2"]
    quiet(max_epochs=2, val_check_interval=2).fit(net, loader(), loader(1, seed=2))
    assert {word for word, _ in seen} == {"train", "val"}
    for word, found in seen:
        assert found == (before if word == "train" else dict.fromkeys(before, False))
    assert modes(net) == before
    assert net.net[1].num_batches_tracked == 0


def test_what_stays_in_eval_mode_is_named_by_its_top(quiet, caplog):
    task = Net()
    task.body = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).eval()
    with caplog.at_level("INFO", "lightkit"):
        quiet().fit(task, loader())
    assert "3 modules stay in eval mode, as they were: body" in caplog.messages


def test_a_task_left_in_eval_mode_is_trained_in_train_mode(quiet):
    class Look(Net):
        def training_step(self, batch, batch_idx):
            assert all(modes(self).values())
            return super().training_step(batch, batch_idx)

    net = Look()
    net.eval()
    quiet(max_epochs=1).fit(net, loader())


def test_modes_are_kept_after_an_exception_in_validation(quiet):
    class Breaks(Net):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    net = Breaks()
    with pytest.raises(ZeroDivisionError):
        quiet(max_epochs=1).fit(net, loader(), loader(1, seed=2))
    assert all(modes(net).values())
    net.net[0].eval()
    before = modes(net)
    with pytest.raises(ZeroDivisionError):
        quiet().validate(net, loader())
    assert modes(net) == before


def test_evaluations_build_no_graph_and_hooks_may(quiet):
    class Look(Net):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            assert not loss.requires_grad
            assert not torch.is_grad_enabled()
            assert not torch.is_inference(loss)
            return loss

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            assert torch.is_grad_enabled()

        predict_step = validation_step

    quiet().validate(Look(), loader(), verbose=False)
    quiet().predict(Look(), loader())
    quiet(max_epochs=1).fit(Look(), loader(), loader(1, seed=2))


def test_weights_do_not_move_in_an_evaluation(quiet):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quiet().validate(net, loader(), verbose=False)
    quiet().predict(net, loader())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- what training_step may return ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda net: 3.0, "returned float"),
        (
            lambda net: {"los": net.net[0].weight.sum()},
            r"without a tensor under 'loss' \(it has: los",
        ),
        (lambda net: net.net[0].weight, r"a loss of shape \(4, 4\)"),
        (lambda net: torch.tensor(1.0), "does not depend on any trainable parameter"),
        (lambda net: net.net[0].weight.sum().detach(), "does not depend on any trainable"),
    ],
)
def test_wrong_results_say_what_to_return(quiet, value, text):
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            return value(self)

    with pytest.raises(UsageError, match=text):
        quiet(max_epochs=1).fit(Wrong(), loader())


def test_batches_may_be_skipped(quiet, caplog):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    t = quiet(max_epochs=1)
    t.fit(Skips(), loader())
    assert t.global_step == 3
    assert t.current_epoch == 1
    assert "returned None for 2 batches" in caplog.text


def test_a_fit_that_would_skip_batches_for_ever_ends(quiet):
    class Never(Net):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(UsageError, match="returned None for all 5 batches of an epoch"):
        quiet(max_steps=5, max_epochs=-1).fit(Never(), loader())


def test_a_loss_of_one_element_in_any_shape_and_values_beside_it(quiet):
    class Look(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss.reshape(1, 1), "extra": loss.detach() * 2, "text": "a"}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert not outputs["loss"].requires_grad
            assert outputs["text"] == "a"

    t = quiet(max_epochs=1)
    row = t.fit(Look(), loader())[0]
    assert row["train_extra"] == pytest.approx(2 * row["train_loss"])


def test_the_sanity_check_leaves_a_generator_that_loaders_share(quiet):
    seen = []
    for steps in (0, 2):
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.arange(8.0)[:, None].expand(8, 4), torch.zeros(8, 1))
        train = DataLoader(data, 2, shuffle=True, generator=generator)
        val = DataLoader(TensorDataset(torch.ones(8, 4), torch.zeros(8, 1)), 2, generator=generator)
        order = []

        class Watch(lk.Callback):
            def on_train_batch_start(self, trainer, task, batch, batch_idx, order=order):
                order.extend(batch[0][:, 0].tolist())

        quiet(max_epochs=2, num_sanity_val_steps=steps, callbacks=Watch()).fit(Net(), train, val)
        seen.append(order)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("options", [{"max_steps": 7}, {"max_steps": 10, "max_epochs": 3}])
def test_a_run_that_was_over_but_did_not_come_to_its_end_comes_to_it(quiet, tmp_path, options):
    """It ended within its second epoch, saved, and died before the entry in the history."""

    class Dies(lk.Callback):
        order = 30

        def __init__(self, dies):
            self.dies, self.seen = dies, []

        def on_train_epoch_end(self, trainer, task):
            self.seen.append(trainer.global_step)
            if self.dies and trainer.global_step > 5:
                raise OSError("no power")

    def fit(watch, **more):
        t = quiet(callbacks=watch, enable_checkpointing=True, logger=True, **options)
        t.fit(Net(), loader(), loader(2, seed=2), **more)
        return t

    torch.manual_seed(1)
    whole = fit(Dies(False))
    torch.manual_seed(1)
    with pytest.raises(OSError, match="no power"):
        fit(Dies(True))
    watch = Dies(False)
    rest = fit(watch, ckpt_path="last")
    if "max_epochs" not in options:
        assert watch.seen == [7]
    same = [
        [{k: v for k, v in row.items() if k != "time"} for row in t.history] for t in (whole, rest)
    ]
    assert same[0] == same[1]
    assert whole.state.batch_idx == rest.state.batch_idx
    assert whole.state.epoch == rest.state.epoch
