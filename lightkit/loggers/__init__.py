"""Where the numbers of a run go: TensorBoard, ``metrics.jsonl``, ``metrics.csv``, or your own."""

from lightkit.loggers.base import Logger
from lightkit.loggers.csv import CSVLogger
from lightkit.loggers.jsonl import JSONLLogger
from lightkit.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "JSONLLogger", "Logger", "TensorBoardLogger"]
