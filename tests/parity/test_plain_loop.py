"""The Trainer equals a loop written by hand over the same loader, bit for bit (fp32, fused off)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .conftest import Net, adam, assert_same, loader


def hand(
    train,
    epochs=3,
    val=None,
    accumulate=1,
    clip=None,
    clip_value=None,
    net_options=None,
):
    """The loop that people write, nothing of lightkit in it but the task's own methods."""
    torch.manual_seed(7)
    task = Net(**(net_options or {}))
    optimizer = task.make_optimizer(task.parameters())
    scheduler = task.make_scheduler(optimizer) if task.make_scheduler else None
    for _ in range(epochs):
        task.train()
        count = len(train)
        optimizer.zero_grad()
        for i, batch in enumerate(train):
            loss = task.training_step(batch, i)
            first = i - i % accumulate
            size = min(accumulate, count - first)
            (loss / size if accumulate > 1 else loss).backward()
            if i + 1 == first + size:
                if clip is not None:
                    nn.utils.clip_grad_norm_(task.parameters(), clip)
                if clip_value is not None:
                    nn.utils.clip_grad_value_(task.parameters(), clip_value)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None and task.interval == "step":
                    scheduler.step()
        if scheduler is not None and task.interval == "epoch":
            scheduler.step()
        if val is not None:
            task.eval()
            with torch.no_grad():
                for i, batch in enumerate(val):
                    task.validation_step(batch, i)
    return task


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def drop_validation(task, batches):
    """Takes the sanity check's batches out of what the Trainer's task recorded."""
    task.val_losses = task.val_losses[batches:]
    return task


@pytest.mark.parametrize("make", [adam, adamw, sgd])
def test_plain(fit, make):
    options = {"make_optimizer": make}
    assert_same(fit(options, loader()), hand(loader(), net_options=options))


def test_shuffle_dropout_validation_and_sanity_check_from_one_seed(fit):
    task = fit(None, loader(), loader(21, seed=5, shuffle=False))
    reference = hand(loader(), val=loader(21, seed=5, shuffle=False))
    assert_same(drop_validation(task, 2), reference)


def test_a_shuffled_validation_loader_draws_as_in_a_plain_loop(fit):
    task = fit(None, loader(), loader(21, seed=5))
    assert_same(drop_validation(task, 2), hand(loader(), val=loader(21, seed=5)))


@pytest.mark.parametrize("count", [88, 80, 83])
@pytest.mark.parametrize("drop_last", [True, False])
def test_accumulation_with_a_ragged_tail(fit, count, drop_last):
    if count % 8 and not drop_last:
        pytest.skip("batches of unequal size are weighted by samples: test_accumulation.py")
    train = loader(count, drop_last=drop_last)
    assert len(train) % 4
    task = fit(None, train, accumulate_grad_batches=4)
    assert_same(task, hand(loader(count, drop_last=drop_last), accumulate=4))


def test_clipping_by_norm(fit):
    task = fit({"make_optimizer": sgd}, gradient_clip_val=0.5)
    assert_same(task, hand(loader(), clip=0.5, net_options={"make_optimizer": sgd}))


def test_clipping_by_value(fit):
    task = fit(None, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert_same(task, hand(loader(), clip_value=0.01))


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=33)


@pytest.mark.parametrize(
    ("make", "interval"), [(step_lr, "epoch"), (step_lr, "step"), (one_cycle, "step")]
)
def test_schedules(fit, make, interval):
    options = {"make_scheduler": make, "interval": interval}
    assert_same(fit(options), hand(loader(), net_options=options))


def test_accumulation_clipping_and_a_schedule_together(fit):
    options = {"make_scheduler": step_lr, "interval": "step", "make_optimizer": sgd}
    task = fit(options, loader(88), accumulate_grad_batches=4, gradient_clip_val=0.3)
    assert_same(task, hand(loader(88), accumulate=4, clip=0.3, net_options=options))


def test_workers_where_the_dataset_draws_nothing(fit):
    task = fit(None, loader(workers=2), loader(21, seed=5, workers=2), max_epochs=2)
    reference = hand(loader(workers=2), epochs=2, val=loader(21, seed=5, workers=2))
    assert_same(drop_validation(task, 2), reference)


def test_a_loader_with_a_generator_of_its_own(fit):
    task = fit(None, loader(generator=torch.Generator().manual_seed(1)))
    assert_same(task, hand(loader(generator=torch.Generator().manual_seed(1))))


def test_fused_updates_stay_within_rounding(fit):
    task, reference = fit(None, fused=None), hand(loader())
    # Not the weights: the bias before batch norm has no gradient but rounding, which Adam enlarges.
    torch.testing.assert_close(
        torch.stack(task.losses), torch.stack(reference.losses), rtol=0, atol=1e-5
    )
