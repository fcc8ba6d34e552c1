"""Arguments of hooks; `tests/test_hooks.py` and `tests/migration` have the names of hooks."""

from __future__ import annotations

import functools

import pytest

import lightkit as lk
from lightkit.elsewhere import HOOK_ARGUMENTS
from lightkit.errors import HookNameError


@pytest.mark.parametrize(
    ("base", "hook", "function"),
    [
        (lk.TaskModule, "training_step", lambda self, batch, batch_idx, optimizer_idx: None),
        (lk.TaskModule, "training_step", lambda self, batch, batch_idx, hiddens: None),
        (lk.TaskModule, "training_step", lambda self, dataloader_iter: None),
        (lk.TaskModule, "on_train_batch_start", lambda self, batch, i, dataloader_idx: None),
        (lk.TaskModule, "on_before_optimizer_step", lambda self, optimizer, optimizer_idx: None),
        (lk.TaskModule, "lr_scheduler_step", lambda self, scheduler, optimizer_idx, metric: None),
        (lk.TaskModule, "on_validation_epoch_end", lambda self, outputs: None),
        (lk.Callback, "on_train_epoch_end", lambda self, trainer, task, outputs: None),
        (lk.Callback, "on_train_batch_end", lambda self, t, m, o, b, i, dataloader_idx: None),
    ],
)
def test_arguments_that_nobody_gives_any_more(base, hook, function):
    with pytest.raises(HookNameError, match=rf"Old\.{hook} is called without '") as found:
        type("Old", (base,), {hook: function})
    assert any(text in str(found.value) for text in HOOK_ARGUMENTS.values())


def test_optional_ones_shift_what_is_given():
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx=0, optimizer_closure=None):
        pass

    with pytest.raises(HookNameError, match=r"gets \(epoch, batch_idx, optimizer, optimizer_clos"):
        type("Old", (lk.TaskModule,), {"optimizer_step": optimizer_step})


def test_too_many_arguments_of_ones_own():
    with pytest.raises(HookNameError, match=r"gets \(stage\), and nothing for its arguments more"):
        type("Own", (lk.DataModule,), {"setup": lambda self, stage, more: None})


def test_what_fits_is_left_alone():
    def with_time(function):
        @functools.wraps(function)
        def timed(self, *args):
            return function(self, *args, 0.0)

        return timed

    class Fits(lk.TaskModule):
        def training_step(self, batch):
            pass

        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

        @with_time
        def test_step(self, batch, batch_idx, dataloader_idx, seconds):
            pass

        def on_train_batch_start(self, batch, batch_idx, unused=0, dataloader_idx=0):
            pass

        def on_train_epoch_end(self, *args, **kwargs):
            pass

        @lk.not_a_hook
        def setup(self, optimizer_idx, hiddens):
            pass

    assert Fits.training_step
