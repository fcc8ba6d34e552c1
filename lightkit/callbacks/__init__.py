"""Callbacks that come with lightkit. None knows another."""

from __future__ import annotations

from lightkit.callbacks.accumulation import GradientAccumulationScheduler
from lightkit.callbacks.early_stopping import EarlyStopping
from lightkit.callbacks.lambda_callback import LambdaCallback
from lightkit.callbacks.lr_monitor import LearningRateMonitor
from lightkit.callbacks.model_checkpoint import ModelCheckpoint
from lightkit.callbacks.prediction_writer import PredictionWriter
from lightkit.callbacks.profiler import SimpleProfiler
from lightkit.callbacks.progress import ProgressBar
from lightkit.callbacks.requeue import RequeueJob
from lightkit.callbacks.summary import ModelSummary
from lightkit.callbacks.timer import Timer
from lightkit.callbacks.trace import TraceProfiler
from lightkit.hooks import Callback

#: The names that other trainers use for the bar.
RichProgressBar = TQDMProgressBar = ProgressBar

__all__ = [
    "Callback",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "PredictionWriter",
    "ProgressBar",
    "RequeueJob",
    "RichProgressBar",
    "SimpleProfiler",
    "TQDMProgressBar",
    "Timer",
    "TraceProfiler",
]
