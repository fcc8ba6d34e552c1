"""Where the numbers of a run go: TensorBoard, ``metrics.jsonl``, ``metrics.csv``, or your own."""

import typing

from lightkit.loggers.base import Logger

if typing.TYPE_CHECKING:
    from lightkit.loggers.csv import CSVLogger
    from lightkit.loggers.jsonl import JSONLLogger
    from lightkit.loggers.tensorboard import TensorBoardLogger
    from lightkit.loggers.wandb import WandbLogger
else:
    _ROOMS = {
        "CSVLogger": "csv",
        "JSONLLogger": "jsonl",
        "TensorBoardLogger": "tensorboard",
        "WandbLogger": "wandb",
    }

    def __getattr__(name: str) -> object:
        """Imports a logger when it is first asked for."""
        if name not in _ROOMS:
            from lightkit.elsewhere import missing

            raise missing(__name__, name, __all__)
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["CSVLogger", "JSONLLogger", "Logger", "TensorBoardLogger", "WandbLogger"]
