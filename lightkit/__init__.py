"""lightkit: a structured trainer for PyTorch.

Subclass `TaskModule`, give it to a `Trainer`::

    import lightkit as lk

    history = lk.Trainer(max_epochs=3).fit(Net(), train_loader, val_loader)
"""

import typing

from lightkit import errors, loggers
from lightkit.data import DataModule
from lightkit.distributed import rank_zero_info, rank_zero_only, rank_zero_warn
from lightkit.errors import LightkitError
from lightkit.history import History
from lightkit.hook_names import not_a_hook
from lightkit.hooks import Callback
from lightkit.rng import seed_everything
from lightkit.task import TaskModule

if typing.TYPE_CHECKING:
    from lightkit import callbacks
    from lightkit.data.tensor_loader import TensorLoader
    from lightkit.distributed.ddp import DDPStrategy
    from lightkit.distributed.fsdp import FSDPStrategy
    from lightkit.finetuning import param_groups
    from lightkit.freezing import freeze, is_frozen, unfreeze
    from lightkit.functional import evaluate, fit, predict
    from lightkit.rates import one_cycle, warmup, warmup_cosine
    from lightkit.runs import find_runs
    from lightkit.supervised import SupervisedTask
    from lightkit.trainer import Trainer
    from lightkit.tuning import lr_find, scale_batch_size
else:
    #: What a module that defines tasks does not need, and so no worker process that imports it.
    _ROOMS = {
        "DDPStrategy": "distributed.ddp",
        "FSDPStrategy": "distributed.fsdp",
        "SupervisedTask": "supervised",
        "TensorLoader": "data.tensor_loader",
        "Trainer": "trainer",
        "callbacks": "callbacks",
        "evaluate": "functional",
        "find_runs": "runs",
        "fit": "functional",
        "predict": "functional",
        "freeze": "freezing",
        "is_frozen": "freezing",
        "lr_find": "tuning",
        "one_cycle": "rates",
        "param_groups": "finetuning",
        "scale_batch_size": "tuning",
        "unfreeze": "freezing",
        "warmup": "rates",
        "warmup_cosine": "rates",
    }

    def __getattr__(name: str) -> object:
        """Imports the trainer, callbacks and strategies when they are first asked for."""
        if name not in _ROOMS:
            from lightkit.elsewhere import missing

            raise missing(__name__, name, __all__)
        from importlib import import_module

        room = import_module(f"lightkit.{_ROOMS[name]}")
        found = globals()[name] = room if name == "callbacks" else getattr(room, name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "Callback",
    "DDPStrategy",
    "DataModule",
    "FSDPStrategy",
    "History",
    "LightkitError",
    "SupervisedTask",
    "TaskModule",
    "TensorLoader",
    "Trainer",
    "callbacks",
    "errors",
    "evaluate",
    "find_runs",
    "fit",
    "freeze",
    "is_frozen",
    "loggers",
    "lr_find",
    "not_a_hook",
    "one_cycle",
    "param_groups",
    "predict",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "scale_batch_size",
    "seed_everything",
    "unfreeze",
    "warmup",
    "warmup_cosine",
]
