"""Files that cannot be written, are written in the background, or come after an error."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightkit.checkpoint import files, latest, read_checkpoint, writer
from lightkit.errors import CheckpointError, ConfigError
from lightkit.loggers import JSONLLogger
from tests.small import Net, loader

REAL = os.replace


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.001)


def trainer(folder, *callbacks, **options) -> lk.Trainer:
    options = {"logger": False, "max_epochs": 2} | options
    return lk.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def names(t: lk.Trainer) -> list[str]:
    return sorted(p.name for p in (t.run_dir / "checkpoints").iterdir())


@pytest.fixture
def full(monkeypatch) -> Callable[..., list[str]]:
    """Lets files of chosen steps fail, as on a full disk."""

    def make(fails: Callable[[int], bool]) -> list[str]:
        attempts: list[str] = []

        def replace(source, target):
            name = os.path.basename(target)
            if name.startswith("step_"):
                attempts.append(name)
                if fails(int(name[5:11])):
                    raise OSError(errno.ENOSPC, "No space left on device")
            REAL(source, target)

        monkeypatch.setattr(files.os, "replace", replace)
        return attempts

    return make


def warnings(caplog) -> list[str]:
    texts = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    return [text for text in texts if "Trying once more" not in text]


# ---- files that cannot be written


@pytest.mark.parametrize("background", [False, True])
def test_by_default_the_fit_ends_and_the_last_good_file_is_intact(tmp_path, full, background):
    attempts = full(lambda step: step == 4)
    saver = ModelCheckpoint(every_n_train_steps=2, async_save=background)
    t = trainer(tmp_path, saver)
    with pytest.raises(CheckpointError, match=r"step_000004.*No space left.*needs about.*free"):
        t.fit(Net(), loader())
    assert attempts == ["step_000002.ckpt", "step_000004.ckpt", "step_000004.ckpt"]
    assert names(t) == ["last.ckpt", "step_000002.ckpt"]
    assert read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")["loop"]["global_step"] == 2
    assert 4 < t.global_step <= 6 if background else t.global_step == 4  # at the next boundary


@pytest.mark.parametrize("background", [False, True])
def test_on_request_it_is_a_warning_and_training_goes_on(tmp_path, full, caplog, background):
    attempts = full(lambda step: step in (4, 6))
    saver = ModelCheckpoint(every_n_train_steps=2, on_error="warn", async_save=background)
    t = trainer(tmp_path, saver)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        t.fit(Net(), loader())
    assert t.global_step == 10
    told = warnings(caplog)
    assert len(told) == 2
    for text, step in zip(told, ("000004", "000006"), strict=True):
        assert f"step_{step}.ckpt could not be written: No space left on device" in text
        assert "the last good one is" in text
        assert "step_000002.ckpt, 0.0 min old" in text
    assert attempts.count("step_000004.ckpt") == 2
    assert names(t) == ["last.ckpt", "step_000010.ckpt"]
    state = read_checkpoint(saver.last_model_path)["callbacks"][saver.state_key]
    assert list(map(os.path.basename, state["files"]["written"])) == ["step_000010.ckpt"]


def test_a_best_file_that_was_not_written_is_not_the_best(tmp_path, full):
    full(lambda step: step == 10)

    class Better(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", 1.0 / (1 + self.trainer.global_step))

    saver = ModelCheckpoint(monitor="score", on_error="warn")
    t = trainer(tmp_path, saver, max_epochs=2)
    t.fit(Better(), loader(), loader())
    assert saver.best_model_path.endswith("step_000005.ckpt")
    assert saver.best_model_score == torch.tensor(1 / 6)
    assert names(t) == ["best.ckpt", "last.ckpt", "step_000005.ckpt"]


@pytest.mark.parametrize("background", [False, True])
def test_asked_to_save_and_nothing_saved_is_an_error(tmp_path, full, background):
    full(lambda step: True)
    saver = ModelCheckpoint(on_error="warn", async_save=background)
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is in .*No space left"):
        trainer(tmp_path, saver).fit(Net(), loader())


def test_a_value_that_is_never_a_number_is_such_a_case(tmp_path):
    class Odd(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", torch.tensor(float("nan")))

    saver = ModelCheckpoint(monitor="score", save_last=False)
    with pytest.raises(CheckpointError, match="score was never a number"):
        trainer(tmp_path, saver, terminate_on_nan=False).fit(Odd(), loader(), loader())


def test_nothing_asked_and_nothing_trained_are_no_errors(tmp_path, caplog):
    t = trainer(tmp_path, ModelCheckpoint(every_n_epochs=5, save_last=False))
    t.fit(Net(), loader())
    assert "No checkpoint was written: none was due." in caplog.text
    trainer(tmp_path, fast_dev_run=True).fit(Net(), loader())
    again = trainer(tmp_path / "x", ModelCheckpoint())
    again.fit(Net(), loader())
    path = again.checkpoint_callback.last_model_path
    trainer(tmp_path / "y", ModelCheckpoint()).fit(Net(), loader(), ckpt_path=path)


def test_a_pointer_that_cannot_be_renewed_keeps_the_file(tmp_path, monkeypatch, caplog):
    def replace(source, target):
        if str(target).endswith("last.ckpt"):
            raise OSError(errno.EACCES, "Permission denied")
        REAL(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    saver = ModelCheckpoint(on_error="warn")
    t = trainer(tmp_path, saver)
    t.fit(Net(), loader())
    assert names(t) == ["step_000005.ckpt", "step_000010.ckpt"]
    assert len(warnings(caplog)) == 2
    assert "last.ckpt could not be written" in caplog.text


def test_the_choice_is_checked():
    with pytest.raises(ConfigError, match=r"on_error='warning'.*Did you mean 'warn'"):
        ModelCheckpoint(on_error="warning")


# ---- in the background


@pytest.fixture
def gate(monkeypatch):
    """Files are written in the background only while it is open."""
    event, real = threading.Event(), writer.write_stored

    def wait_and_write(*arguments):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(10)
        real(*arguments)

    monkeypatch.setattr(writer, "write_stored", wait_and_write)
    return event


def test_second_names_and_removals_wait_for_the_file(tmp_path, gate):
    saver, seen = ModelCheckpoint(every_n_train_steps=2, async_save=True), []

    def look(t, *_):
        if t.global_step in (3, 5):
            seen.append(names(t))
            gate.set()
            files.settle()
            seen.append(names(t))
            gate.clear()
        elif t.global_step >= 6:
            gate.set()

    t = trainer(tmp_path, saver, LambdaCallback(on_train_batch_end=look))
    t.fit(Net(), loader())
    assert seen == [
        [],
        ["last.ckpt", "step_000002.ckpt"],
        ["last.ckpt", "step_000002.ckpt"],
        ["last.ckpt", "step_000004.ckpt"],
    ]
    assert names(t) == ["last.ckpt", "step_000010.ckpt"]


def test_paths_name_complete_files_while_the_next_one_is_written(tmp_path, gate):
    class Better(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", 1.0 / (1 + self.trainer.global_step))

    saver, seen = ModelCheckpoint(monitor="score", every_n_train_steps=5, async_save=True), []

    def paths() -> list[str]:
        found = (saver.best_model_path, saver.kth_best_model_path, *saver.best_k_models)
        assert all(map(os.path.exists, filter(None, (*found, saver.last_model_path))))
        assert (saver.best_model_score is None) == (not saver.best_model_path)
        return [os.path.basename(path) for path in found]

    def look(t, *_):
        if t.global_step in (6, 11):
            seen.append(paths())
            gate.set()
            files.settle()
            seen.append(paths())
            gate.clear()
        elif t.global_step == 15:
            gate.set()

    t = trainer(tmp_path, saver, LambdaCallback(on_train_batch_end=look), max_epochs=3)
    t.fit(Better(), loader(), loader())
    five, ten = ["step_000005.ckpt"] * 3, ["step_000010.ckpt"] * 3
    assert seen == [["", ""], five, five, ten]


def test_a_file_holds_the_state_of_its_step_and_the_end_waits_for_it(tmp_path):
    saver = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, async_save=True)
    plain = ModelCheckpoint(tmp_path / "plain", every_n_train_steps=1, save_top_k=-1)
    t = trainer(tmp_path, saver, plain)
    t.fit(Net(), loader())
    assert not files.in_flight
    for step in range(1, 11):
        one, other = (
            read_checkpoint(f"{c.dirpath}/step_{step:06d}.ckpt")["model"] for c in (saver, plain)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_that_goes_on_from_a_file_of_the_background_ends_the_same(tmp_path):
    def run(folder, epochs, path=None):
        torch.manual_seed(1)
        saver = ModelCheckpoint(every_n_train_steps=3, async_save=True)
        t = trainer(folder, saver, max_epochs=epochs)
        net = Net()
        t.fit(net, loader(), ckpt_path=path)
        return net.state_dict(), t.run_dir / "checkpoints"

    whole, _ = run(tmp_path / "a", 4)
    _, folder = run(tmp_path / "b", 2)
    rest, _ = run(tmp_path / "b", 4, latest(folder))
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_a_second_fit_reuses_nothing(tmp_path):
    saver = ModelCheckpoint(every_n_train_steps=2, async_save=True)
    t = trainer(tmp_path, saver)
    t.fit(Net(), loader())
    first = saver.last_model_path
    t.fit(Net(), loader())
    assert saver.last_model_path != first
    assert len(names(t)) == 2


def test_a_failed_fit_waits_and_tells_what_went_wrong_behind_it(tmp_path, full, gate, caplog):
    full(lambda step: step == 2)
    saver = ModelCheckpoint(every_n_train_steps=2, async_save=True, save_on_exception=False)

    def stop(t, *_):
        if t.global_step == 3:
            gate.set()
            raise ValueError("mine")

    saver.on_save_point = lambda *a, real=saver.on_save_point: gate.is_set() or real(*a)
    with pytest.raises(ValueError, match="mine"):
        trainer(tmp_path, saver, LambdaCallback(on_train_batch_end=stop)).fit(Net(), loader())
    assert not files.in_flight
    assert any("step_000002.ckpt could not be written" in text for text in warnings(caplog))


# ---- by time


def test_by_default_the_newest_file_is_never_older_than_minutes(tmp_path):
    clock = [0.0]
    ages, saved = [], []

    class Slow(Net):
        def training_step(self, batch, batch_idx):
            clock[0] += 61.0
            return super().training_step(batch, batch_idx)

    def age(t, *_):
        folder = t.run_dir / "checkpoints"
        found = latest(folder)
        if found is not None:
            saved.append(found.stem)
            ages.append(t.global_step - int(found.stem[5:]))

    def begin(t, _):
        t.session.flow.clock = lambda: clock[0]

    t = trainer(tmp_path, LambdaCallback(on_train_batch_end=age, on_fit_start=begin), max_epochs=1)
    t.fit(Slow(), loader(80))
    assert list(dict.fromkeys(saved)) == ["step_000005", "step_000010", "step_000015"]
    assert max(ages) == 5
    assert names(t) == ["last.ckpt", "step_000020.ckpt"]


def test_what_the_callback_costs_where_nothing_is_due(tmp_path):
    costs = []

    def measure(t, task):
        if t.global_step == 2:
            hook = t.checkpoint_callback.on_save_point
            for _ in range(5):
                began = time.perf_counter()
                for _ in range(1000):
                    hook(t, task)
                costs.append((time.perf_counter() - began) * 1e3)  # us per call

    t = trainer(tmp_path, LambdaCallback(on_save_point=measure))
    t.fit(Net(), loader())
    print(f"on_save_point: {min(costs):.2f} us")
    assert min(costs) < 1.5  # measured 0.2; shared machines are slow


# ---- after an error of the user's


def fit_that_fails(folder, task, *callbacks, error: type = ValueError, **options) -> lk.Trainer:
    torch.manual_seed(3)
    t = trainer(folder, *callbacks, **options)
    with pytest.raises(error):
        t.fit(task, loader(), loader())
    return t


class FailsIn(Net):
    """Fails in the hook or step of a name, when so many steps are done."""

    def __init__(self, place: str, step: int = 7, error: BaseException | None = None) -> None:
        super().__init__()
        self.place, self.at = place, step
        self.error = ValueError("mine") if error is None else error

    def _maybe(self, place: str) -> None:
        if place == self.place and self.trainer.global_step == self.at:
            if not self.trainer.sanity_checking:
                raise self.error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self._maybe("training_step")
        return loss

    def validation_step(self, batch, batch_idx):
        self._maybe("validation_step")
        return super().validation_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._maybe("on_train_batch_end")

    def on_before_optimizer_step(self, optimizer):
        self._maybe("on_before_optimizer_step")


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
def test_the_last_completed_step_is_saved(tmp_path, place):
    def keep(t, task):
        states[t.global_step] = {k: v.clone() for k, v in task.state_dict().items()}

    states: dict[int, dict] = {}
    t = fit_that_fails(
        tmp_path, FailsIn(place), LambdaCallback(on_train_batch_end=lambda *a: keep(*a[:2]))
    )
    assert names(t) == ["best.ckpt", "last.ckpt", "step_000005.ckpt", "step_000007.ckpt"]
    saved = read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")
    assert saved["loop"]["global_step"] == 7
    assert (saved["loop"]["epoch"], saved["loop"]["batch_idx"]) == (1, 2)
    assert saved["lightkit"]["exact"] is False
    assert read_checkpoint(t.run_dir / "checkpoints" / "best.ckpt")["lightkit"]["exact"] is True
    if 7 in states:
        assert all(torch.equal(states[7][k], v) for k, v in saved["model"].items())


def test_a_run_goes_on_from_it(tmp_path):
    first = fit_that_fails(tmp_path, FailsIn("training_step"), max_epochs=3)
    t = trainer(tmp_path, max_epochs=3)
    path = first.run_dir / "checkpoints" / "last.ckpt"
    t.fit(FailsIn("nowhere"), loader(), loader(), ckpt_path=path)
    assert t.global_step == 15
    assert [row["epoch"] for row in t.history] == [1, 2, 3]


def test_a_validation_that_failed_comes_again(tmp_path):
    first = fit_that_fails(tmp_path, FailsIn("validation_step", 10), max_epochs=3)
    saved = read_checkpoint(first.run_dir / "checkpoints" / "last.ckpt")
    assert saved["loop"]["global_step"] == 10
    assert saved["loop"]["pending_validation"] == "epoch"
    t = trainer(tmp_path, max_epochs=3)
    path = first.run_dir / "checkpoints" / "last.ckpt"
    t.fit(FailsIn("nowhere"), loader(), loader(), ckpt_path=path)
    assert [row["epoch"] for row in t.history] == [1, 2, 3]
    assert all("val_loss" in row for row in t.history)
    assert t.state.validations == 3


def test_weights_that_a_hook_changed_for_a_validation_are_not_saved(tmp_path, caplog):
    class Average(lk.Callback):
        def on_validation_start(self, trainer, task):
            with torch.no_grad():
                task.net.weight.zero_()

    t = fit_that_fails(tmp_path / "a", FailsIn("validation_step", 10), Average(), ModelCheckpoint())
    assert names(t) == ["last.ckpt", "step_000005.ckpt"]
    told = [text for text in warnings(caplog) if "was not saved" in text]
    assert len(told) == 1
    assert "Step 10, the last before the error" in told[0]
    assert "came out of a validation" in told[0]
    t = fit_that_fails(tmp_path / "b", FailsIn("training_step"), Average(), ModelCheckpoint())
    assert names(t) == ["last.ckpt", "step_000007.ckpt"]


ENDS = ["on_validation_epoch_end", "on_validation_end", "on_train_epoch_end"]


@pytest.mark.parametrize("place", ENDS)
def test_a_validation_that_was_counted_is_not_counted_again(tmp_path, place, caplog):
    class Fails(FailsIn):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(1.0))

        def on_validation_epoch_end(self):
            self._maybe("on_validation_epoch_end")

        def on_validation_end(self):
            self._maybe("on_validation_end")

        def on_train_epoch_end(self):
            self._maybe("on_train_epoch_end")

    def callbacks():
        return EarlyStopping("val_loss", patience=3), ModelCheckpoint(every_n_epochs=1)

    options = {"max_epochs": 8, "logger": JSONLLogger()}
    first = fit_that_fails(tmp_path, Fails(place, 10), *callbacks(), **options)
    assert names(first) == ["last.ckpt", "step_000005.ckpt"]
    (told,) = (text for text in warnings(caplog) if "was not saved" in text)
    assert "Step 10, the last before the error" in told
    assert "would count twice" in told
    t = trainer(tmp_path, *callbacks(), **(options | {"logger": JSONLLogger()}))
    task = Fails(place, 10)
    task.at = -1  # not again
    t.fit(task, loader(), loader(), ckpt_path="auto")
    assert t.run_dir == first.run_dir
    assert (t.state.validations, t.global_step) == (4, 20)
    rows = [json.loads(line) for line in (t.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 10, 15, 20]


def test_in_the_middle_of_a_group_the_step_before_it(tmp_path):
    class InGroup(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 2 and batch_idx == 5:
                raise ValueError("mine")
            return super().training_step(batch, batch_idx)

    t = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=1)
    with pytest.raises(ValueError, match="mine"):
        t.fit(InGroup(), loader(40))
    saved = read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")
    assert (saved["loop"]["global_step"], saved["loop"]["batch_idx"]) == (2, 4)


@pytest.mark.parametrize(
    ("task", "error"),
    [
        (lambda: FailsIn("on_before_optimizer_step"), ValueError),
        (lambda: FailsIn("training_step", error=KeyboardInterrupt()), KeyboardInterrupt),
        (lambda: FailsIn("training_step", error=SystemExit(3)), SystemExit),
        (lambda: FailsIn("training_step", error=CheckpointError("x")), CheckpointError),
        (lambda: FailsIn("on_train_batch_end", step=5), ValueError),
        (lambda: FailsIn("training_step", step=0), ValueError),
    ],
)
def test_where_there_is_no_such_state_nothing_is_saved(tmp_path, task, error):
    t = fit_that_fails(tmp_path, task(), ModelCheckpoint(every_n_train_steps=5), error=error)
    found = [] if task().at == 0 else ["last.ckpt", "step_000005.ckpt"]
    if task().place == "on_train_batch_end":  # the step is complete, but its save was still to come
        assert (
            read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")["lightkit"]["exact"] is False
        )
    assert names(t) == found


def test_an_exact_file_of_the_same_step_is_not_replaced(tmp_path):
    saver = ModelCheckpoint(every_n_train_steps=1)
    t = fit_that_fails(tmp_path, FailsIn("training_step"), saver)
    assert read_checkpoint(saver.last_model_path)["lightkit"]["exact"] is True
    assert names(t) == ["last.ckpt", "step_000007.ckpt"]


class Manual(Net):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.automatic_optimization, self.where = False, where

    def configure_optimizers(self):
        task = self

        class SGD(torch.optim.SGD):
            def step(self, closure=None):
                if task.where == "step" and task.trainer.global_step == 3:
                    raise ValueError("half of it")
                return super().step(closure)

        return SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        if self.where == "before" and self.trainer.global_step == 3:
            raise ValueError("mine")
        optimizer.step()


@pytest.mark.parametrize(("where", "found"), [("before", "step_000003.ckpt"), ("step", None)])
def test_manual_optimization(tmp_path, where, found):
    t = trainer(tmp_path)
    with pytest.raises(ValueError, match="mine|half"):
        t.fit(Manual(where), loader())
    assert names(t) == (["last.ckpt", found] if found else [])


@pytest.mark.parametrize(
    "saver",
    [
        lambda: ModelCheckpoint(save_on_exception=False),
        lambda: ModelCheckpoint(monitor="val_loss", save_last=False),
    ],
)
def test_who_keeps_no_last_file_or_does_not_want_it_gets_none(tmp_path, saver):
    t = fit_that_fails(tmp_path, FailsIn("training_step"), saver())
    assert "step_000007.ckpt" not in names(t)


def test_what_goes_wrong_in_it_is_one_warning_and_the_error_stays(tmp_path, full, caplog):
    full(lambda step: step == 7)
    t = fit_that_fails(tmp_path, FailsIn("training_step"), ModelCheckpoint())
    told = [text for text in warnings(caplog) if "mine" not in text]
    assert len(told) == 1
    assert "Step 7, the last before the error, was not saved" in told[0]
    assert "No space left" in told[0]
    assert names(t) == ["last.ckpt", "step_000005.ckpt"]


def test_weights_that_became_nan_are_not_saved_after_an_error(tmp_path, caplog):
    class Spoils(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 7:
                with torch.no_grad():
                    self.net.weight.fill_(float("nan"))
                raise ValueError("mine")

    t = fit_that_fails(tmp_path, Spoils())
    assert "Step 7, the last before the error, was not saved: Parameters are nan" in caplog.text
    assert "step_000007.ckpt" not in names(t)


# ---- the end by a signal


@pytest.mark.parametrize("arguments", [{}, {"save_last": False, "monitor": "val_loss"}])
def test_the_end_by_a_signal_saves_the_newest_state_in_any_case(tmp_path, arguments):
    import signal

    def send(t, *_):
        if t.global_step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)

    saver = ModelCheckpoint(**arguments)
    t = trainer(tmp_path, saver, LambdaCallback(on_train_batch_end=send), max_epochs=3)
    with pytest.raises(SystemExit) as ended:
        t.fit(Net(), loader(), loader())
    assert ended.value.code == 128 + signal.SIGUSR1
    newest = latest(t.run_dir / "checkpoints")
    assert newest.name == "step_000007.ckpt"
    assert read_checkpoint(newest)["lightkit"]["exact"] is True
    # Once it goes on, that file is no longer needed.
    again = trainer(tmp_path, ModelCheckpoint(**arguments), max_epochs=3)
    again.fit(Net(), loader(), loader(), ckpt_path=newest)
    assert again.run_dir == t.run_dir
    assert "step_000007.ckpt" not in names(again)


# ---- one folder for several runs


def test_a_run_that_goes_on_from_another_one_in_one_folder_removes_nothing_of_it(tmp_path):
    class Scores(Net):
        scores: tuple[float, ...] = ()

        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                self.log("val_loss", torch.tensor(self.scores[self.trainer.current_epoch]))

    def fit(*scores: float, path=None, **options):
        saver = ModelCheckpoint(tmp_path / "all", monitor="val_loss")
        t = trainer(tmp_path, saver, max_epochs=len(scores), **options)
        task = Scores()
        task.scores = scores
        t.fit(task, loader(), loader(), ckpt_path=path)
        return t, saver

    folder = tmp_path / "all"
    first, _ = fit(1.0, 2.0, 3.0, 4.0)
    kept = {p: p.read_bytes() for p in folder.glob("step_*")}
    assert sorted(p.stem for p in kept) == ["step_000005", "step_000020"]
    path = folder / "step_000005.ckpt"
    worse, saver = fit(1.0, 1.5, 1.6, path=path, gradient_clip_val=1.0)
    assert worse.run_dir != first.run_dir
    assert saver.best_model_path == str(path)  # still the best there is
    better, saver = fit(1.0, 0.5, 0.4, path=path, gradient_clip_val=1.0)
    assert saver.best_model_path == str(folder / "step_000015.ckpt")
    assert {p: p.read_bytes() for p in kept} == kept
    # Its own it removes, also when it is continued; what it wrote over is its own.
    path = folder / "step_000015.ckpt"
    again, saver = fit(1.0, 0.5, 0.4, 0.3, 0.2, path=path, gradient_clip_val=1.0)
    assert again.run_dir == better.run_dir
    assert sorted(p.stem for p in folder.glob("step_*")) == ["step_000005", "step_000025"]
