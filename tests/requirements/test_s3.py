"""Requirements of the guide to ignite: engines, events, and what one logs in nearly every project."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.loggers import TensorBoardLogger
from tests.small import Net, loader


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in board.Scalars(name)]
        for name in board.Tags()["scalars"]
    }


def test_S3_01_a_step_function_of_ones_own_runs_in_the_same_loop(quiet):
    torch.manual_seed(3)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def update(net, optimizer, batch):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    class Process(lk.TaskModule):
        def __init__(self, step):
            super().__init__()
            self.automatic_optimization = False
            self.net, self.step = nn.Linear(4, 1), step

        def training_step(self, batch, batch_idx):
            return self.step(self.net, self.optimizers(), batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(3)
    task = Process(update)
    trainer = quiet(fused=False)
    history = trainer.fit(task, loader())
    losses = [update(net, optimizer, batch).item() for batch in loader()]
    assert torch.equal(task.net.weight, net.weight)
    assert history[0]["train_loss"] == pytest.approx(sum(losses) / 5)


def test_S3_02_every_event_can_be_watched(quiet):
    seen = []

    class Watches(lk.Callback):
        def on_fit_start(self, trainer, task):
            seen.append("started")

        def on_train_epoch_start(self, trainer, task):
            seen.append("epoch started")

        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append("iteration started")

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append("iteration completed")

        def on_train_epoch_end(self, trainer, task):
            seen.append("epoch completed")

        def on_fit_end(self, trainer, task):
            seen.append("completed")

        def on_exception(self, trainer, task, exception):
            seen.append(repr(exception))

    quiet(max_epochs=2, callbacks=Watches()).fit(Net(), loader(4))
    epoch = ["epoch started", "iteration started", "iteration completed", "epoch completed"]
    assert seen == ["started", *epoch, *epoch, "completed"]

    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise ValueError("broken")

    seen.clear()
    with pytest.raises(ValueError, match="broken"):
        quiet(callbacks=Watches()).fit(Fails(), loader(4))
    assert seen == ["started", "epoch started", "iteration started", "ValueError('broken')"]


def test_S3_03_a_decorated_function_is_a_handler(quiet):
    trainer, seen = quiet(max_epochs=2), []

    @trainer.on("train_batch_end", every=2)
    def watch(trainer):
        seen.append(trainer.global_step)

    @trainer.on("train_epoch_end")
    def epoch(trainer, task):
        seen.append("epoch")

    @trainer.on("train_batch_end", filter=lambda trainer, number: number == 99)
    def never():
        raise AssertionError("there are no 99 batches")

    trainer.fit(Net(), loader(16))
    assert seen == [2, 4, "epoch", 6, 8, "epoch"]
    with pytest.raises(lk.LightkitError, match="train_batch_end"):
        trainer.on("train_batch_ends")
    with pytest.raises(lk.LightkitError, match="train_batch_end"):
        trainer.on("ITERATION_COMPLETED")


def test_S3_04_a_supervised_trainer_with_metrics_device_and_prepared_batches(quiet):
    class Prepared(lk.SupervisedTask):
        def prepare_batch(self, batch):
            return batch["in"], batch["out"]

    batches = [{"in": x, "out": y} for x, y in loader()]
    task = Prepared(nn.Linear(4, 1), loss="mse", optimizer="sgd", lr=0.05)
    trainer = quiet(max_epochs=3, accelerator="cpu")
    history = trainer.fit(task, DataLoader(batches, batch_size=None))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    [row] = trainer.validate(task, DataLoader(batches, batch_size=None), verbose=False)
    x, y = loader().dataset.tensors
    assert row["val_loss"] == pytest.approx(nn.functional.mse_loss(task.net(x), y).item())
    assert lk.evaluate(task.net, loader(), loss="mse").popitem()[1] == pytest.approx(
        row["val_loss"]
    )


def test_S3_05_transfers_do_not_block():
    seen = []

    class Spy(torch.Tensor):
        def to(self, device, non_blocking=False):
            seen.append((str(device), non_blocking))
            return self

    batch = (torch.ones(2).as_subclass(Spy), {"y": torch.ones(2).as_subclass(Spy)})
    Net().transfer_batch_to_device(batch, torch.device("cuda"), 0)
    assert seen == [("cuda", True)] * 2


def test_S3_06_the_curves_of_every_project_are_there_by_default(tmp_path, monkeypatch):
    """All but the graph of the model, which is written when it is asked for: S3-07."""
    monkeypatch.chdir(tmp_path)
    losses = []

    class Losses(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    trainer = lk.Trainer(max_epochs=2, log_every_n_steps=2, enable_progress_bar=False)
    history = trainer.fit(Losses(), loader(16), loader(8, seed=2))
    curves = scalars(trainer.run_dir)
    pairs = [sum(losses[i : i + 2]) / 2 for i in range(0, 8, 2)]
    assert [step for step, _ in curves["train_loss"]] == [2, 4, 6, 8]
    assert [value for _, value in curves["train_loss"]] == pytest.approx(pairs)
    assert [step for step, _ in curves["val_loss"]] == [4, 8]
    assert history["train_loss"] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    assert history["val_loss"] == pytest.approx([value for _, value in curves["val_loss"]])


def test_S3_07_the_graph_of_the_model_never_breaks_a_run(tmp_path, caplog):
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_checkpointing": False}

    def events(task, folder):
        board = TensorBoardLogger(tmp_path / folder, log_graph=True)
        lk.Trainer(logger=board, **options).fit(task, loader())
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(board.log_dir)).Reload().Tags()

    task = Net()
    task.example_input_array = torch.zeros(2, 4)
    assert events(task, "good")["graph"]

    class Untraceable(Net):
        def forward(self, x):
            if torch.jit.is_tracing():
                raise RuntimeError("not to be traced")
            return super().forward(x)

    task = Untraceable()
    task.example_input_array = torch.zeros(2, 4)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        tags = events(task, "bad")
    assert not tags["graph"]
    assert "train_loss" in tags["scalars"]
    assert "not to be traced" in caplog.text


def test_S3_08_rows_come_in_intervals_and_know_their_epoch(tmp_path):
    positions = []

    class Watches(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if batch_idx % 2 == 0:  # an interval of one's own, counted within the epoch
                positions.append((trainer.current_epoch, batch_idx, trainer.num_training_batches))

    trainer = lk.Trainer(
        max_epochs=2,
        log_every_n_steps=3,
        callbacks=Watches(),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    trainer.fit(Net(), loader())
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(row["epoch"], row["step"]) for row in map(json.loads, lines)]
    assert rows == [(0, 3), (0, 5), (1, 6), (1, 9), (1, 10)]  # none holds steps of two epochs
    assert positions == [(epoch, batch, 5) for epoch in (0, 1) for batch in (0, 2, 4)]


def test_S3_09_curves_are_whole_also_after_an_exception(tmp_path):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    trainer = lk.Trainer(
        max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(Fails(), loader())
    assert [step for step, _ in scalars(trainer.run_dir)["train_loss"]] == [1, 2, 3]
    assert trainer.logger._writer is None  # closed
    lines = (trainer.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_S3_10_the_variables_of_the_loop_are_visible(quiet):
    seen = []

    class Watches(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            loss = trainer.callback_metrics["train_loss"]
            assert torch.equal(outputs["loss"], loss)
            seen.append((trainer.current_epoch, trainer.global_step, trainer.state.batch_idx))

        def on_train_epoch_end(self, trainer, task):
            assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)

    trainer = quiet(max_epochs=2, callbacks=Watches())
    trainer.fit(Net(), loader(8), loader(4, seed=2))
    assert [(epoch, step) for epoch, step, _ in seen] == [(0, 1), (0, 2), (1, 3), (1, 4)]
    assert trainer.state.epoch == 2
