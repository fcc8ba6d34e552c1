"""The logger for MLflow of docs/logging.md, on a stand-in and on a real MLflow where there is one."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

import lightkit as lk
from tests.small import Net, loader

PAGE = Path(__file__).parents[2] / "docs" / "logging.md"


def recipe():
    page = PAGE.read_text(encoding="utf-8")
    code = re.search(r"```python\n(class MLflowLogger.*?)```", page, re.DOTALL)[1]
    names = {"lk": lk}
    exec(code, names)
    return names["MLflowLogger"]


class Client:
    """Keeps what a tracking server would."""

    def __init__(self):
        self.groups, self.runs = {}, {}

    def get_experiment_by_name(self, name):
        return self.groups.get(name)

    def create_experiment(self, name):
        self.groups[name] = types.SimpleNamespace(experiment_id=str(len(self.groups)))
        return self.groups[name].experiment_id

    def create_run(self, number):
        run = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=f"run{len(self.runs)}"),
            data=types.SimpleNamespace(metrics={}, params={}),
            history=[],
            ended=0,
        )
        self.runs[run.info.run_id] = run
        return run

    def log_metric(self, run, name, value, step):
        self.runs[run].history.append((step, name, value))
        self.runs[run].data.metrics[name] = value

    def log_param(self, run, name, value):
        assert self.runs[run].data.params.setdefault(name, value) == value

    def get_run(self, run):
        return self.runs[run]

    def set_terminated(self, run):
        self.runs[run].ended += 1


class Breaks(Net):
    def __init__(self, width: int = 4):
        super().__init__(width)
        self.save_hyperparameters()

    broken = True

    def training_step(self, batch, batch_idx):
        if self.broken and self.global_step == 8:
            raise RuntimeError("killed")
        return super().training_step(batch, batch_idx)


def resumed(client, folder):
    """A fit that is broken off after a checkpoint, and the one that goes on with it."""
    saver = lk.callbacks.ModelCheckpoint(save_on_exception=False)
    options = {"max_epochs": 3, "callbacks": [saver], "log_every_n_steps": 1}
    options |= {"enable_progress_bar": False, "default_root_dir": folder, "accelerator": "cpu"}
    logger = recipe()(client)
    with pytest.raises(RuntimeError, match="killed"):
        lk.Trainer(logger=logger, **options).fit(Breaks(), loader(), loader())
    task = Breaks()
    task.broken = False
    lk.Trainer(logger=logger, **options).fit(task, loader(), loader(), ckpt_path="auto")
    return logger.run


def test_a_run_that_is_resumed_has_each_row_once(tmp_path):
    client = Client()
    run = client.runs[resumed(client, tmp_path)]
    assert len(client.runs) == 1
    assert run.data.params == {"width": 4}
    assert run.ended == 2
    assert [step for step, name, _ in run.history if name == "val_loss"] == [5, 10, 15]
    rows = [value for _, name, value in run.history if name == "row"]
    assert rows == list(range(1, len(rows) + 1))


@pytest.mark.filterwarnings("ignore")
def test_with_the_real_package(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = resumed(client, tmp_path)
    found = client.get_metric_history(run, "val_loss")
    assert [metric.step for metric in found] == [5, 10, 15]
    assert client.get_run(run).data.params == {"width": "4"}
