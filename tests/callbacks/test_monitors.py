from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lightkit as lk
from lightkit.callbacks import DeviceStatsMonitor, ThroughputMonitor
from lightkit.errors import ConfigError
from lightkit.loggers.base import Logger
from tests.small import Net, loader


class Lines(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def of(self, start):
        """The steps and rows of one monitor, without the start of the names."""
        return [
            (step, {name.removeprefix(start): value for name, value in row.items()})
            for step, row in self.rows
            if any(name.startswith(start) for name in row)
        ]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fit(monitor, train=None, task=None, val=None, **options):
        lines = Lines()
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        quiet |= {"enable_checkpointing": False, "max_epochs": 2, "log_every_n_steps": 2}
        run = lk.Trainer(callbacks=[monitor], logger=lines, **quiet | options)
        run.fit(task or Net(), loader() if train is None else train, val)
        return lines

    return fit


def test_what_the_process_takes_is_beside_each_row(fit):
    """S1-14"""
    rows = fit(DeviceStatsMonitor()).of("cpu/")
    assert [step for step, _ in rows] == [2, 4, 6, 8, 10]
    for _, row in rows:
        assert row["percent"] > 0
        assert row["memory"] > 50e6  # torch alone is more


def test_the_numbers_of_the_process_can_be_left_out(fit):
    assert fit(DeviceStatsMonitor(cpu_stats=False)).of("cpu/") == []


def test_numbers_of_the_device_are_those_of_its_allocator(fit, monkeypatch):
    stats = {
        "allocated_bytes.all.current": 3, "allocated_bytes.all.peak": 5,
        "reserved_bytes.all.current": 8, "num_alloc_retries": 1,
    }  # fmt: skip
    monitor = DeviceStatsMonitor()

    class Session:
        device = torch.device("cuda", 0)

    class Trainer:
        session = Session()

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50)
    expected = {"memory_allocated": 3, "memory_peak": 5, "memory_reserved": 8, "memory_retries": 1}
    expected = {f"device/{name}": value for name, value in expected.items()}
    assert monitor._row(Trainer()) == {**expected, "device/utilization": 50}

    def missing(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert monitor._row(Trainer()) == expected


class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(0.05)


def test_samples_and_batches_per_second(fit):
    """A window is the time of its steps; the validation after each epoch is not in it."""
    lines = fit(ThroughputMonitor(length_fn=lambda batch: 7), task=Slow(), val=loader())
    rows = lines.of("throughput/")
    assert [step for step, _ in rows] == [2, 4, 6, 8, 10]
    for _, row in rows:
        assert 15 < row["batches_per_second"] <= 100
        assert row["samples_per_second"] == pytest.approx(4 * row["batches_per_second"])
        assert row["items_per_second"] == pytest.approx(7 * row["batches_per_second"])
        assert row["steps_per_second"] == pytest.approx(row["batches_per_second"])
        assert "mfu" not in row


def test_waiting_for_data_is_told_as_a_share(fit):
    class Waits(IterableDataset):
        def __iter__(self):
            for _ in range(8):
                time.sleep(0.01)
                yield torch.randn(3, 4), torch.randn(3, 1)

    monitor = ThroughputMonitor(flops_per_batch=1e6, available_flops=1e9)
    rows = fit(
        monitor, DataLoader(Waits(), batch_size=None), max_epochs=3, log_every_n_steps=4
    ).of("throughput/")  # fmt: skip
    assert len(rows) == 6
    for _, row in rows:
        assert 0.2 < row["data_wait"] <= 1
        assert row["samples_per_second"] == pytest.approx(3 * row["batches_per_second"])
        assert row["mfu"] == pytest.approx(row["batches_per_second"] / 1000)


def test_with_accumulation_a_step_has_several_batches(fit):
    rows = fit(
        ThroughputMonitor(batch_size_fn=lambda batch: 10),
        accumulate_grad_batches=5,
        max_epochs=4,
    ).of("throughput/")
    assert [step for step, _ in rows] == [2, 4]
    for _, row in rows:
        assert row["batches_per_second"] == pytest.approx(5 * row["steps_per_second"])
        assert row["samples_per_second"] == pytest.approx(50 * row["steps_per_second"])


def test_one_number_of_flops_is_not_enough():
    with pytest.raises(ConfigError, match="together"):
        ThroughputMonitor(flops_per_batch=1.0)
