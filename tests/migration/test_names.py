"""The tables of docs/migrate-from-lightning.md are the truth, and hold what projects use (S0-02)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import lightkit as lk
from lightkit import elsewhere, optim
from lightkit.data import DATA_NAMES
from lightkit.errors import ConfigError, HookNameError
from lightkit.hook_names import CALLBACK_NAMES, OLD_NAMES, TASK_NAMES
from tests.small import Net, loader

#: What `configure_optimizers` may return stands in the table of a task's attributes.
KEYS = {*optim._OUTER_KEYS, *optim._INNER_KEYS, "configure_optimizers"}
PAGE = Path(__file__).parents[2] / "docs" / "migrate-from-lightning.md"

#: Names of Lightning's that at least two of 35 public projects use, by the table they stand in.
USED = {
    "Arguments of the Trainer": """max_epochs accelerator devices callbacks logger default_root_dir
        gpus log_every_n_steps precision enable_checkpointing check_val_every_n_epoch
        accumulate_grad_batches strategy limit_train_batches num_sanity_val_steps
        val_check_interval gradient_clip_val limit_val_batches enable_model_summary
        enable_progress_bar sync_batchnorm num_nodes max_steps resume_from_checkpoint
        use_distributed_sampler fast_dev_run checkpoint_callback profiler""",
    "Arguments of calls": """fit(datamodule=) fit(model=) test(datamodule=) test(ckpt_path=)
        fit(train_dataloaders=) test(dataloaders=) fit(val_dataloaders=) fit(ckpt_path=)
        test(model=) test(verbose=) predict(datamodule=) validate(dataloaders=)
        validate(datamodule=) predict(model=) predict(dataloaders=) validate(verbose=)
        predict(return_predictions=) test_dataloaders validate(model=)""",
    "`trainer.`": """fit test logger current_epoch callback_metrics checkpoint_callback predict
        validate max_epochs datamodule global_step world_size model state val_dataloaders
        save_checkpoint estimated_stepping_batches sanity_checking callbacks max_steps
        is_global_zero strategy""",
    "Methods of a task": """training_step configure_optimizers validation_step test_step
        train_dataloader on_validation_epoch_end validation_epoch_end val_dataloader
        on_train_epoch_end predict_step setup test_epoch_end test_dataloader optimizer_step
        on_test_epoch_end prepare_data training_epoch_end on_save_checkpoint on_after_backward
        on_validation_end on_train_start on_train_batch_end on_train_epoch_start""",
    "`self.` in a task": """log save_hyperparameters hparams trainer current_epoch log_dict logger
        global_step device example_input_array manual_backward automatic_optimization optimizers
        all_gather on_gpu print global_rank self.log(prog_bar=) self.log(on_epoch=)
        self.log(on_step=) self.log(sync_dist=) self.log(logger=) self.log(batch_size=)
        self.log(add_dataloader_idx=) save_hyperparameters(ignore=) scheduler optimizer monitor
        lr_scheduler interval frequency""",
    "A data module": """train_dataloader val_dataloader setup test_dataloader prepare_data
        predict_dataloader teardown save_hyperparameters hparams on_gpu""",
    "Callbacks and loggers": """ModelCheckpoint(monitor=) ModelCheckpoint(mode=)
        ModelCheckpoint(save_top_k=) TensorBoardLogger(name=) EarlyStopping(monitor=)
        TensorBoardLogger(save_dir=) EarlyStopping(patience=) ModelCheckpoint(filename=)
        ModelCheckpoint(save_last=) EarlyStopping(mode=) ModelCheckpoint(dirpath=)
        CSVLogger(name=) TensorBoardLogger(version=) ModelCheckpoint(every_n_epochs=)
        EarlyStopping(min_delta=) LearningRateMonitor(logging_interval=)
        ModelCheckpoint(verbose=) CSVLogger(save_dir=) TensorBoardLogger(default_hp_metric=)
        TQDMProgressBar(refresh_rate=) EarlyStopping(verbose=) EarlyStopping(stopping_threshold=)
        ModelCheckpoint(auto_insert_metric_name=) ModelSummary(max_depth=)
        WandbLogger(project=)""",
    "Imports": """Trainer Callback seed_everything callbacks.ModelCheckpoint
        loggers.TensorBoardLogger callbacks loggers.CSVLogger callbacks.LearningRateMonitor
        callbacks.EarlyStopping LightningCLI loggers callbacks.TQDMProgressBar rank_zero_only
        loggers.Logger loggers.WandbLogger rank_zero_info rank_zero_warn DDPStrategy STEP_OUTPUT
        DummyLogger Tuner pytorch LightningModule LightningDataModule""",
}


def names_in(cell: str) -> list[str]:
    """Returns the names of a cell; each argument of ``call(a=, b=)`` as ``call(a=)``."""
    found: list[str] = []
    for name in re.findall(r"`([^`]+)`", cell):
        call = re.fullmatch(r"([\w.]+)\((.+)\)", name)
        arguments = call[2].split(", ") if call else ()
        found += [f"{call[1]}({argument})" for argument in arguments] if call else [name]
    return found


def tables() -> dict[str, dict[str, str]]:
    """Returns what the page says of each name, by the titles of its tables."""
    page = PAGE.read_text(encoding="utf-8").partition("## Name by name")[2].partition("\n## ")[0]
    found: dict[str, dict[str, str]] = {}
    for section in page.split("\n### ")[1:]:
        title = section.partition("\n")[0]
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
        found[title] = {n: row[1] for row in rows for n in names_in(row[0])}
    return found


TABLES = tables()


def works(title: str) -> list[str]:
    return [name for name, verdict in TABLES[title].items() if verdict.startswith("works")]


def refused(title: str) -> dict[str, str]:
    """Returns what the page tells to write instead of a name."""
    rows = TABLES[title].items()
    return {n: v.removeprefix("write ") for n, v in rows if v.startswith("write ")}


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def missing_arguments(names: list[str], find) -> list[str]:
    """Returns those of ``call(argument=)`` that ``find(call)`` does not take."""
    calls = [re.fullmatch(r"([\w.]+)\((\w+)=\)", name) for name in names]
    return [c[0] for c in calls if c and c[2] not in parameters(find(c[1]))]


@pytest.mark.parametrize("title", USED)
def test_what_projects_use_is_in_the_tables(title):
    assert set(USED[title].split()) - set(TABLES[title]) == set()


def test_arguments_of_the_trainer():
    title, needless = "Arguments of the Trainer", "works, with the value that asks for nothing"
    plain = [name for name in works(title) if TABLES[title][name] != needless]
    assert set(plain) - parameters(lk.Trainer) == set()
    lk.Trainer(barebones=False, enable_autolog_hparams=True, inference_mode=True, plugins=[])
    lk.Trainer(model_registry=None, plugins=None)
    assert refused(title) == elsewhere.ARGUMENTS
    for name, instead in elsewhere.ARGUMENTS.items():
        with pytest.raises(ConfigError, match=re.escape(f"{name!r}. Write {instead}.")):
            lk.Trainer(**{name: None})
    for name, instead in elsewhere.STRATEGIES.items():
        with pytest.raises(ConfigError, match=re.escape(f"Write {instead}.")):
            lk.Trainer(strategy=name)


def test_arguments_of_calls():
    title = "Arguments of calls"
    assert missing_arguments(works(title), lambda call: getattr(lk.Trainer, call)) == []
    assert refused(title) == elsewhere.CALL_ARGUMENTS
    trainer = lk.Trainer()
    for call in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        for name, instead in elsewhere.CALL_ARGUMENTS.items():
            if name not in parameters(call):
                text = f"Trainer.{call.__name__} has no argument {name!r}. Write {instead}."
                with pytest.raises(ConfigError, match=re.escape(text)):
                    call(Net(), **{name: None})
        with pytest.raises(ConfigError, match="Did you mean 'datamodule'"):
            call(Net(), data_module=None)


def test_attributes_of_a_trainer():
    title, trainer = "`trainer.`", lk.Trainer()
    for name in works(title):
        getattr(trainer, name)
    told = {
        **{f"state.{name}": text for name, text in elsewhere.STATE.items()},
        **{f"strategy.{name}": text for name, text in elsewhere.STRATEGY.items()},
        **elsewhere.TRAINER,
        "limit_train_batches": "trainer.options.limit_train_batches",
    }
    assert refused(title) == told
    for name, instead in told.items():
        *path, last = name.split(".")
        owner = getattr(trainer, path[0]) if path else trainer
        with pytest.raises(AttributeError, match=re.escape(f"{last!r}. Write {instead}.")):
            getattr(owner, last)


def test_methods_of_a_task():
    title = "Methods of a task"
    assert set(works(title)) - TASK_NAMES == set()
    hooks = {name for name in works(title) if name.startswith("on_")}
    assert hooks - {"on_before_batch_transfer", "on_after_batch_transfer"} <= CALLBACK_NAMES
    keys = {f"checkpoint.{key}": text for key, text in elsewhere.CHECKPOINT.items()}
    assert refused(title) == {**OLD_NAMES, **keys}
    for name, instead in OLD_NAMES.items():
        for base in (lk.TaskModule, lk.Callback):
            with pytest.raises(HookNameError, match=re.escape(f"Write {instead}.")):
                type("Old", (base,), {name: lambda self, *_: None})
    arguments = {n: v for n, v in TABLES[title].items() if n in elsewhere.HOOK_ARGUMENTS}
    assert arguments == elsewhere.HOOK_ARGUMENTS


def test_attributes_of_a_task():
    title, task = "`self.` in a task", Net()
    assert KEYS - set(works(title)) == set()
    methods = [name.removeprefix("self.") for name in works(title)]
    assert missing_arguments(methods, lambda call: getattr(lk.TaskModule, call)) == []
    assert list(refused(title)) == ["to_torchscript"]
    with pytest.raises(lk.errors.UsageError, match="Write task.export"):
        task.to_torchscript()


def test_the_attributes_are_there_while_a_fit_runs_and_after_it(quiet):
    names = set(works("`trainer.`"))
    own = {name for name in works("`self.` in a task") if "(" not in name} - KEYS

    class Watch(lk.Callback):
        looked = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for name in names:
                getattr(trainer, name)
            for name in own:
                getattr(pl_module, name)
            self.looked += 1

        on_test_batch_end = on_train_batch_end

    watch = Watch()
    trainer, task = quiet(callbacks=[watch]), Net()
    trainer.fit(task, loader(8), loader(8))
    trainer.test(task, loader(8), verbose=False)
    watch.on_train_batch_end(trainer, task, None, None, 0)
    assert watch.looked == 5


def test_a_data_module():
    found = set(works("A data module"))
    assert found - DATA_NAMES == {"save_hyperparameters", "hparams", "trainer", "on_gpu"}

    class Data(lk.DataModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            self.on_gpu = False

    assert Data().hparams == {}


def test_callbacks_and_loggers():
    def find(name):
        return getattr(lk.loggers if name.endswith("Logger") else lk.callbacks, name)

    assert refused("Callbacks and loggers") == elsewhere.CALLBACK_ARGUMENTS
    rows = works("Callbacks and loggers")
    for name in rows:
        if name[0].isupper() and "(" not in name:
            find(name)
    assert missing_arguments(rows, find) == []


def test_imports():
    title = "Imports"
    for name in works(title):
        owner = lk
        for part in name.split("."):
            owner = getattr(owner, part)
    assert refused(title) == elsewhere.NAMES
    for name, instead in elsewhere.NAMES.items():
        for module in ("lightkit", "lightkit.callbacks", "lightkit.loggers"):
            text = re.escape(f"module {module!r} has no attribute {name!r}. Write {instead}.")
            with pytest.raises(AttributeError, match=text):
                getattr(eval(module, {"lightkit": lk}), name)
            with pytest.raises(ImportError, match=text):
                exec(f"from {module} import {name}")


def test_names_of_keras_skorch_and_ignite():
    names = ("keras.md", "sklearn.md", "events.md")
    pages = "".join(PAGE.with_name(name).read_text("utf-8") for name in names)
    trainer = lk.Trainer()
    for name, instead in elsewhere.OTHERS.items():
        assert re.search(rf"\b{name}\b", pages), f"{name} is on no page"
        for owner in (lk.callbacks, lk.loggers, trainer):
            with pytest.raises(AttributeError, match=re.escape(f"{name!r}. Write {instead}.")):
                getattr(owner, name)
    with pytest.raises(ImportError, match="Write lk.Trainer and a task, or lk.fit"):
        exec("from lightkit import Engine")


def test_nothing_private_is_proposed():
    for near in ("evaluat", "handler", "option"):  # _evaluate, _handlers
        with pytest.raises(AttributeError) as caught:
            getattr(lk.Trainer(), near)
        assert "'_" not in str(caught.value)


def test_what_is_written_instead_exists():
    """Every ``lk.Name`` and ``trainer.name`` of the tables is there."""
    text = "\n".join(verdict for table in TABLES.values() for verdict in table.values())
    for path in re.findall(r"\blk\.([\w.]*\w)", text):
        owner = lk
        for part in path.split("."):
            owner = getattr(owner, part)
    trainer = lk.Trainer()
    for name in re.findall(r"\btrainer\.(\w+)", text):
        getattr(trainer, name)
