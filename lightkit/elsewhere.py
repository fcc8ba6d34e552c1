"""Names that other trainers have and lightkit has not, and what to write instead.

Read only where a name was not found. `docs/migrate-from-lightning.md` has them in its tables, and
`tests/migration/test_names.py` holds the two together.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lightkit.errors import ConfigError, did_you_mean

_Class = TypeVar("_Class", bound=type)

_LOADERS = (
    "one loader to train on (torch.utils.data.ConcatDataset, StackDataset, or Together of "
    "docs/migrate-from-lightning.md), a dict of loaders to validate on"
)
_DEVICE = "trainer.strategy.device"
_STAGE = "trainer.stage, which is None between calls"
_OWN_LOGGER = "a subclass of lk.loggers.Logger, as in docs/logging.md"

#: Of `lightkit`, `lightkit.callbacks` and `lightkit.loggers`.
NAMES: dict[str, str] = {
    "LightningModule": "lk.TaskModule",
    "LightningDataModule": "lk.DataModule",
    "LightningCLI": "the command `lightkit fit --config FILE`, as in docs/configuration.md",
    "Tuner": "lk.lr_find or lk.scale_batch_size",
    "Fabric": "a `for` over lightkit.loops, or a task in manual optimization",
    **dict.fromkeys(("STEP_OUTPUT", "EVAL_DATALOADERS", "TRAIN_DATALOADERS"), "typing.Any"),
    "DummyLogger": "Trainer(logger=False), for which trainer.logger is None",
    "LightningLoggerBase": "lk.loggers.Logger",
    "CombinedLoader": _LOADERS,
    "MisconfigurationException": "lk.errors.ConfigError",
    "DDPPlugin": "lk.DDPStrategy",
    "data_loader": "the method without the decorator",
    "pytorch": "lightkit itself, as in lk.Trainer, lk.callbacks and lk.loggers",
    "profilers": "Trainer(profiler='simple')",
    "strategies": "lk.DDPStrategy or lk.FSDPStrategy",
    "utilities": "lk.rank_zero_only, lk.rank_zero_info or lk.rank_zero_warn",
    "BatchSizeFinder": "lk.scale_batch_size",
    "Checkpoint": "lk.callbacks.ModelCheckpoint",
    "GPUStatsMonitor": "lk.callbacks.DeviceStatsMonitor",
    "LearningRateFinder": "lk.lr_find",
    "ModelPruning": "torch.nn.utils.prune in a hook of your own",
    "OnExceptionCheckpoint": "lk.callbacks.ModelCheckpoint, which saves after an exception",
    "ProgressBarBase": "lk.callbacks.ProgressBar",
    **dict.fromkeys(("CometLogger", "MLFlowLogger", "NeptuneLogger"), _OWN_LOGGER),
}
#: Of ``Trainer(...)``.
ARGUMENTS: dict[str, str] = {
    "amp_backend": "precision",
    "auto_lr_find": "lk.lr_find before fit",
    "auto_scale_batch_size": "lk.scale_batch_size before fit",
    "auto_select_gpus": "devices",
    "checkpoint_callback": "enable_checkpointing; a ModelCheckpoint goes into callbacks",
    "distributed_backend": "strategy",
    "early_stop_callback": "callbacks=[EarlyStopping(monitor=...)]",
    "epochs": "max_epochs",
    "flush_logs_every_n_steps": "log_every_n_steps",
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "max_nb_epochs": "max_epochs",
    "multiple_trainloader_mode": _LOADERS,
    "num_processes": "devices",
    "prepare_data_per_node": "nothing: prepare_data runs once on each machine",
    "progress_bar_refresh_rate": "callbacks=[ProgressBar(...)], or enable_progress_bar=False",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "use_distributed_sampler",
    "resume_from_checkpoint": "fit(..., ckpt_path=...)",
    "stochastic_weight_avg": "callbacks=[SWA(swa_lrs=...)]",
    "tpu_cores": "accelerator and devices",
    "track_grad_norm": "callbacks=[Statistics()]",
    "train_percent_check": "limit_train_batches",
    "truncated_bptt_steps": "manual optimization in training_step",
    "val_percent_check": "limit_val_batches",
    "weights_save_path": "callbacks=[ModelCheckpoint(dirpath=...)]",
    "weights_summary": "enable_model_summary",
}
#: Of ``Trainer(strategy=...)``.
STRATEGIES: dict[str, str] = {
    **dict.fromkeys(
        ("dp", "ddp2", "ddp_cpu", "ddp_fork", "ddp_notebook", "ddp_spawn", "horovod"),
        "'ddp' and start the program by torchrun",
    ),
    **dict.fromkeys(("deepspeed", "deepspeed_stage_2", "deepspeed_stage_3"), "'fsdp'"),
    "ddp_find_unused_parameters_false": "'ddp'",
    "single_device": "'auto'",
}
#: Of ``trainer.fit(...)``, ``validate``, ``test`` and ``predict``.
CALL_ARGUMENTS: dict[str, str] = {
    "test_dataloaders": "dataloaders",
    "train_dataloader": "train_dataloaders",
    "train_loader": "train_dataloaders",
    "val_dataloader": "val_dataloaders",
    "val_dataloaders": "dataloaders",
}
#: Of a trainer.
TRAINER: dict[str, str] = {
    **dict.fromkeys(("accelerator", "data_parallel_device_ids", "device_ids", "root_gpu"), _DEVICE),
    "batch_idx": "trainer.state.batch_idx",
    **dict.fromkeys(("ckpt_path", "resume_from_checkpoint"), "fit(..., ckpt_path=...)"),
    "early_stopping_callbacks": "trainer.early_stopping_callback",
    "evaluating": "trainer.validating or trainer.testing",
    "fit_loop": "trainer.current_epoch or trainer.state; for its limits fit(..., max_epochs=...)",
    **dict.fromkeys(("gpus", "num_gpus"), "trainer.num_devices"),
    "lightning_optimizers": "trainer.optimizers",
    "num_sanity_val_batches": "trainer.sanity_batches",
    **dict.fromkeys(("precision_plugin", "scaler"), "trainer.precision"),
    "print": "task.print",
    "proc_rank": "trainer.global_rank",
    "profiler": "trainer.callbacks, where it is one",
    "progress_bar_dict": "trainer.progress_bar_metrics",
    "received_sigterm": "trainer.interrupted",
    "running_sanity_check": "trainer.sanity_checking",
    "test_loop": "trainer.testing",
    "train_dataloaders": "trainer.train_dataloader",
    **dict.fromkeys(("tune", "tuner"), "lk.lr_find or lk.scale_batch_size"),
    "use_ddp": "trainer.world_size > 1",
    "validate_loop": "trainer.validating",
    "weights_save_path": "trainer.checkpoint_callback.dirpath",
}
#: Of ``trainer.state``.
STATE: dict[str, str] = {
    **dict.fromkeys(("finished", "fn", "status", "stopped"), _STAGE),
    "stage": "trainer.training, trainer.validating and the like",
}
#: Of ``trainer.strategy``.
STRATEGY: dict[str, str] = {
    "all_gather": "task.all_gather(tensor)",
    "barrier": "trainer.strategy.ranks.wait('what for')",
    "broadcast": "trainer.strategy.ranks.share(value, 'what it is')",
    "reduce": "trainer.strategy.ranks.total(tensor)",
    "root_device": _DEVICE,
}
#: Of a checkpoint.
CHECKPOINT: dict[str, str] = {
    "epoch": "checkpoint['lightkit']['epoch']",
    "global_step": "checkpoint['lightkit']['global_step']",
    "hyper_parameters": "checkpoint['hparams']",
    "loops": "checkpoint['loop']",
    "lr_schedulers": "checkpoint['schedulers']",
    "optimizer_states": "checkpoint['optimizers']",
    "state_dict": "checkpoint['model']",
}
#: Of callbacks and loggers; these are all of ``ModelCheckpoint(...)``.
CALLBACK_ARGUMENTS: dict[str, str] = {
    "filepath": "dirpath and filename",
    "period": "every_n_epochs",
    "prefix": "filename, which may begin with it",
    "save_best_only": "nothing: best.ckpt and last.ckpt are written by default",
}
#: Arguments of hooks that nobody gives.
HOOK_ARGUMENTS: dict[str, str] = {
    "dataloader_idx": "leave it out: training has one loader",
    "dataloader_iter": "the step gets (batch, batch_idx)",
    "hiddens": "keep them as an attribute, in manual optimization",
    "optimizer_idx": "leave it out. Several optimizers step in manual optimization: "
    "self.automatic_optimization = False, self.optimizers(), self.manual_backward(loss)",
    "outputs": "collect them in the step",
}
#: Of Keras, skorch and ignite: names of modules and of a trainer; their pages have them in tables.
OTHERS: dict[str, str] = {
    "BackupAndRestore": "ckpt_path='auto'",
    **dict.fromkeys(("Engine", "create_supervised_trainer"), "lk.Trainer and a task, or lk.fit"),
    "EpochScoring": "metrics=[...] of lk.fit",
    "Events": "trainer.on('train_epoch_end', ...)",
    "GradientNormClipping": "gradient_clip_val",
    **dict.fromkeys(("LRScheduler", "LearningRateScheduler", "ReduceLROnPlateau"),
                    "scheduler= of lk.fit, or what configure_optimizers returns"),
    **dict.fromkeys(("LightkitClassifier", "LightkitRegressor", "NeuralNetClassifier", "sklearn"),
                    "from lightkit.sklearn import LightkitClassifier, LightkitRegressor"),
    "TensorBoard": "nothing: its files are written by default",
    **dict.fromkeys(("TerminateOnNaN", "TerminateOnNan"), "nothing: a loss that is nan ends a run"),
    "add_event_handler": "trainer.on(event, function)",
    "evaluate": "trainer.validate or trainer.test",
    "run": "trainer.fit",
    "terminate": "trainer.stop('reason')",
}  # fmt: skip
#: Of an estimator's arguments.
ESTIMATOR: dict[str, str] = {
    "compile": "trainer__compile",
    "criterion": "loss",
    "device": "trainer__accelerator",
    "train_split": "validation_fraction",
    "warm_start": "partial_fit instead of fit",
}


def refusal(what: str, name: str, names: Mapping[str, str], known: Iterable[str] = ()) -> str:
    """Returns the text for a name that does not exist: what to write, or the nearest that does.

    Args:
        what: What was asked for it, such as "Trainer has no argument".
        name: The name.
        names: One of the tables of this module.
        known: The names that there are.
    """
    public = (other for other in known if not other.startswith("_"))
    hint = f" Write {names[name]}." if name in names else did_you_mean(name, public)
    return f"{what} {name!r}.{hint}"


def refuses_unknown(cls: _Class) -> _Class:
    """Makes an unknown keyword of a class of lightkit an error that says what to write."""
    init: Any = vars(cls).get("__init__")
    if init is None or not cls.__module__.startswith("lightkit."):
        return cls

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        parameters = inspect.signature(init).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in () if takes_any else given.keys() - parameters.keys():
            what = f"{cls.__name__} has no argument"
            raise ConfigError(refusal(what, name, CALLBACK_ARGUMENTS, parameters))
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def missing(module: str, name: str, known: Iterable[str]) -> Exception:
    """Returns the error for a name that a module of lightkit lacks; for its ``__getattr__``.

    ``from lightkit import LightningModule`` hides the text of an AttributeError, so there it is an
    ImportError where it says what to write.
    """
    names = NAMES | OTHERS
    text = refusal(f"module {module!r} has no attribute", name, names, known)
    imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    return ImportError(text) if imported and name in names else AttributeError(text)
