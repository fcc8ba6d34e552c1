"""Signals during a fit, within one process. Real ones from outside: tests/faults/test_signals.py."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightkit as lk
from lightkit import signals
from lightkit.flow import Flow
from lightkit.loggers import Logger
from tests.small import Net as Small
from tests.small import loader

INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


@pytest.fixture(autouse=True)
def handlers():
    """Ctrl-C as in a terminal, also where a shell started the tests in the background."""
    before = {number: signal.getsignal(number) for number in (INT, TERM, USR1, HUP)}
    signal.signal(INT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def installed():
    return [signal.getsignal(number) for number in (INT, TERM, USR1, HUP)]


def watched(flow, *numbers, then=lambda: None):
    """Sends signals to a fit of a few lines."""
    with signals.watching(flow):
        for number in numbers:
            signal.raise_signal(number)
        then()


# --- the handler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [INT, TERM, USR1, HUP])
def test_a_signal_is_taken_down_and_raised_at_the_end_if_nobody_did(number):
    def look():
        seen.append(flow.signal)
        assert set(installed()).isdisjoint(before)

    flow, before, seen = Flow(), installed(), []
    with pytest.raises(KeyboardInterrupt if number == INT else SystemExit) as error:
        watched(flow, number, then=look)
    assert seen == [number]
    assert getattr(error.value, "code", 128 + number) == 128 + number
    assert installed() == before


def test_the_first_one_counts_and_an_error_goes_before_it():
    def fail():
        raise OSError("mine")

    flow, before = Flow(), installed()
    with pytest.raises(OSError, match="mine"):
        watched(flow, USR1, TERM, HUP, USR1, then=fail)
    assert flow.signal == USR1
    assert installed() == before


@pytest.mark.parametrize(("number", "kind"), [(INT, KeyboardInterrupt), (TERM, SystemExit)])
def test_a_second_one_ends_at_once(number, kind):
    flow, before = Flow(), installed()
    with pytest.raises(kind):
        watched(flow, number, number, then=lambda: pytest.fail("still going on"))
    assert installed() == before


def test_ctrl_c_says_one_line(capfd):
    with pytest.raises(KeyboardInterrupt):
        watched(Flow(), INT)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "stopping after this step; ^C again: now\n"
    with pytest.raises(SystemExit):
        watched(Flow(), TERM)
    assert capfd.readouterr() == ("", "")


def test_what_is_ignored_stays_ignored():
    signal.signal(HUP, signal.SIG_IGN)  # as under nohup
    flow = Flow()
    watched(flow, HUP)
    assert flow.signal is None
    assert signal.getsignal(HUP) is signal.SIG_IGN


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells")
def test_what_is_caught_outside_python_stays_so(capfd, caplog):
    caplog.set_level("INFO")
    faulthandler.register(USR1, all_threads=False)
    flow = Flow()
    try:
        for _ in range(2):
            watched(flow, USR1)
    finally:
        faulthandler.unregister(USR1)
    assert flow.signal is None
    assert capfd.readouterr().err.count("most recent call first") == 2
    assert "SIGUSR1 is caught outside Python" in caplog.text


def test_a_former_handler_is_called_once_after_all_else():
    seen = []

    def mine(number, frame):
        seen.append((number, frame.f_code.co_name))

    signal.signal(TERM, mine)
    with pytest.raises(SystemExit):
        watched(Flow(), TERM, HUP, then=lambda: seen.append("saved"))
    assert seen == ["saved", (TERM, "watched")]
    assert signal.getsignal(TERM) is mine
    watched(Flow())
    assert len(seen) == 2


def test_a_handler_that_was_set_within_is_left():
    def mine(number, frame):
        pass

    with signals.watching(Flow()):
        signal.signal(USR1, mine)
    assert signal.getsignal(USR1) is mine


def test_one_within_another(capfd):
    def within():
        own = installed()
        with pytest.raises(KeyboardInterrupt):
            watched(inner, INT, then=lambda: seen.append(outer.signal))
        seen.append(outer.signal)
        assert installed() == own

    outer, inner, before, seen = Flow(), Flow(), installed(), []
    with pytest.raises(KeyboardInterrupt):
        watched(outer, then=within)
    assert seen == [None, INT]  # the outer one is asked when the inner one is over
    assert installed() == before
    assert capfd.readouterr().err.count("stopping") == 1


def test_other_threads_leave_the_signals_alone():
    def work():
        watched(Flow(), then=lambda: seen.extend(installed()))

    seen, before = [], installed()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize("numbers", [(TERM,), (INT, USR1), (INT, INT)])
def test_a_forked_child_dies_of_it_as_ever(numbers):
    """As ``Pool.terminate`` relies on: it has the handler, but no loop that looks.

    One Ctrl-C it survives, for a terminal sends it to all, and the step may need the child.
    """
    signal.signal(INT, signal.SIG_DFL)
    flow = Flow()
    ready, tell = os.pipe()
    with signals.watching(flow):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for _ in range(10_000):
                    os.write(tell, b".")
                    time.sleep(0.01)
            os._exit(3)
        for number in numbers:
            os.read(ready, 100)
            assert os.read(ready, 1) == b"."  # it is alive
            os.kill(child, number)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == numbers[-1]
    os.close(ready)
    os.close(tell)
    assert flow.signal is None


# --- the loop ------------------------------------------------------------------------------------


class Noisy(Dataset):
    """Samples that are augmented from all three random states."""

    def __init__(self, samples: int, seed: int):
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(4) + float(np.random.rand()) + random.random()
        return self.x[index] + noise, self.x[index].sum(0, keepdim=True)


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        torchmetrics = pytest.importorskip("torchmetrics")
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
        )
        self.seen = torchmetrics.MeanSquaredError()
        self.logged = torchmetrics.MeanAbsoluteError()
        self.own = torchmetrics.MeanAbsoluteError()  # computed and reset by the task
        self.outside = [torchmetrics.MeanAbsoluteError()]  # no part of the task

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        self.seen.update(output.detach(), batch[1])
        self.log("seen", self.seen)
        return nn.functional.mse_loss(output, batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        output = self.net(batch[0])
        self.log("val_loss", nn.functional.mse_loss(output, batch[1]), on_step=True, on_epoch=True)
        for name in ("logged", "own"):
            getattr(self, name).update(output, batch[1])
        self.log("logged", self.logged)
        self.outside[0].update(output, batch[1])
        self.log("outside", self.outside[0])

    def on_validation_epoch_end(self):
        self.log("own", self.own.compute(), batch_size=1)
        self.own.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        plans = [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"},
            {"scheduler": plateau, "monitor": "own", "interval": "step"},
        ]
        return {"optimizer": optimizer, "lr_scheduler": plans}


class Skips(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in (3, 4) else loss


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self):
        self.rows = []

    def open(self, run_dir, purge_step=None):
        pass

    def log_metrics(self, metrics, step):
        row = {k: v for k, v in metrics.items() if k != "time"}
        self.rows.append((step, row))


HOOKS = (
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_point",
    "on_train_end",
    "on_fit_end",
)


class Send(lk.Callback):
    """Writes down hooks (not those that keep a validation whole); sends a signal in one of them."""

    def __init__(self, at: int = -1):
        self.at, self.seen = at, []

    def note(self, name, trainer):
        self.seen.append("sanity" if trainer.sanity_checking else name)
        if len(self.seen) - 1 == self.at:
            signal.raise_signal(TERM)


for _name in HOOKS:
    setattr(Send, _name, lambda self, trainer, task, *_, name=_name: self.note(name, trainer))


def run(folder, send, *, seed=3, task=Net, ckpt_path=None, loaders=1, **options):
    """Returns (task, trainer, rows, exit code)."""
    lk.seed_everything(seed, verbose=False)
    train = DataLoader(Noisy(22, 1), 4, shuffle=True)
    val = [DataLoader(Noisy(7, 2 + i), 4, shuffle=True) for i in range(loaders)]
    rows, code, net = Rows(), None, task()
    options = {
        "max_epochs": 2, "logger": rows, "enable_progress_bar": False, "log_every_n_steps": 2,
        "enable_model_summary": False, "default_root_dir": folder,
    } | options  # fmt: skip
    keep = lk.callbacks.ModelCheckpoint(folder / "files")
    t = lk.Trainer(callbacks=[keep, send], **options)
    try:
        t.fit(net, train, val, ckpt_path=ckpt_path)
    except SystemExit as error:
        code = error.code
    return net, t, rows.rows, code


def random_now():
    return torch.rand(2).tolist(), np.random.rand(), random.random()


def everything(net, trainer):
    """What must be equal, bit for bit."""
    return (
        {k: v.tolist() for k, v in net.state_dict().items()},
        str(trainer.optimizers[0].state_dict()),
        [entry.scheduler.state_dict() for entry in trainer.lr_schedulers],
        [{k: v for k, v in row.items() if k != "time"} for row in trainer.history],
        {k: v for k, v in trainer.state.state_dict().items() if k != "seconds"},
    )


def chosen(seen):
    """The first and the last call of each hook."""
    return sorted(
        {at for name in seen for at in (seen.index(name), len(seen) - 1 - seen[::-1].index(name))}
    )


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 2, "loaders": 2},
        {"task": Skips, "val_check_interval": 2},
        {"val_check_interval": "2 steps", "max_epochs": -1, "max_steps": 11},
    ],
    ids=["plain", "within, accumulated", "skipped batches", "by steps"],
)
def test_whenever_it_comes_the_run_goes_on_from_there(tmp_path, monkeypatch, options, which):
    """A signal in each hook in turn: the two lives together are the one that was never asked."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # most of the time of so small a fit
    send = Send()
    net, trainer, rows, code = run(tmp_path / "whole", send, **options)
    assert code is None
    assert trainer.interrupted is None
    expected, drawn = everything(net, trainer), random_now()
    saved = 0
    places = chosen(send.seen) if which == "some" else range(len(send.seen))
    for at in places:
        place, folder = (at, send.seen[at]), tmp_path / str(at)
        before = installed()
        first = run(folder, Send(at), **options)
        assert (first[3], first[1].interrupted) == (128 + TERM, "SIGTERM"), place
        assert installed() == before
        if first[1].limits.reached(first[1].state):  # it was over anyway, and ended as usual
            assert everything(*first[:2]) == expected, place
            assert first[2] == rows, place
            continue
        last = folder / "files" / "last.ckpt"
        if not last.exists():
            assert first[1].global_step == 0, place
            continue
        rest = run(folder, Send(), seed=99, ckpt_path=last, **options)
        assert rest[3] is None
        assert random_now() == drawn, place
        assert everything(*rest[:2]) == expected, place
        assert first[2] + rest[2] == rows, place  # each row once
        saved += 1
    assert saved > len(places) / 2


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
def test_the_same_objects_can_go_on(tmp_path, hook):
    """As in a notebook: nothing of the interrupted life is left in the task and its metrics."""
    send = Send()
    net, trainer, rows, _ = run(tmp_path / "whole", send)
    expected = everything(net, trainer)
    at = len(send.seen) - 1 - send.seen[::-1].index(hook)
    net, trainer, _, code = run(tmp_path / "both", Send(at))
    assert code == 143
    random_now()
    train, val = (DataLoader(Noisy(n, s), 4, shuffle=True) for n, s in ((22, 1), (7, 2)))
    trainer.fit(net, train, val, ckpt_path="last")
    assert everything(net, trainer) == expected
    assert trainer.loggers[0].rows == rows
    assert trainer.interrupted is None


def test_it_ends_at_this_very_step(tmp_path, caplog):
    class At7(Small):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 7:
                signal.raise_signal(USR1)
            return super().training_step(batch, batch_idx)

    caplog.set_level("INFO")
    logging.getLogger("lightkit").propagate = True
    t = lk.Trainer(
        max_epochs=9, min_epochs=5, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(SystemExit) as error:
        t.fit(At7(), loader(12))
    assert error.value.code == 128 + USR1
    assert t.global_step == 8
    assert t.interrupted == "SIGUSR1"
    assert len(t.history) == 2
    saved = torch.load(t.checkpoint_callback.last_model_path, weights_only=True)
    assert saved["loop"]["global_step"] == 8
    assert "SIGUSR1: stopped after step 8" in caplog.text
    t.fit(Small(), loader(4), ckpt_path=None)
    assert t.interrupted is None


def test_validation_hooks_see_the_end_of_completed_ones_only(quiet):
    class Watch(lk.Callback):
        ends = epoch_ends = batches = 0

        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.batches += 1
            if self.ends == 1:
                signal.raise_signal(TERM)

        def on_validation_epoch_end(self, trainer, task):
            self.epoch_ends += 1

        def on_validation_end(self, trainer, task):
            self.ends += 1

        def on_train_epoch_end(self, trainer, task):
            assert self.ends == 1

    watch = Watch()
    t = quiet(max_epochs=3, callbacks=watch, num_sanity_val_steps=0)
    net = Small()
    with pytest.raises(SystemExit):
        t.fit(net, loader(), loader())
    assert (watch.batches, watch.epoch_ends, watch.ends) == (6, 1, 1)
    assert t.state.validations == 1
    assert t.state.pending_validation == "epoch"
    assert len(t.history) == 1
    assert not t.validating
    assert all(module.training for module in net.modules())


class Averages(lk.Callback):
    """Evaluates other weights than it trains, as averaging callbacks do."""

    def on_validation_start(self, trainer, task):
        self.kept = {k: v.clone() for k, v in task.state_dict().items()}
        for parameter in task.parameters():
            parameter.data.zero_()

    def on_validation_end(self, trainer, task):
        task.load_state_dict(self.kept)


class Counts(lk.Callback):
    """Has a state that validation batches change."""

    seen = 0

    def on_validation_batch_start(self, trainer, task, batch, batch_idx):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}


class Lists(Small):
    def on_validation_epoch_start(self):
        self.outputs = []


@pytest.mark.parametrize(
    ("task", "callback", "whole"),
    [
        (Small, Averages(), True),
        (Small, Counts(), True),
        (Lists, lk.Callback(), True),
        (Small, lk.callbacks.LambdaCallback(on_validation_start=lambda t, n: None), True),
        (Small, lk.callbacks.EarlyStopping("val_loss"), False),
        (Small, lk.callbacks.Timer(), False),
    ],
    ids=["averages", "counts", "task", "lambda", "early stopping", "timer"],
)
def test_a_validation_that_has_an_end_to_wait_for_is_completed(tmp_path, task, callback, whole):
    class Ask(lk.Callback):
        def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(batch_idx)
            if len(seen) == 1:
                signal.raise_signal(TERM)

    seen = []
    t = lk.Trainer(
        callbacks=[callback, Ask()], num_sanity_val_steps=0, default_root_dir=tmp_path,
        enable_progress_bar=True, logger=False, max_epochs=2,
    )  # fmt: skip
    with pytest.raises(SystemExit):
        t.fit(task(), loader(), loader())
    assert len(seen) == (5 if whole else 1)
    saved = torch.load(t.checkpoint_callback.last_model_path, weights_only=True)
    assert saved["loop"]["pending_validation"] == ("" if whole else "epoch")
    assert saved["loop"]["epoch"] == int(whole)
    assert saved["model"]["net.weight"].abs().sum() > 0


def test_a_schedule_moves_after_an_epoch_whose_steps_were_all_before_the_checkpoint(tmp_path):
    """The optimizer of the run that goes on has not stepped yet when the epoch ends."""

    class Scheduled(Small):
        stops = True

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

        def validation_step(self, batch, batch_idx):
            if self.stops and self.current_epoch == 1:
                signal.raise_signal(TERM)

        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    options = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0}
    options |= {"default_root_dir": tmp_path, "max_epochs": 3}
    with pytest.raises(SystemExit):
        lk.Trainer(**options).fit(Scheduled(), loader(), loader())
    again = Scheduled()
    again.stops = False
    lk.Trainer(**options).fit(again, loader(), loader(), ckpt_path="auto")
    steps = len(rates) // 3
    assert rates == [0.1] * steps + [0.05] * steps + [0.025] * steps


def test_before_anything_was_trained_nothing_is_saved(tmp_path):
    t = lk.Trainer(
        default_root_dir=tmp_path, enable_progress_bar=False, logger=False,
        callbacks=lk.callbacks.LambdaCallback(
            on_fit_start=lambda trainer, task: signal.raise_signal(TERM)
        ),
    )  # fmt: skip
    with pytest.raises(SystemExit):
        t.fit(Small(), loader(), loader())
    assert t.global_step == 0
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_ctrl_c_in_an_evaluation_is_pythons_own(quiet):
    class Asks(Small):
        def validation_step(self, batch, batch_idx):
            signal.raise_signal(INT)
            pytest.fail("still going on")

    before = installed()
    t = quiet()
    with pytest.raises(KeyboardInterrupt):
        t.validate(Asks(), loader())
    assert installed() == before


def test_a_fit_within_a_fit(quiet):
    class Inner(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            own = installed()
            quiet().fit(Small(), loader())
            assert installed() == own

    before = installed()
    quiet(callbacks=Inner()).fit(Small(), loader())
    assert installed() == before


def test_a_fit_in_a_thread(quiet):
    def work():
        t.fit(Small(), loader())

    t = quiet()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert t.global_step == 5


def test_the_counters_of_the_last_completed_step(quiet):
    class Look(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            completed = trainer._run.completed()
            seen.append((trainer.state.batch_idx, completed["batch_idx"], completed["global_step"]))

    seen = []
    quiet(callbacks=Look(), accumulate_grad_batches=3).fit(Small(), loader())
    assert seen == [(1, 0, 0), (2, 0, 0), (3, 3, 1), (4, 3, 1), (5, 5, 2)]
