"""Callbacks that come with lightkit. None knows another."""

import typing

from lightkit.hooks import Callback

if typing.TYPE_CHECKING:
    from lightkit.callbacks.accumulation import GradientAccumulationScheduler
    from lightkit.callbacks.averaging import EMA, SWA, WeightAveraging
    from lightkit.callbacks.early_stopping import EarlyStopping
    from lightkit.callbacks.finetuning import BackboneFinetuning, BaseFinetuning, Unfreeze
    from lightkit.callbacks.lambda_callback import LambdaCallback
    from lightkit.callbacks.lr_monitor import LearningRateMonitor
    from lightkit.callbacks.model_checkpoint import ModelCheckpoint
    from lightkit.callbacks.monitors import DeviceStatsMonitor, ThroughputMonitor
    from lightkit.callbacks.prediction_writer import BasePredictionWriter, PredictionWriter
    from lightkit.callbacks.profiler import SimpleProfiler
    from lightkit.callbacks.progress import ProgressBar
    from lightkit.callbacks.requeue import RequeueJob
    from lightkit.callbacks.statistics import Statistics
    from lightkit.callbacks.summary import ModelSummary
    from lightkit.callbacks.timer import Timer
    from lightkit.callbacks.trace import TraceProfiler

    EMAWeightAveraging, StochasticWeightAveraging = EMA, SWA
    RichModelSummary = ModelSummary
    RichProgressBar = TQDMProgressBar = ProgressBar
else:
    _ROOMS = {
        "BackboneFinetuning": "finetuning",
        "BaseFinetuning": "finetuning",
        "BasePredictionWriter": "prediction_writer",
        "DeviceStatsMonitor": "monitors",
        "EMA": "averaging",
        "EarlyStopping": "early_stopping",
        "GradientAccumulationScheduler": "accumulation",
        "LambdaCallback": "lambda_callback",
        "LearningRateMonitor": "lr_monitor",
        "ModelCheckpoint": "model_checkpoint",
        "ModelSummary": "summary",
        "PredictionWriter": "prediction_writer",
        "ProgressBar": "progress",
        "RequeueJob": "requeue",
        "SWA": "averaging",
        "SimpleProfiler": "profiler",
        "Statistics": "statistics",
        "ThroughputMonitor": "monitors",
        "Timer": "timer",
        "TraceProfiler": "trace",
        "Unfreeze": "finetuning",
        "WeightAveraging": "averaging",
    }
    #: The names that other trainers use.
    _ALSO = {
        "EMAWeightAveraging": "EMA",
        "RichModelSummary": "ModelSummary",
        "RichProgressBar": "ProgressBar",
        "StochasticWeightAveraging": "SWA",
        "TQDMProgressBar": "ProgressBar",
    }

    def __getattr__(name: str) -> object:
        """Imports a callback when it is first asked for."""
        name = _ALSO.get(name, name)
        if name not in _ROOMS:
            from lightkit.elsewhere import missing

            raise missing(__name__, name, __all__)
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "EMA",
    "SWA",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "Callback",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "PredictionWriter",
    "ProgressBar",
    "RequeueJob",
    "RichModelSummary",
    "RichProgressBar",
    "SimpleProfiler",
    "Statistics",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "TraceProfiler",
    "Unfreeze",
    "WeightAveraging",
]
