"""Checkpoints of real runs: what a fit writes, and how it goes on from there."""

from __future__ import annotations

import logging
import pathlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.callbacks import ModelCheckpoint
from lightkit.checkpoint import latest, read_checkpoint
from lightkit.errors import CheckpointError, ConfigError


class Net(lk.TaskModule):
    def __init__(self, width: int = 6, lr: float = 0.05, folder: pathlib.Path | None = None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))
        self.log("val/mean", self(batch[0]).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def loaders(shuffle: bool = True):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, 8, shuffle=shuffle), DataLoader(TensorDataset(*data[:16]), 8)


def trainer(folder: pathlib.Path, **options) -> lk.Trainer:
    options = {"logger": False, "enable_progress_bar": False} | options
    return lk.Trainer(default_root_dir=folder, enable_model_summary=False, **options)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def test_a_fit_leaves_the_best_and_the_newest_without_any_callback_named(tmp_path):
    t = trainer(tmp_path, max_epochs=3)
    net = Net()
    t.fit(net, *loaders())
    folder = t.run_dir / "checkpoints"
    assert {"best.ckpt", "last.ckpt", "step_000015.ckpt"} <= set(names(folder))
    assert len(names(folder)) <= 4
    bare = Net().net
    state = torch.load(folder / "last.ckpt", weights_only=True)["model"]
    bare.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
    assert equal(bare.state_dict(), net.net.state_dict())
    assert t.checkpoint_callback.best_model_path == str(
        folder / f"step_{min(t.history, key=lambda row: row['val_loss'])['step']:06d}.ckpt"
    )
    for path in folder.iterdir():
        torch.load(path, weights_only=True)


def test_without_validation_the_newest(tmp_path):
    t = trainer(tmp_path, max_epochs=2)
    t.fit(Net(), loaders()[0])
    assert names(t.run_dir / "checkpoints") == ["last.ckpt", "step_000010.ckpt"]


def test_a_fit_that_goes_on_from_an_epochs_end_is_the_fit_that_never_stopped(tmp_path):
    def run(folder, epochs, ckpt_path=None):
        torch.manual_seed(3)
        t = trainer(folder, max_epochs=epochs, callbacks=[ModelCheckpoint(monitor="val_loss")])
        t.fit(Net(), *loaders(), ckpt_path=ckpt_path)
        return t, read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")

    _, whole = run(tmp_path / "a", 4)
    first, _ = run(tmp_path / "b", 2)
    torch.manual_seed(99)
    again, rest = run(tmp_path / "b", 4, latest(first.run_dir / "checkpoints"))
    for part in ("model", "optimizers", "schedulers", "rng", "precision", "hparams"):
        assert equal(whole[part], rest[part]), part
    for state in (whole["loop"], rest["loop"]):
        assert state.pop("seconds") > 0
    assert whole["loop"] == rest["loop"]
    assert len(again.history) == 4
    for state in (whole["history"], rest["history"]):
        assert state["values"].pop("time").shape == (4,)
    assert equal(whole["history"], rest["history"])


def test_stopped_in_the_middle_of_an_epoch_the_newest_state_is_saved(tmp_path):
    t = trainer(tmp_path, max_steps=7, callbacks=[ModelCheckpoint(every_n_epochs=10)])
    t.fit(Net(), *loaders())
    last = read_checkpoint(t.run_dir / "checkpoints" / "last.ckpt")
    assert last["loop"]["global_step"] == 7
    assert last["loop"]["epoch"] == 1
    assert names(t.run_dir / "checkpoints") == ["last.ckpt", "step_000007.ckpt"]


def test_a_validation_within_an_epoch_is_judged_with_its_own_weights(tmp_path, caplog):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    seen = []

    class Watch(lk.Callback):
        def on_validation_end(self, trainer, task):
            if not trainer.sanity_checking:
                value = trainer.callback_metrics["val_loss"].clone()
                seen.append((trainer.global_step, value, task.net[0].weight.detach().clone()))

    t = trainer(tmp_path, max_epochs=2, val_check_interval=2, callbacks=[callback, Watch()])
    t.fit(Net(), *loaders())
    scored = dict(callback.best_k_models)
    # Validated at 2 and 4 of each epoch's 5 steps; the ends of epochs are kept, but not judged.
    assert [step for step, *_ in seen] == [2, 4, 7, 9]
    assert [int(pathlib.Path(p).stem[5:]) for p in scored] == [2, 4, 7, 9]
    for (path, score), (_, value, weight) in zip(scored.items(), seen, strict=True):
        assert torch.equal(score, value)
        assert torch.equal(read_checkpoint(path)["model"]["net.0.weight"], weight)
    assert "judges the weights" not in caplog.text


def test_a_metric_of_the_training_can_be_monitored(tmp_path):
    callback = ModelCheckpoint(
        filename="{epoch}-{train_loss:.3f}-{val/mean:.1f}", monitor="train_loss", save_top_k=-1
    )
    t = trainer(tmp_path, max_epochs=2, callbacks=[callback])
    history = t.fit(Net(), *loaders())
    expected = [round(row["train_loss"], 3) for row in history]
    found = [float(name.split("train_loss=")[1].split("-")[0]) for name in callback.best_k_models]
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_misspelled_monitor_ends_the_fit_at_the_first_validation(tmp_path):
    callback = ModelCheckpoint(monitor="val_los")
    options = {"max_epochs": 50, "val_check_interval": 2, "rehearse": False}
    t = trainer(tmp_path, callbacks=[callback], **options)
    with pytest.raises(ConfigError, match=r"Did you mean 'val_loss'\? There are: .*val/mean"):
        t.fit(Net(), *loaders())
    assert t.global_step == 2


def test_the_best_weights_come_back(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", restore_best=True)
    net = Net(lr=0.5)
    t = trainer(tmp_path, max_epochs=4, callbacks=[callback])
    history = t.fit(net, *loaders())
    best = min(row["val_loss"] for row in history)
    assert t.validate(net, loaders()[1])[0]["val_loss"] == pytest.approx(best)
    assert equal(read_checkpoint(callback.best_model_path)["model"], dict(net.state_dict()))


def test_rebuilt_from_a_checkpoint_of_a_fit(tmp_path):
    t = trainer(tmp_path, max_epochs=1)
    net = Net(width=3, lr=0.01, folder=pathlib.Path("x"))
    t.fit(net, *loaders())
    loaded = Net.load_from_checkpoint(t.run_dir / "checkpoints" / "last.ckpt", lr=0.5)
    assert dict(loaded.hparams) == {"width": 3, "lr": 0.5, "folder": "x"}
    assert equal(loaded.state_dict(), net.state_dict())
    other = Net(width=3)
    other.load_weights(t.run_dir / "checkpoints" / "best.ckpt")
    other.net.load_state_dict(net.net.state_dict())


def test_hooks_and_callback_states_travel(tmp_path):
    class Mine(Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = {"where": tmp_path}

        def on_load_checkpoint(self, checkpoint):
            self.found = checkpoint["mine"]["where"]

    class Counting(lk.Callback):
        count = 0

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

    first = trainer(tmp_path, max_epochs=1, callbacks=[Counting()])
    first.fit(Mine(), *loaders())
    last = first.run_dir / "checkpoints" / "last.ckpt"
    counting, net = Counting(), Mine()
    trainer(tmp_path, max_epochs=2, callbacks=[counting]).fit(net, *loaders(), ckpt_path=last)
    assert net.found == str(tmp_path)
    assert counting.count == 10


def test_another_network_or_weights_alone_cannot_go_on(tmp_path):
    t = trainer(tmp_path, max_epochs=1, callbacks=[ModelCheckpoint(save_weights_only=True)])
    t.fit(Net(), *loaders())
    weights = t.run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match="holds weights only"):
        trainer(tmp_path, max_epochs=2).fit(Net(), *loaders(), ckpt_path=weights)
    t = trainer(tmp_path, max_epochs=1)
    t.fit(Net(), *loaders())
    full = t.run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"of another shape: net\.0\.weight \(file \(6, 4\)"):
        trainer(tmp_path, max_epochs=2).fit(Net(width=9), *loaders(), ckpt_path=full)


def test_the_last_of_this_trainers_own_fit_can_be_continued(tmp_path):
    callback = ModelCheckpoint(tmp_path / "mine", monitor="val_loss")
    first = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    first.fit(Net(), *loaders())
    second = trainer(tmp_path, max_epochs=3, callbacks=[callback])
    history = second.fit(Net(), *loaders(), ckpt_path="last")
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert len([n for n in names(tmp_path / "mine") if n.startswith("step_")]) <= 2


def test_a_new_run_never_touches_the_files_of_the_one_it_continues(tmp_path):
    first = trainer(tmp_path, max_epochs=2)
    first.fit(Net(), *loaders())
    old = {p: p.read_bytes() for p in (first.run_dir / "checkpoints").iterdir()}
    second = trainer(tmp_path, max_epochs=5, gradient_clip_val=9.0)  # another run, by its settings
    second.fit(Net(), *loaders(), ckpt_path="last")
    assert second.run_dir != first.run_dir
    assert {p: p.read_bytes() for p in (first.run_dir / "checkpoints").iterdir()} == old
    assert read_checkpoint(second.run_dir / "checkpoints" / "last.ckpt")["loop"]["epoch"] == 5


def test_a_second_fit_starts_anew(tmp_path):
    callback = ModelCheckpoint(monitor="val_loss")
    t = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    t.fit(Net(lr=1e-3), *loaders())
    first = callback.best_model_path
    t.fit(Net(lr=1.0), *loaders())
    assert callback.best_model_path != first
    assert pathlib.Path(first).exists()
    assert "version_1" in callback.best_model_path


def test_nothing_is_written_where_nothing_shall_be(tmp_path):
    trainer(tmp_path, fast_dev_run=True, callbacks=[ModelCheckpoint(tmp_path / "x")]).fit(
        Net(), *loaders()
    )
    t = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    t.fit(Net(), *loaders())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_factory_among_the_arguments_is_asked_for(tmp_path, caplog):
    class Made(Net):
        def __init__(self, act: type[nn.Module], width: int = 6, lr: float = 0.05):
            super().__init__(width, lr)
            self.act = act()

    t = trainer(tmp_path, max_epochs=1)
    with caplog.at_level(logging.INFO, logger="lightkit"):
        t.fit(Made(nn.GELU), *loaders())
    assert "GELU" not in caplog.text  # nobody needs to know before it is asked for
    path = t.run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"does not hold: act \(torch.*GELU\)\. Pass them"):
        Made.load_from_checkpoint(path)
    assert isinstance(Made.load_from_checkpoint(path, act=nn.GELU).act, nn.GELU)
