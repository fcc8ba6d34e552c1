from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

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


def opened(folder, **kwargs):
    logger = TensorBoardLogger(**kwargs)
    logger.open(folder)
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


def scalars(folder):
    found = accumulated(folder)
    return {t: [(s.step, s.value) for s in found.Scalars(t)] for t in found.Tags()["scalars"]}


def rewound(folder, mark, **kwargs):
    logger = TensorBoardLogger(**kwargs)
    logger.open(folder, purge_step=21)
    logger.rewind(mark)
    return logger


def test_rewind_takes_back_what_came_after_the_mark_and_nothing_else(tmp_path):
    logger = opened(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 10.0}, 10)
    for count in range(1, 41):  # an evaluation counts its rows on its own, beyond the steps
        logger.log_metrics({"val_step": count}, count)
    logger.log_metrics({"loss": 20.0}, 20)
    mark = logger.mark()
    logger.log_metrics({"epoch_loss": 1.0}, 20)
    logger.log_metrics({"loss": 30.0, "gone": 0.0}, 30)
    logger.close()
    again = rewound(tmp_path, mark)
    assert again.mark() == mark
    again.log_metrics({"loss": 0.5}, 25)
    again.close()
    assert scalars(tmp_path) == {
        "loss": [(10, 10.0), (20, 20.0), (25, 0.5)],
        "val_step": [(count, count) for count in range(1, 41)],
    }
    assert list(accumulated(tmp_path).summary_metadata) == ["_hparams_/session_start_info"]
    assert len(list(tmp_path.iterdir())) == 2


def test_runs_that_are_killed_again_and_again_leave_no_rows_and_few_files(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"loss": 10.0}, 10)
    mark = logger.mark()
    for attempt in range(12):  # the names of files of one second are in the order of text
        logger.close()
        logger = rewound(tmp_path, mark)
        logger.log_metrics({"loss": float(attempt)}, 25)
    logger.close()
    assert scalars(tmp_path) == {"loss": [(10, 10.0), (25, 11.0)]}
    assert (
        len(list(tmp_path.iterdir())) == 3
    )  # the last lost one is emptied: a page may stand there
    again = rewound(tmp_path, {"files": {}})
    again.log_metrics({"loss": 0.5}, 5)
    again.close()
    assert scalars(tmp_path) == {"loss": [(5, 0.5)]}


def test_a_mark_of_several_files(tmp_path):
    logger = opened(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.close()
    logger.experiment.add_scalars("both", {"a": 1.0}, 1)
    mark = logger.mark()
    assert sorted(name.partition("events")[0] for name in mark["files"]) == ["", "", "both_a/"]
    logger.experiment.add_scalars("both", {"a": 2.0}, 2)
    logger.log_metrics({"loss": 2.0}, 2)
    logger.close()
    again = rewound(tmp_path, mark)
    again.log_metrics({"loss": 3.0}, 2)
    again.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 3.0)]}
    assert scalars(tmp_path / "both_a") == {"both": [(1, 1.0)]}
    assert set(again.mark()["files"]) > set(mark["files"])


def test_rewind_leaves_event_files_of_others_alone(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logger, other = opened(tmp_path), opened(tmp_path, prefix="x/y")
    with SummaryWriter(tmp_path) as users:
        users.add_scalar("mine", 7.0, 3)
    logger.log_metrics({"loss": 1.0}, 1)
    mark = logger.mark()
    assert len(mark["files"]) == 1
    other.log_metrics({"loss": 1.0}, 1)
    logger.log_metrics({"loss": 2.0}, 2)
    logger.close()
    other.close()
    rewound(tmp_path, mark).close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0)], "mine": [(3, 7.0)], "x/y-loss": [(1, 1.0)]}


def test_rewind_says_where_rows_are_missing_or_nothing_can_be_taken_back(tmp_path, caplog):
    rewound(tmp_path, {})
    assert not caplog.records
    logger = opened(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    mark = logger.mark()
    logger.close()
    rewound(tmp_path, {})
    assert "does not say how many rows there were" in caplog.text
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # in the middle of a record
    again = rewound(tmp_path, mark)
    assert "rows of before it are missing" in caplog.text
    again.log_metrics({"loss": 2.0}, 2)
    again.close()
    assert scalars(tmp_path) == {"loss": [(2, 2.0)]}


@pytest.mark.parametrize("sub_dir", ["board", "a/../board", "../beside"])
def test_the_folder_inside_the_run_folder_is_rewound_too(tmp_path, monkeypatch, sub_dir):
    monkeypatch.chdir(tmp_path)
    logger = opened("run", sub_dir=sub_dir)
    logger.log_metrics({"loss": 1.0}, 1)
    mark = logger.mark()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # as users' code may do at any time
    logger.log_metrics({"loss": 2.0}, 2)
    assert logger.mark()["files"].keys() == mark["files"].keys()
    logger.close()
    monkeypatch.chdir(tmp_path)
    rewound("run", mark, sub_dir=sub_dir).close()
    assert scalars((tmp_path / "run" / sub_dir).resolve()) == {"loss": [(1, 1.0)]}


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_page_that_is_open_takes_back_what_it_has_read(tmp_path, fast):
    logger = opened(tmp_path / "run")
    for step in range(1, 10):
        logger.log_metrics({"loss": float(step)}, step)
        if step == 5:
            mark = logger.mark()
    logger.flush()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path)),
            *("--host", "127.0.0.1", "--port", "0", "--load_fast", fast, "--reload_interval", "1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = iter(server.stdout.readline, "")
        address = next(m.group() for line in lines if (m := re.search(r"http://\S+/", line)))
        _wait_for(address, [float(step) for step in range(1, 10)])
        for attempt in (-1.0, -2.0, -3.0):  # each loses what the one before wrote
            again = rewound(tmp_path / "run", mark)
            for step in (6, 7):
                again.log_metrics({"loss": attempt * step}, step)
            again.flush()
            _wait_for(address, [1.0, 2.0, 3.0, 4.0, 5.0, 6 * attempt, 7 * attempt])
            again.close()
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
        logger.close()


def _wait_for(address, values):
    url, found = f"{address}data/plugin/scalars/scalars?run=run&tag=loss", None
    for _ in range(150):
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            found = [value for _, _, value in json.load(answer)]
        if found == values:
            return
        time.sleep(0.1)
    assert found == values


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
    task.example_input_array = torch.randn(5, 4, generator=torch.Generator())
    task.net[1].eval()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    state = torch.get_rng_state()
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(task)
    logger.close()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
    assert task.training
    assert not task.net[1].training
    assert all(p.grad is None for p in task.parameters())
    assert accumulated(tmp_path).Tags()["graph"]


def test_a_graph_that_cannot_be_traced_is_one_warning(tmp_path, caplog):
    task = Net()
    task.example_input_array = torch.zeros(2, 7)
    logger = opened(tmp_path, log_graph=True)
    logger.log_graph(task)
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
    task = Net()
    task.example_input_array = torch.zeros(2, 4)
    logger = opened(tmp_path)
    logger.log_graph(task)
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
        def flush(self):
            pass

        def close(self):
            raise OSError("No space left on device")

    logger = opened(tmp_path)
    logger._writer = Broken()
    logger.close()
    assert "No space left on device" in caplog.text


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while ``disk.full`` is set; the writer's thread dies of it quietly."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data, *, write=RecordWriter.write):
        if disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    disk = SimpleNamespace(full=False)
    monkeypatch.setattr(RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    return disk


def test_a_moment_of_a_full_disk_costs_rows_and_one_warning(tmp_path, disk, caplog):
    logger = opened(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.mark()
    for step in (2, 4):
        disk.full = True
        logger.experiment.add_scalar("own", 0.5, step)
        with contextlib.suppress(OSError):  # the thread is dead
            logger.experiment.flush()
        disk.full = False
        logger.log_metrics({"loss": 2.0}, step + 1)
        mark = logger.mark()
    logger.log_metrics({"loss": 3.0}, 6)
    assert len(mark["files"]) == 3
    logger.close()
    assert [step for step, _ in rows(tmp_path)] == [1, 3, 5, 6]
    assert caplog.text.count("rows may be missing") == len(caplog.records) == 1

    logger = rewound(tmp_path, mark)
    logger.log_metrics({"loss": 4.0}, 6)
    logger.close()
    assert [row["loss"] for _, row in rows(tmp_path)] == [1.0, 2.0, 2.0, 4.0]


def test_while_the_disk_is_full_training_goes_on_and_a_mark_says_it(tmp_path, disk, caplog):
    logger = opened(tmp_path)
    disk.full = True
    for step in (1, 2):
        logger._written = 0.0  # so that it is not put off
        logger.log_metrics({"loss": 1.0}, step)
    with pytest.raises(OSError, match="No space left"):
        logger.mark()
    disk.full = False
    logger.mark()
    assert [step for step, _ in rows(tmp_path)] == [1, 2]  # those that no file took are kept
    disk.full = True
    logger.log_metrics({"loss": 1.0}, 3)
    logger.flush()  # row 3 is lost
    logger.log_metrics({"loss": 1.0}, 4)
    logger.close()
    assert "the last TensorBoard rows could not be written" in caplog.text
    disk.full = False
    logger.open(tmp_path / "next")
    logger.close()
    assert not (tmp_path / "next").exists()


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
