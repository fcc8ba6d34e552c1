"""Training without data: functions are minimised by the same loop (S1-10, S1-12)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.errors import ConfigError, DataError
from lightkit.feeds import NoData
from lightkit.testing import assert_resumes_exactly


class Bowl(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([2.0, 1.0, 10.0]))
        self.register_buffer("goal", torch.tensor([5.0, 0.0, 1.0]))

    def training_step(self):
        return (self.x - self.goal).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.5)


class Noisy(Bowl):
    def training_step(self, batch, batch_idx):
        assert batch is None
        self.log("index", batch_idx)
        return (self.x - self.goal + 0.1 * torch.randn(3)).square().sum()


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return lk.Trainer(**quiet | {"default_root_dir": tmp_path, "fused": False} | options)

    return make


def by_hand(steps):
    x, goal = nn.Parameter(torch.tensor([2.0, 1.0, 10.0])), torch.tensor([5.0, 0.0, 1.0])
    optimizer = torch.optim.SGD([x], 0.05, momentum=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (x - goal).square().sum().backward()
        optimizer.step()
    return x


def test_s1_10_a_function_is_minimised_as_by_hand(trainer):
    task, made = Bowl(), trainer()
    history = made.fit(task, max_steps=200)
    assert torch.equal(task.x, by_hand(200))
    assert made.global_step == 200
    assert len(history) == 1
    assert made.max_steps == 200


def test_a_step_that_takes_a_batch_gets_none(trainer):
    history = trainer().fit(Noisy(), max_steps=4)
    assert history[-1]["index"] == 1.5


def test_the_limits_of_one_call_are_for_that_call(trainer):
    made = trainer(max_steps=3)
    made.fit(Bowl(), max_steps=5)
    assert (made.global_step, made.max_steps) == (5, 5)
    made.fit(Bowl())
    assert (made.global_step, made.max_steps) == (3, 3)
    made = trainer(limit_train_batches=2)
    made.fit(Bowl(), max_epochs=4)
    assert (made.global_step, made.current_epoch, made.max_epochs) == (8, 4, 4)
    with pytest.raises(ConfigError, match=r"fit\(max_steps=2.5\)"):
        made.fit(Bowl(), max_steps=2.5)


def test_s1_12_epochs_have_the_steps_that_are_asked_for(trainer):
    history = trainer(limit_train_batches=10, max_epochs=3).fit(Bowl())
    assert [row["step"] for row in history] == [10, 20, 30]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_fit_is_one_whole_epoch(trainer, accumulate):
    """With what comes at the end of an epoch: a validation, schedules, the count."""

    class Judged(Bowl):
        def validation_step(self, batch):
            return (self.x - self.goal).square().sum()

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    task, made = Judged(), trainer(accumulate_grad_batches=accumulate)
    history = made.fit(task, max_steps=5, val_dataloaders=[[torch.ones(2, 1)]])
    assert torch.allclose(task.x, by_hand(5))
    goal = (task.x - task.goal).square().sum().item()
    assert history[-1]["val_loss"] == pytest.approx(goal)
    assert (made.global_step, made.current_epoch, len(history)) == (5, 1, 1)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    assert made.num_training_batches == 5 * accumulate


def test_a_long_epoch_takes_no_memory():
    assert next(iter(NoData(10**12))) is None
    assert list(NoData(3)) == [None] * 3


def test_accumulation_without_data_counts_steps(trainer):
    task, made = Bowl(), trainer(accumulate_grad_batches=3)
    made.fit(task, max_steps=5)
    assert made.global_step == 5
    assert torch.allclose(task.x, by_hand(5))


def test_it_resumes_exactly_within_the_only_epoch(trainer, tmp_path):
    save = lk.callbacks.ModelCheckpoint(every_n_train_steps=7, save_top_k=-1)
    whole = Noisy()
    trainer(seed=1, callbacks=[save]).fit(whole, max_steps=20)
    path = next(tmp_path.rglob("step_000007.ckpt"))
    rest = Noisy()
    made = trainer(seed=9)
    made.fit(rest, max_steps=20, ckpt_path=path)
    assert torch.equal(rest.x, whole.x)
    made.fit(rest, max_steps=30, ckpt_path="last")  # further than the run was to go
    assert made.global_step == 30


def test_it_resumes_exactly_by_the_proof():
    assert_resumes_exactly(Bowl, limit_train_batches=6)


def test_closures_work_without_data(trainer):
    class Quick(Bowl):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    task = Quick()
    trainer().fit(task, max_steps=3)
    assert torch.allclose(task.x, task.goal, atol=1e-4)


def test_manual_optimization_works_without_data(trainer):
    class Manual(Bowl):
        automatic_optimization = False

        def training_step(self):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step())
            optimizer.step()

    task = Manual()
    trainer().fit(task, max_steps=20)
    assert torch.equal(task.x, by_hand(20))


def test_a_compiled_step_takes_no_batch_either(trainer):
    task = Bowl()
    trainer(compile={"backend": "eager"}).fit(task, max_steps=20)
    assert torch.equal(task.x, by_hand(20))


def test_a_data_module_without_training_data_is_no_wish(trainer):
    with pytest.raises(DataError, match="no training loader"):
        trainer().fit(Noisy(), datamodule=lk.DataModule(), max_steps=3)


def test_a_forgotten_loader_is_still_noticed(trainer):
    with pytest.raises(DataError, match=r"no training loader.*fit\(task, max_steps=1000\)"):
        trainer(max_steps=5).fit(Noisy())


def test_an_end_is_needed(trainer):
    with pytest.raises(ConfigError, match="Say how long to train"):
        trainer(max_epochs=3).fit(Bowl())
    with pytest.raises(ConfigError, match="a part of the training data, but there are none"):
        trainer(limit_train_batches=0.5).fit(Bowl(), max_steps=3)
    with pytest.raises(ConfigError, match="overfit_batches=2 is about training data"):
        trainer(overfit_batches=2).fit(Bowl(), max_steps=3)
    made = trainer(fast_dev_run=2, enable_checkpointing=False)
    made.fit(Bowl())
    assert made.global_step == 2


def test_data_that_no_step_takes(trainer):
    with pytest.raises(DataError, match="training_step takes no batch"):
        trainer().fit(Bowl(), [torch.ones(1)])
