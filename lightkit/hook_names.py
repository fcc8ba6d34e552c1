"""Names of hooks: which there are, and which methods are refused as misspelled."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lightkit.elsewhere import HOOK_ARGUMENTS
from lightkit.errors import HookNameError, did_you_mean
from lightkit.task_hooks import TaskHooks

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Function = TypeVar("Function", bound=Callable[..., Any])

#: The hooks that the loop calls on listeners.
LOOP_HOOKS: tuple[str, ...] = (
    *(n for n in vars(TaskHooks) if n.startswith("on_")),
    "setup",
    "teardown",
)
CALLBACK_NAMES: frozenset[str] = frozenset((*LOOP_HOOKS, "state_dict", "load_state_dict"))
#: What a task may define beside the hooks of a callback.
TASK_NAMES: frozenset[str] = CALLBACK_NAMES | {
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "configure_optimizers",
    "configure_model",
    "configure_parallelism",
    "configure_sharding",
    "init_weights",
    "configure_callbacks",
    "configure_gradient_clipping",
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "transfer_batch_to_device",
}
#: Names of earlier generations of the field, and what to write instead.
OLD_NAMES: dict[str, str] = {
    "training_epoch_end": "on_train_epoch_end (collect outputs in training_step)",
    "validation_epoch_end": "on_validation_epoch_end (collect outputs in validation_step)",
    "test_epoch_end": "on_test_epoch_end (collect outputs in test_step)",
    "training_step_end": "training_step, or on_train_batch_end",
    "validation_step_end": "validation_step, or on_validation_batch_end",
    "test_step_end": "test_step, or on_test_batch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_init_start": "__init__ or setup",
    "on_init_end": "__init__ or setup",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "on_keyboard_interrupt": "on_exception",
    "get_progress_bar_dict": "self.log(..., prog_bar=True)",
    "tbptt_split_batch": "manual optimization in training_step",
    "training_end": "training_step",
    "validation_end": "on_validation_epoch_end (collect outputs in validation_step)",
    "test_end": "on_test_epoch_end (collect outputs in test_step)",
    "tng_dataloader": "train_dataloader",
    "configure_sharded_model": "configure_model",
    "configure_apex": "Trainer(precision='16-mixed')",
    "on_validation_model_eval": "on_validation_start",
    "on_validation_model_train": "on_validation_end",
    "on_validation_model_zero_grad": "on_validation_start",
    "on_test_model_eval": "on_test_start",
    "on_test_model_train": "on_test_end",
    "on_predict_model_eval": "on_predict_start",
    "on_predict_model_train": "on_predict_end",
    "on_train_dataloader": "train_dataloader",
    "on_val_dataloader": "val_dataloader",
    "on_test_dataloader": "test_dataloader",
    "on_predict_dataloader": "predict_dataloader",
    "on_hpc_save": "on_save_checkpoint",
    "on_hpc_load": "on_load_checkpoint",
}

#: A method on_... with one of these words is meant as a hook ("loss" is in names of others' own).
_HOOK_WORDS: frozenset[str] = frozenset(
    (word for name in LOOP_HOOKS for word in name.split("_")[1:] if name.startswith("on_")),
) - {"loss"} | {"begin", "begins", "ends", "epochs", "finish", "starts", "training", "val", "valid"}


def not_a_hook(function: Function) -> Function:
    """Marks a method whose name resembles a hook's as the user's own.

    Args:
        function: The method; it is returned unchanged.
    """
    function._not_a_hook = True  # type: ignore[attr-defined]
    return function


def check_hook_names(cls: type, valid: frozenset[str]) -> None:
    """Raises `HookNameError` for a method of ``cls`` that looks like a hook and is none.

    Looks like a hook: begins with ``on_`` and has a word of a hook's name in it, is a name of an
    earlier generation of the field, or has the words of a hook but for a few letters. Private
    names are left alone.

    Args:
        cls: The class that was just made. What it defines itself is looked at, and what the
            classes of its own package do that it mixes in.
        valid: The names that exist for this kind of class.
    """
    for part in (cls, *_mixins(cls)):
        for name, member in vars(part).items():
            own = name.startswith("_") or not inspect.isfunction(member)
            if own or hasattr(member, "_not_a_hook"):
                continue
            if name in valid:
                _check_arguments(f"{part.__qualname__}.{name}", member, _declared(cls, name))
            else:
                _check_name(f"{part.__qualname__}.{name}", name, valid)


def _declared(cls: type, name: str) -> Any:
    """Returns a hook as the class of lightkit declares it that ``cls`` is made of; None for none."""
    if name == "validation_step":
        name = "test_step"  # which takes as many, and says so
    ours = (base for base in cls.__mro__ if base.__module__.startswith("lightkit."))
    return next((vars(base)[name] for base in ours if name in vars(base)), None)


def _check_arguments(place: str, member: Callable[..., Any], declared: Any) -> None:
    """Raises for a hook with an argument that nobody gives it."""
    if declared is None:
        return
    # As it is called: a decorator may give more than it gets.
    wanted = list(inspect.signature(member, follow_wrapped=False).parameters.values())
    given = list(inspect.signature(declared).parameters)
    needed = [p for p in wanted if p.kind in _POSITIONAL and p.default is p.empty]
    for p in wanted:
        optional = p.name == "dataloader_idx" and p.default is not p.empty
        if p.name in HOOK_ARGUMENTS and p.name not in given and not optional:
            raise HookNameError(
                f"{place} is called without {p.name!r}: {HOOK_ARGUMENTS[p.name]}. It gets "
                f"({', '.join(given[1:])})."
            )
    if len(needed) > len(given):
        extra = ", ".join(p.name for p in needed[len(given) :])
        raise HookNameError(
            f"{place} gets ({', '.join(given[1:])}), and nothing for its arguments {extra}. Give "
            f"them defaults, or leave them out."
        )


def _mixins(cls: type) -> list[type]:
    """Returns the bases of ``cls`` that no hook check has seen: those that are no hook classes."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("lightkit.")]
    package = cls.__module__.partition(".")[0]
    return [
        base
        for base in cls.__mro__[1:]
        if base.__module__.partition(".")[0] == package and not issubclass(base, tuple(ours))
    ]


def _check_name(place: str, name: str, valid: frozenset[str]) -> None:
    if name in OLD_NAMES:
        raise HookNameError(
            f"{place} is a hook of an earlier generation and would never be called. Write "
            f"{OLD_NAMES[name]}."
        )
    if (start := name.replace("_begin", "_start")) != name:  # as Keras and skorch call it
        start = OLD_NAMES.get(start, start)
        if start in valid:
            raise HookNameError(f"{place} would never be called. Write {start}.")
    if name in TASK_NAMES - CALLBACK_NAMES:
        data = name == "prepare_data" or name.endswith(("_dataloader", "_transfer", "_to_device"))
        raise HookNameError(
            f"{place} would never be called: {name} belongs to the TaskModule"
            f"{' or the DataModule' if data else ''}. Move it there. If it is a method of your own, "
            f"rename it or decorate it with @lightkit.not_a_hook."
        )
    if name.startswith("on_"):
        suspect = not _HOOK_WORDS.isdisjoint(name.split("_")[1:]) or bool(
            difflib.get_close_matches(name, valid, n=1, cutoff=0.75)
        )
    else:
        suspect = any(_alike(name, other) for other in valid)
    if suspect:
        raise HookNameError(
            f"{place} looks like a hook but is none, so it would never be called."
            f"{did_you_mean(name, valid)} If it is a method of your own, rename it or decorate it "
            f"with @lightkit.not_a_hook."
        )


def _alike(name: str, other: str) -> bool:
    """Tells whether a name is the other one but for letters that are easily mistaken.

    Word by word, since get_dataloader is nearer to test_dataloader than many a misspelling is.
    """
    if name.replace("_", "").lower() == other.replace("_", ""):
        return True
    words, others = name.split("_"), other.split("_")
    return len(words) == len(others) and all(
        a == b or sorted(a) == sorted(b) or difflib.SequenceMatcher(None, a, b).ratio() > 0.77
        for a, b in zip(words, others, strict=True)
    )
