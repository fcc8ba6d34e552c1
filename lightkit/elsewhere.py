"""Names that other trainers have and lightkit has not, and what to write instead.

Read only where a name was not found. `docs/migrate-from-lightning.md` has them in its tables, and
`tests/migration/test_names.py` holds the two together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from lightkit.errors import did_you_mean

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
    "STEP_OUTPUT": "typing.Any",
    "EVAL_DATALOADERS": "typing.Any",
    "TRAIN_DATALOADERS": "typing.Any",
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
    "CometLogger": _OWN_LOGGER,
    "MLFlowLogger": _OWN_LOGGER,
    "NeptuneLogger": _OWN_LOGGER,
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
    "accelerator": _DEVICE,
    "batch_idx": "trainer.state.batch_idx",
    "ckpt_path": "fit(..., ckpt_path=...)",
    "data_parallel_device_ids": _DEVICE,
    "device_ids": _DEVICE,
    "early_stopping_callbacks": "trainer.early_stopping_callback",
    "evaluating": "trainer.validating or trainer.testing",
    "fit_loop": "trainer.current_epoch or trainer.state; for its limits fit(..., max_epochs=...)",
    "gpus": "trainer.num_devices",
    "lightning_optimizers": "trainer.optimizers",
    "num_gpus": "trainer.num_devices",
    "num_sanity_val_batches": "trainer.sanity_batches",
    "precision_plugin": "trainer.precision",
    "print": "task.print",
    "proc_rank": "trainer.global_rank",
    "profiler": "trainer.callbacks, where it is one",
    "progress_bar_dict": "trainer.progress_bar_metrics",
    "received_sigterm": "trainer.interrupted",
    "resume_from_checkpoint": "fit(..., ckpt_path=...)",
    "root_gpu": _DEVICE,
    "running_sanity_check": "trainer.sanity_checking",
    "scaler": "trainer.precision",
    "test_loop": "trainer.testing",
    "train_dataloaders": "trainer.train_dataloader",
    "tune": "lk.lr_find or lk.scale_batch_size",
    "tuner": "lk.lr_find or lk.scale_batch_size",
    "use_ddp": "trainer.world_size > 1",
    "validate_loop": "trainer.validating",
    "weights_save_path": "trainer.checkpoint_callback.dirpath",
}
#: Of ``trainer.state``.
STATE: dict[str, str] = {
    "finished": _STAGE,
    "fn": _STAGE,
    "stage": "trainer.training, trainer.validating and the like",
    "status": _STAGE,
    "stopped": _STAGE,
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
#: Of ``ModelCheckpoint(...)``.
MODEL_CHECKPOINT: dict[str, str] = {
    "filepath": "dirpath and filename",
    "period": "every_n_epochs",
    "prefix": "filename, which may begin with it",
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


def refusal(what: str, name: str, names: Mapping[str, str], known: Iterable[str] = ()) -> str:
    """Returns the text for a name that does not exist: what to write, or the nearest that does.

    Args:
        what: What was asked for it, such as "Trainer has no argument".
        name: The name.
        names: One of the tables of this module.
        known: The names that there are.
    """
    hint = f" Write {names[name]}." if name in names else did_you_mean(name, known)
    return f"{what} {name!r}.{hint}"


def missing(module: str, name: str, known: Iterable[str]) -> Exception:
    """Returns the error for a name that a module of lightkit lacks; for its ``__getattr__``.

    ``from lightkit import LightningModule`` hides the text of an AttributeError, so there it is an
    ImportError where it says what to write.
    """
    text = refusal(f"module {module!r} has no attribute", name, NAMES, known)
    imported = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    return ImportError(text) if imported and name in NAMES else AttributeError(text)
