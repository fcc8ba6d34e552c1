"""A callback made of single functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightkit.errors import HookNameError, did_you_mean
from lightkit.hook_names import CALLBACK_NAMES
from lightkit.hooks import Callback


class LambdaCallback(Callback):
    """Calls a function at each named hook.

    For example ``LambdaCallback(on_train_epoch_end=lambda trainer, task: print(trainer.history))``.

    Args:
        **hooks: Functions by the name of a hook; each gets what the hook gets.

    Raises:
        HookNameError: For a name that is not a hook, or a value that cannot be called.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            if name not in CALLBACK_NAMES:
                raise HookNameError(
                    f"LambdaCallback: {name!r} is not a hook.{did_you_mean(name, CALLBACK_NAMES)}"
                )
            if not callable(function):
                raise HookNameError(
                    f"LambdaCallback: {name} must be a function, not {type(function).__name__}."
                )
            setattr(self, name, function)
