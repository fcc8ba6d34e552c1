from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightkit.callbacks.early_stopping import EarlyStopping
from lightkit.callbacks.lambda_callback import LambdaCallback
from lightkit.errors import ConfigError, LoggingError
from lightkit.task import TaskModule
from lightkit.trainer import Trainer


class FakeTrainer(SimpleNamespace):
    """What EarlyStopping reads of a Trainer, and the reasons it gave to stop."""

    def __init__(self, *, val: bool = True) -> None:
        super().__init__(
            callback_metrics={},
            sanity_checking=False,
            current_epoch=0,
            num_training_batches=10,
            num_val_batches=[2] if val else [],
            state=SimpleNamespace(batch_idx=10),
            reasons=[],
        )
        known = SimpleNamespace(
            reduced=self.callback_metrics.get,
            check_shared=lambda name: None,
            eval_results=lambda loaders: [{"val_loss": 1.0, "val_acc": 0.5}] * loaders,
        )
        self.session = SimpleNamespace(metrics=known)

    def stop(self, reason: str) -> None:
        self.reasons.append(reason)


def run(
    callback: EarlyStopping,
    values: list[float],
    *,
    trainer: FakeTrainer | None = None,
    task: nn.Module | None = None,
    validate: bool = True,
) -> FakeTrainer:
    """Plays epochs whose validation (or training) logs one value each; ends when stopped."""
    trainer = trainer or FakeTrainer()
    task = task or nn.Linear(1, 1)
    callback.setup(trainer, task, "fit")
    epochs(callback, values, trainer, task, validate=validate)
    callback.on_fit_end(trainer, task)
    return trainer


def epochs(
    callback: EarlyStopping,
    values: list[float],
    trainer: FakeTrainer,
    task: nn.Module,
    *,
    validate: bool = True,
) -> None:
    for value in values:
        nn.init.constant_(task.weight, value)
        trainer.callback_metrics["train_loss"] = torch.tensor(value)
        if validate:
            callback.on_validation_start(trainer, task)
            trainer.callback_metrics["val_loss"] = torch.tensor(value)
            callback.on_validation_end(trainer, task)
        callback.on_train_epoch_end(trainer, task)
        if trainer.reasons:
            return
        trainer.current_epoch += 1


def test_it_stops_after_patience_checks_and_says_why() -> None:
    callback = EarlyStopping("val_loss", patience=2)
    trainer = run(callback, [0.5, 0.12, 0.2, 0.12, 0.1])
    assert trainer.reasons == [
        "val_loss has not improved by more than 0.0 for 2 validations (best 0.12 at epoch 2)"
    ]
    assert callback.stopped_epoch == 3
    assert callback.best_epoch == 1
    assert callback.wait_count == 2
    assert isinstance(callback.best_score, torch.Tensor)
    assert callback.best_score.item() == pytest.approx(0.12)


def test_it_goes_on_while_there_is_progress() -> None:
    assert run(EarlyStopping("val_loss", patience=1), [3.0, 2.0, 1.0]).reasons == []
    assert run(EarlyStopping("val_loss", patience=1, mode="max"), [1.0, 2.0, 3.0]).reasons == []


def test_small_changes_do_not_count() -> None:
    for mode, values in (("min", [1.0, 0.8, 0.75]), ("max", [1.0, 1.2, 1.25])):
        callback = EarlyStopping("val_loss", min_delta=0.1, patience=1, mode=mode)
        trainer = run(callback, values)
        assert trainer.current_epoch == 2
        assert callback.best_score.item() == pytest.approx(values[1])
        assert "improved by more than 0.1 for 1 validation (" in trainer.reasons[0]


def test_a_training_metric_is_checked_after_epochs() -> None:
    for trainer, validate in ((FakeTrainer(), True), (FakeTrainer(val=False), False)):
        callback = EarlyStopping("train_loss", patience=2)
        run(callback, [1.0, 2.0, 3.0], trainer=trainer, validate=validate)
        assert "for 2 epochs (best 1 at epoch 1)" in trainer.reasons[0]


def test_a_metric_of_both_is_checked_once_per_epoch() -> None:
    callback = EarlyStopping("loss", patience=3)
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    callback.setup(trainer, task, "fit")
    trainer.callback_metrics["loss"] = torch.tensor(1.0)
    for _ in range(3):
        callback.on_validation_start(trainer, task)
        callback.on_validation_end(trainer, task)
        callback.on_train_epoch_end(trainer, task)
    assert callback.wait_count == 2


def test_the_user_may_choose_when_it_checks() -> None:
    callback = EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=True)
    assert "for 2 epochs" in run(callback, [1.0, 1.0, 1.0]).reasons[0]
    callback = EarlyStopping("train_loss", patience=2, check_on_train_epoch_end=False)
    assert "for 2 validations" in run(callback, [1.0, 1.0, 1.0]).reasons[0]


def test_only_the_validations_of_a_fit_count() -> None:
    callback = EarlyStopping("val_loss", patience=1)
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    callback.setup(trainer, task, "fit")
    trainer.sanity_checking = True
    callback.on_validation_start(trainer, task)
    callback.on_validation_end(trainer, task)
    trainer.sanity_checking = False
    callback.setup(trainer, task, "validate")
    for _ in range(3):
        callback.on_validation_start(trainer, task)
        trainer.callback_metrics["val_loss"] = torch.tensor(1.0)
        callback.on_validation_end(trainer, task)
    assert trainer.reasons == []
    assert callback.wait_count == 0


def test_a_missing_monitor_is_an_error_that_lists_the_metrics() -> None:
    with pytest.raises(LoggingError, match=r"'train_loss', 'val_loss'\. Did you mean 'val_loss'"):
        run(EarlyStopping("val_los"), [1.0])


def test_it_waits_for_the_first_validation() -> None:
    callback = EarlyStopping("val_loss", patience=1)
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    callback.setup(trainer, task, "fit")
    epochs(callback, [1.0, 1.0], trainer, task, validate=False)
    epochs(callback, [1.0, 1.0], trainer, task)
    assert len(trainer.reasons) == 1


def test_without_validation_a_missing_monitor_is_told_after_the_first_epoch() -> None:
    with pytest.raises(LoggingError, match=r"self\.log"):
        run(EarlyStopping("val_loss"), [1.0], trainer=FakeTrainer(val=False), validate=False)


def test_within_an_epoch_a_missing_monitor_is_told_at_once() -> None:
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    trainer.state.batch_idx = 5
    callback = EarlyStopping("accuracy")
    callback.setup(trainer, task, "fit")
    callback.on_validation_start(trainer, task)
    with pytest.raises(LoggingError, match="check_on_train_epoch_end=True"):
        callback.on_validation_end(trainer, task)
    callback = EarlyStopping("accuracy", check_on_train_epoch_end=True)
    callback.setup(trainer, task, "fit")
    callback.on_validation_start(trainer, task)
    callback.on_validation_end(trainer, task)


@pytest.mark.parametrize("monitor", ["val_los", "val_lossy", "vall_loss"])
def test_a_misspelled_name_of_validation_is_told_by_the_sanity_check(monitor: str) -> None:
    with pytest.raises(LoggingError, match=r"Did you mean 'val_loss'\?$"):
        try_validation(EarlyStopping(monitor))
    try_validation(EarlyStopping(monitor, strict=False))


@pytest.mark.parametrize(
    "monitor", ["val_loss", "val_loss_epoch", "val_map", "train_loss", "train_acc", "loss"]
)
def test_what_may_come_later_is_not_told_by_the_sanity_check(monitor: str) -> None:
    try_validation(EarlyStopping(monitor))


def try_validation(callback: EarlyStopping) -> None:
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    trainer.sanity_checking = True
    callback.setup(trainer, task, "fit")
    callback.on_validation_start(trainer, task)
    callback.on_validation_end(trainer, task)


def test_a_missing_monitor_is_told_with_the_advice_that_fits() -> None:
    end = r"Did you mean 'val_loss'\? Else log it with self\.log\('va_loss', \.\.\.\)\.$"
    with pytest.raises(LoggingError, match=end):
        run(EarlyStopping("va_loss"), [1.0])


def test_a_missing_monitor_warns_once_if_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(EarlyStopping("accuracy", strict=False), [1.0, 2.0])
    assert trainer.reasons == []
    assert len(caplog.records) == 1


def test_thresholds_and_values_that_are_no_numbers_stop_at_once() -> None:
    trainer = run(EarlyStopping("val_loss", stopping_threshold=0.5), [1.0, 0.4])
    assert trainer.reasons == ["val_loss is 0.4, better than the threshold 0.5"]
    trainer = run(EarlyStopping("val_loss", divergence_threshold=5.0), [1.0, 7.0])
    assert trainer.reasons == ["val_loss is 7, worse than the threshold 5.0"]
    assert run(EarlyStopping("val_loss"), [float("nan")]).reasons == ["val_loss is nan"]
    callback = EarlyStopping("val_loss", check_finite=False)
    assert run(callback, [1.0, float("nan")]).reasons == []


def test_the_best_weights_come_back() -> None:
    task = nn.Linear(1, 1)
    run(EarlyStopping("val_loss", patience=2, restore_best=True), [3.0, 1.0, 2.0, 4.0], task=task)
    assert task.weight.item() == 1.0
    run(EarlyStopping("val_loss", patience=2), [3.0, 1.0, 2.0, 4.0], task=task)
    assert task.weight.item() == 4.0


def test_a_resumed_run_stops_where_the_whole_one_does() -> None:
    values = [3.0, 1.0, 2.0, 4.0, 5.0]
    first = EarlyStopping("val_loss", patience=3, restore_best=True)
    trainer, task = FakeTrainer(), nn.Linear(1, 1)
    first.setup(trainer, task, "fit")
    epochs(first, values[:3], trainer, task)
    state = first.state_dict()

    second = EarlyStopping("val_loss", patience=2, restore_best=True)
    second.setup(trainer, task, "fit")
    second.load_state_dict(state)
    epochs(second, values[3:], trainer, task)
    second.on_fit_end(trainer, task)
    assert second.patience == 2  # the arguments given now count
    assert second.stopped_epoch == 3
    assert task.weight.item() == 1.0


def test_each_fit_begins_anew() -> None:
    callback = EarlyStopping("val_loss", patience=2)
    assert run(callback, [1.0, 2.0, 2.0]).reasons
    assert run(callback, [3.0, 2.0, 1.0]).reasons == []
    assert callback.best_score.item() == 1.0


def test_improvements_are_told_on_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightkit")
    run(EarlyStopping("val_loss", verbose=True), [2.0, 1.0])
    assert "val_loss improved: 2 -> 1" in caplog.text


def test_two_monitors_keep_two_states() -> None:
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"mode": "mim"}, "Did you mean 'min'"),
        ({"patience": -1}, "patience=-1"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EarlyStopping("val_loss", **kwargs)


# --- in a fit --------------------------------------------------------------------------------------


class Scripted(TaskModule):
    """Its validation logs the values given, one after the other; its weight is the last one."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = iter(values)
        self.net = nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Any) -> torch.Tensor:
        self.log("slope", batch.sum())
        return self.net(batch).square().mean() * 0

    def validation_step(self, batch: Any) -> None:
        if not self.trainer.sanity_checking:
            value = next(self.values)
            nn.init.constant_(self.net.weight, value)
            self.log("score", torch.tensor(value))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(count: int = 4) -> DataLoader[Any]:
    data: Any = torch.ones(count, 1)
    return DataLoader(data, batch_size=1)


def real(tmp_path: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **quiet | options)


def test_a_fit_stops_after_the_validation_that_was_one_too_many(tmp_path: Path) -> None:
    callback = EarlyStopping("score", patience=2, restore_best=True)
    task = Scripted([3.0, 1.0, 2.0, 1.5, 0.5])
    trainer = real(tmp_path, max_epochs=9, callbacks=[callback])
    history = trainer.fit(task, loader(), loader(1))
    assert len(history) == 4
    assert callback.stopped_epoch == 3
    assert callback.best_epoch == 1
    assert task.net.weight.item() == 1.0


def test_a_fit_stops_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    callback = EarlyStopping("score", patience=1)
    task = Scripted([3.0, 1.0, 2.0])
    trainer = real(tmp_path, max_epochs=9, callbacks=[callback], val_check_interval=0.5)
    trainer.fit(task, loader(4), loader(1))
    assert trainer.global_step == 6


def test_a_fit_without_validation_stops_by_a_training_metric(tmp_path: Path) -> None:
    trainer = real(tmp_path, max_epochs=9, callbacks=[EarlyStopping("slope", patience=2)])
    history = trainer.fit(Scripted([]), loader())
    assert len(history) == 3


def test_a_training_metric_beside_validation_is_checked_once_per_epoch(tmp_path: Path) -> None:
    callback = EarlyStopping("slope", patience=2)
    trainer = real(tmp_path, max_epochs=9, callbacks=[callback], val_check_interval=2)
    history = trainer.fit(Scripted([1.0] * 10), loader(4), loader(1))
    assert len(history) == 3


def test_a_fit_with_a_monitor_that_is_not_there_ends_with_the_names(tmp_path: Path) -> None:
    trainer = real(tmp_path, max_epochs=9, callbacks=[EarlyStopping("scores")])
    with pytest.raises(LoggingError, match=r"'score'.*Did you mean 'score'"):
        trainer.fit(Scripted([1.0, 1.0]), loader(4), loader(1))
    assert trainer.current_epoch == 0


def test_a_misspelled_monitor_ends_a_fit_before_its_first_step(tmp_path: Path) -> None:
    class Logs(Scripted):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", 1.0)

    trainer = real(tmp_path, num_sanity_val_steps=1, callbacks=[EarlyStopping("val_los")])
    with pytest.raises(LoggingError, match="Did you mean 'val_loss'"):
        trainer.fit(Logs([1.0]), loader(), loader())
    assert trainer.global_step == 0


def test_a_fit_that_is_resumed_remembers_the_best(tmp_path: Path) -> None:
    def fit(task: Scripted, epochs: int, **resume: Any) -> Any:
        callback = EarlyStopping("score", patience=3, restore_best=True)
        trainer = real(tmp_path, max_epochs=epochs, callbacks=[callback])
        save = LambdaCallback(on_save_point=lambda t, _: t.save_checkpoint(tmp_path / "at.ckpt"))
        trainer.callbacks.append(save)
        return trainer.fit(task, loader(), loader(1), **resume)

    fit(Scripted([3.0, 1.0]), 2)
    task = Scripted([2.0, 1.5, 4.0, 0.1])
    assert len(fit(task, 9, ckpt_path=tmp_path / "at.ckpt")) == 5
    assert task.net.weight.item() == 1.0


def test_a_second_fit_of_the_same_trainer_counts_anew(tmp_path: Path) -> None:
    callback = EarlyStopping("score", patience=2)
    trainer = real(tmp_path, max_epochs=4, callbacks=[callback])
    assert len(trainer.fit(Scripted([1.0, 2.0, 3.0, 4.0]), loader(), loader(1))) == 3
    assert len(trainer.fit(Scripted([9.0, 8.0, 7.0, 6.0]), loader(), loader(1))) == 4
