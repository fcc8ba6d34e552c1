from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lightkit.loggers import TensorBoardLogger


def events(folder):
    """All events of a folder, oldest first."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = sorted(folder.glob("events.out.tfevents.*"))
    return [event for file in files for event in LegacyEventFileLoader(str(file)).Load()]


def rows(folder):
    """Per event with scalars: the step and what it holds."""
    found = []
    for event in events(folder):
        row = {
            value.tag: value.simple_value
            for value in event.summary.value
            if value.HasField("simple_value")
        }
        if row:
            found.append((event.step, row))
    return found


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def opened(folder, purge_step=None, **kwargs):
    logger = TensorBoardLogger(**kwargs)
    logger.open(folder, purge_step)
    return logger


def test_all_scalars_of_a_row_are_one_event(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"train_loss": 0.5, "epoch": 0, "lr": 0.25}, 50)
    logger.log_metrics({"train_loss": float("nan")}, 100)
    logger.close()
    (first, second) = rows(tmp_path)
    assert first == (50, {"train_loss": 0.5, "epoch": 0.0, "lr": 0.25})
    assert second[0] == 100
    assert second[1]["train_loss"] != second[1]["train_loss"]
    assert {scalar.step for scalar in accumulated(tmp_path).Scalars("train_loss")} == {50, 100}


def test_hyperparameters_go_into_the_same_folder_without_a_fake_metric(tmp_path):
    from tensorboard.plugins.hparams import metadata

    logger = opened(tmp_path)
    logger.log_hyperparams(
        {
            "lr": 0.1,
            "net": {"width": 8},
            "act": torch.nn.ReLU,
            "bias": True,
            "none": None,
            "long": [0] * 999,
        }
    )
    logger.log_metrics({"val_loss": 0.5}, 1)
    logger.close()
    assert all(path.is_file() for path in tmp_path.iterdir())
    content = accumulated(tmp_path).summary_metadata[metadata.SESSION_START_INFO_TAG]
    start = metadata.parse_session_start_info_plugin_data(content.plugin_data.content)
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["net/width"].number_value == 8
    assert "ReLU" in start.hparams["act"].string_value
    assert len(start.hparams["long"].string_value) == 500
    assert start.hparams["bias"].string_value == "True"
    assert "none" not in start.hparams
    assert accumulated(tmp_path).Tags()["scalars"] == ["val_loss"]


def test_the_hparams_tab_finds_hyperparameters_and_metrics_of_all_runs(tmp_path):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for version, lr in enumerate((0.1, 0.2)):
        logger = opened(tmp_path / f"version_{version}")
        logger.log_hyperparams({"lr": lr, f"only_in_{version}": 1})
        logger.log_metrics({"val_loss": lr}, 1)
        logger.close()
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = Context(
        TBContext(data_provider=data_provider.MultiplexerDataProvider(runs, str(tmp_path)))
    )
    request = RequestContext()
    found = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(
        request, "", True, found, context.hparams_from_data_provider(request, "", limit=0)
    )
    assert {i.name for i in experiment.hparam_infos} == {"lr", "only_in_0", "only_in_1"}
    assert {i.name.tag for i in experiment.metric_infos} == {"val_loss"}


def test_nothing_is_written_before_the_first_row(tmp_path):
    logger = opened(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    logger.flush()
    logger.close()
    assert not (tmp_path / "run").exists()


def test_experiment_is_the_summary_writer_of_the_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logger = opened(tmp_path)
    assert isinstance(logger.experiment, SummaryWriter)
    logger.experiment.add_histogram("weights", torch.arange(10.0), 3)
    logger.log_metrics({"loss": 1.0}, 3)
    logger.flush()
    assert len(list(tmp_path.iterdir())) == 1
    assert accumulated(tmp_path).Tags()["histograms"] == ["weights"]
    logger.close()


def test_after_close_the_experiment_can_still_be_used(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    logger.close()
    logger.flush()
    logger.experiment.add_scalar("later", 2.0, 1)
    logger.close()
    assert set(accumulated(tmp_path).Tags()["scalars"]) == {"loss", "later"}


def test_purge_step_hides_the_rows_that_are_written_again(tmp_path):
    logger = opened(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"loss": float(step)}, step)
    logger.close()
    again = opened(tmp_path, purge_step=21)
    again.log_metrics({"loss": 0.5}, 25)
    again.close()
    assert [(s.step, s.value) for s in accumulated(tmp_path).Scalars("loss")] == [
        (10, 10.0),
        (20, 20.0),
        (25, 0.5),
    ]


def test_prefix_and_sub_dir(tmp_path):
    logger = opened(tmp_path, prefix="fold0", sub_dir="board")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    assert rows(tmp_path / "board") == [(1, {"fold0-loss": 1.0})]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        self.drop = torch.nn.Dropout()

    def forward(self, x):
        return self.drop(self.net(x))


def test_log_graph_leaves_modes_buffers_and_random_state(tmp_path):
    task = Net()
    task.net[1].eval()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    state = torch.get_rng_state()
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(task, (torch.randn(5, 4, generator=torch.Generator()), torch.zeros(5)))
    logger.close()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
    assert task.training
    assert not task.net[1].training
    assert all(p.grad is None for p in task.parameters())
    assert accumulated(tmp_path).Tags()["graph"]


def test_log_graph_takes_the_example_of_the_task_first(tmp_path):
    task = Net()
    task.example_input_array = torch.zeros(2, 4)
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(task, "no tensor")
    logger.close()
    assert accumulated(tmp_path).Tags()["graph"]


def test_a_graph_that_cannot_be_traced_is_one_warning(tmp_path, caplog):
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(Net(), torch.zeros(2, 7))
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the graph of Net was not written: " in record.message
    assert "example_input_array" in record.message
    assert rows(tmp_path) == [(1, {"loss": 1.0})]


def test_a_graph_without_any_input_says_so(tmp_path, caplog):
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(Net())
    logger.close()
    assert "was not written: there is no input to trace it on. Set example_input" in caplog.text


def test_no_graph_unless_asked_for(tmp_path):
    logger = opened(tmp_path)
    logger.log_graph(Net(), torch.zeros(2, 4))
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    assert not accumulated(tmp_path).Tags()["graph"]


def test_a_missing_package_is_said_when_the_run_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(ImportError, match=r"pip install tensorboard.*CSVLogger"):
        logger.open(tmp_path)


def test_a_writer_that_fails_at_close_does_not_hide_the_first_error(tmp_path, caplog):
    class Broken:
        def close(self):
            raise OSError("No space left on device")

    logger = opened(tmp_path)
    logger._writer = Broken()
    logger.close()
    assert "No space left on device" in caplog.text


def test_importing_the_loggers_does_not_import_tensorboard_and_using_it_warns_nobody(tmp_path):
    code = (
        "import sys\n"
        "from lightkit.loggers import TensorBoardLogger\n"
        "assert 'tensorboard' not in sys.modules\n"
        "logger = TensorBoardLogger()\n"
        f"logger.open({str(tmp_path)!r})\n"
        "logger.log_metrics({'a': 1.0}, 1)\n"
        "logger.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
