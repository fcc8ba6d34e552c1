from __future__ import annotations

from typing import Any

import pytest

from lightkit.callbacks.lambda_callback import LambdaCallback
from lightkit.errors import HookNameError
from lightkit.hooks import Callback


def test_functions_are_called_with_what_the_hook_gets() -> None:
    calls: list[Any] = []
    callback: Any = LambdaCallback(
        on_fit_start=lambda trainer, task: calls.append((trainer, task)),
        on_train_batch_end=lambda *args: calls.append(args),
        state_dict=lambda: {"kept": 1},
    )
    callback.on_fit_start("trainer", "task")
    callback.on_train_batch_end("trainer", "task", "outputs", "batch", 3)
    callback.on_fit_end("trainer", "task")
    assert calls == [("trainer", "task"), ("trainer", "task", "outputs", "batch", 3)]
    assert callback.state_dict() == {"kept": 1}


def test_only_what_was_given_counts_as_a_hook_of_its_class() -> None:
    one = LambdaCallback(on_fit_start=print)
    two = LambdaCallback(on_fit_end=print)
    assert isinstance(one, LambdaCallback)
    assert type(one).on_fit_start is not Callback.on_fit_start
    assert type(one).on_fit_end is Callback.on_fit_end
    assert type(two).on_fit_start is Callback.on_fit_start
    assert LambdaCallback.on_fit_start is Callback.on_fit_start


def test_a_name_that_is_no_hook_is_refused_with_the_nearest() -> None:
    with pytest.raises(HookNameError, match="Did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoch_ends=print)


def test_a_value_that_cannot_be_called_is_refused() -> None:
    wrong: Any = 3
    with pytest.raises(HookNameError, match="on_fit_start must be a function, not int"):
        LambdaCallback(on_fit_start=wrong)
