"""A fit that goes on from a checkpoint is the fit that never stopped, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightkit as lk
from lightkit.callbacks import EarlyStopping
from lightkit.checkpoint import read_checkpoint
from lightkit.errors import CheckpointError


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("noise", float(np.random.rand()) + random.random())
        return nn.functional.mse_loss(self.net(x + 0.1 * torch.randn_like(x)), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        torch.rand(1)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        plans = [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7), "interval": "step"},
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
        ]
        return {"optimizer": optimizer, "lr_scheduler": plans, "monitor": "val_loss"}


class Save(lk.Callback):
    """Writes a checkpoint at every save point."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def on_save_point(self, trainer, task):
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count:02d}.ckpt")


def loaders(samples: int = 38):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoader(data, 4, shuffle=True), DataLoader(TensorDataset(*data[:9]), 4, shuffle=True)


def run(tmp_path, *, seed=3, ckpt_path=None, train=None, val=None, **options):
    lk.seed_everything(seed, verbose=False)
    defaults = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    net, t = Net(), lk.Trainer(**defaults | options)
    given = loaders()
    train = given[0] if train is None else train
    t.fit(net, train, given[1] if val is None else val, ckpt_path=ckpt_path)
    return net, t


def same(first, second) -> None:
    (net, one), (other, two) = first, second
    assert one.state.epoch == two.state.epoch
    assert one.state.global_step == two.state.global_step
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    left, right = (t.optimizers[0].state_dict() for t in (one, two))
    assert left["param_groups"] == right["param_groups"]
    for key, state in left["state"].items():
        assert all(torch.equal(v, right["state"][key][k]) for k, v in state.items())
    for a, b in zip(one.lr_schedulers, two.lr_schedulers, strict=True):
        assert a.scheduler.state_dict() == b.scheduler.state_dict()
    assert [untimed(row) for row in one.history] == [untimed(row) for row in two.history]


def untimed(row):
    return {k: v for k, v in row.items() if k != "time"}


def rng_now():
    return torch.rand(2).tolist(), np.random.rand(), random.random()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"val_check_interval": 4},
        {"val_check_interval": 4, "check_val_every_n_epoch": None, "log_every_n_steps": 3},
    ],
    ids=["plain", "accumulated", "validated within", "validated across"],
)
def test_from_every_place_it_ends_the_same(tmp_path, options):
    save = Save(tmp_path)
    options = {"max_epochs": 2} | options
    whole = run(tmp_path, callbacks=save, **options)
    drawn = rng_now()
    places = sorted(tmp_path.glob("*.ckpt"))
    assert len(places) == whole[1].global_step
    for path in places:
        rest = run(tmp_path, seed=99, ckpt_path=path, **options)
        assert rng_now() == drawn or path is places[-1], path  # nothing is left, nothing drawn
        same(whole, rest)


@pytest.mark.parametrize("steps", [20, 13])
def test_loaders_with_generators_of_their_own_go_on(tmp_path, steps):
    def fit(**options):
        train, val = (
            DataLoader(
                plain.dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(number)
            )
            for number, plain in enumerate(loaders())
        )
        save = Save(tmp_path / str(options.get("seed", options.get("max_steps"))))
        save.folder.mkdir()
        found = run(tmp_path, train=train, val=val, callbacks=save, **options)
        return found, save.folder, [loader.generator.get_state() for loader in (train, val)]

    whole, folder, states = fit(max_epochs=4)
    rest, _, again = fit(max_epochs=4, seed=99, ckpt_path=folder / f"{steps:02d}.ckpt")
    same(whole, rest)
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
    _, folder, _ = fit(max_epochs=-1, max_steps=steps)
    rest, _, _ = fit(max_epochs=4, seed=98, ckpt_path=folder / f"{steps:02d}.ckpt")
    same(whole, rest)


def test_a_loader_that_lost_its_generator(tmp_path, caplog):
    data = loaders()[0].dataset
    train = DataLoader(data, 4, shuffle=True, generator=torch.Generator())
    run(tmp_path, train=train, max_epochs=1, callbacks=Save(tmp_path))
    run(tmp_path, max_epochs=2, ckpt_path=tmp_path / "10.ckpt")
    assert "the states of 1 generators of loaders, but the loaders have 0" in caplog.text


@pytest.mark.parametrize("steps", [7, 10, 13])
def test_a_run_that_ended_within_an_epoch_is_continued(tmp_path, steps):
    whole = run(tmp_path)
    first = run(tmp_path, max_epochs=-1, max_steps=steps, enable_checkpointing=True)
    assert first[1].global_step == steps
    assert first[1].history[-1]["step"] == steps
    last = first[1].checkpoint_callback.last_model_path
    assert read_checkpoint(last)["loop"]["global_step"] == steps
    same(whole, run(tmp_path, seed=99, ckpt_path=last))


def test_twice_in_a_row(tmp_path):
    whole = run(tmp_path)
    path = None
    for steps in (4, 12, 17):
        part = run(
            tmp_path, seed=99 if path else 3, max_epochs=-1, max_steps=steps, enable_checkpointing=True,
            ckpt_path=path,
        )  # fmt: skip
        path = part[1].checkpoint_callback.last_model_path
    same(whole, run(tmp_path, ckpt_path=path))


def test_a_stream_without_a_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            data = loaders()[0].dataset
            return (data[i] for i in range(len(data)))

    train = DataLoader(Stream(), 4)
    save = Save(tmp_path)
    whole = run(tmp_path, train=train, callbacks=save, max_epochs=2)
    for path in sorted(tmp_path.glob("*.ckpt"))[::4]:
        same(whole, run(tmp_path, seed=99, train=train, ckpt_path=path, max_epochs=2))


def test_the_trainers_own_names_for_checkpoints(tmp_path):
    net, t = run(tmp_path, max_epochs=2, enable_checkpointing=True)
    _, two = run(tmp_path, max_epochs=3, enable_checkpointing=True, ckpt_path="last")
    assert [row["epoch"] for row in two.history] == [1, 2, 3]
    assert two.run_dir == t.run_dir  # the newest of its run: it goes on there
    other = run(tmp_path, max_epochs=1, enable_checkpointing=True)[1]
    assert other.run_dir != t.run_dir
    history = t.fit(net, *loaders(), ckpt_path="best")  # its own, not the newest of all folders
    assert history[-1]["epoch"] == 2
    assert t.global_step == 20


def test_sanity_is_not_checked_again_and_the_start_says_where_it_goes_on(tmp_path, capsys):
    class Look(lk.Callback):
        def on_sanity_check_start(self, trainer, task):
            seen.append("sanity")

        def on_train_epoch_start(self, trainer, task):
            seen.append(trainer.current_epoch)

    seen = []
    save = Save(tmp_path)
    run(tmp_path, max_epochs=1, callbacks=save)
    run(tmp_path, max_epochs=2, callbacks=Look(), ckpt_path=tmp_path / "10.ckpt")
    assert seen == [1]
    said = capsys.readouterr().out
    assert f"resumed:  {tmp_path}/10.ckpt (10 steps, 1 epoch done)" in said
    seen.clear()
    run(tmp_path, max_epochs=2, callbacks=Look(), ckpt_path=tmp_path / "04.ckpt")
    assert seen == [1]  # an epoch that is continued does not start
    assert "(4 steps, 0 epochs and 4 batches done)" in capsys.readouterr().out


def test_nothing_is_left_to_train(tmp_path, caplog):
    save = Save(tmp_path)
    run(tmp_path, max_epochs=1, callbacks=save)
    _, t = run(tmp_path, max_epochs=1, ckpt_path=tmp_path / "10.ckpt")
    assert t.global_step == 10
    assert len(t.history) == 1
    assert "nothing to train. Raise max_epochs or max_steps" in caplog.text


def test_callbacks_go_on_too(tmp_path):
    def stopper():
        return EarlyStopping(monitor="val_loss", patience=1, min_delta=100.0)

    save = Save(tmp_path)
    _, whole = run(tmp_path, max_epochs=5, callbacks=[stopper(), save])
    assert whole.current_epoch == 2
    _, rest = run(tmp_path, max_epochs=5, callbacks=stopper(), ckpt_path=tmp_path / "10.ckpt")
    assert rest.current_epoch == 2


def test_saving_within_a_group_is_refused(tmp_path):
    class Early(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.raises(lk.LightkitError, match="on_save_point"):
        run(tmp_path, callbacks=Early(), accumulate_grad_batches=2)


def test_a_checkpoint_of_another_network(tmp_path):
    save = Save(tmp_path)
    run(tmp_path, max_epochs=1, callbacks=save)
    other = Net()
    other.net[3] = nn.Linear(6, 2)
    t = lk.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(CheckpointError, match=r"net\.3"):
        t.fit(other, *loaders(), ckpt_path=tmp_path / "10.ckpt")
    with pytest.raises(CheckpointError, match=r"missing\.ckpt"):
        t.fit(Net(), *loaders(), ckpt_path=tmp_path / "missing.ckpt")


def test_weights_alone_are_loaded_for_an_evaluation(tmp_path):
    save = Save(tmp_path)
    net, t = run(tmp_path, max_epochs=1, callbacks=save)
    fresh = Net()
    plain = DataLoader(loaders()[0].dataset, 4)
    expected = t.validate(net, plain, verbose=False)
    found = t.validate(fresh, plain, ckpt_path=tmp_path / "10.ckpt", verbose=False)
    assert found == expected
    assert torch.equal(fresh.net[0].weight, net.net[0].weight)


def test_the_time_of_earlier_parts_counts(tmp_path):
    save = Save(tmp_path)
    run(tmp_path, max_epochs=1, callbacks=save)
    saved = torch.load(tmp_path / "10.ckpt", weights_only=True)
    saved["loop"]["seconds"] = 3600.0
    torch.save(saved, tmp_path / "long.ckpt")
    _, t = run(tmp_path, max_time="1 hour", ckpt_path=tmp_path / "long.ckpt")
    assert t.global_step == 10


class Unfreezes(Net):
    """Trains its last layer alone, and all of it from the second epoch on."""

    def on_fit_start(self):
        self.net[0].requires_grad_(False)
        self.net[1].eval()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.net[1].train()


def test_what_hooks_have_unfrozen_stays_so(tmp_path, quiet):
    def fit(**options):
        lk.seed_everything(options.pop("seed", 3), verbose=False)
        net = Unfreezes()
        t = quiet(max_epochs=4, callbacks=options.pop("callbacks", None))
        t.fit(net, *loaders(), **options)
        return net, t

    whole = fit(callbacks=Save(tmp_path))
    assert whole[0].net[0].weight.requires_grad
    for step in (5, 13, 20, 25, 33):
        rest = fit(seed=99, ckpt_path=tmp_path / f"{step:02d}.ckpt")
        same(whole, rest)
        assert rest[0].net[0].weight.requires_grad


def test_groups_that_come_while_a_checkpoint_is_loaded_are_fused_too(tmp_path, quiet):
    class Grows(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net[3].parameters(), lr=0.05)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.grow()

        def on_load_checkpoint(self, checkpoint):
            if checkpoint["loop"]["epoch"]:
                self.grow()

        def grow(self):
            self.trainer.optimizers[0].add_param_group({"params": self.net[0].parameters()})

    def fit(**options):
        lk.seed_everything(options.pop("seed", 3), verbose=False)
        net, t = Grows(), quiet(max_epochs=3, callbacks=options.pop("callbacks", None))
        t.fit(net, *loaders(), **options)
        return net, t

    whole = fit(callbacks=Save(tmp_path))
    for path in (tmp_path / "14.ckpt", tmp_path / "20.ckpt"):
        same(whole, fit(seed=99, ckpt_path=path))


def test_loaders_made_for_each_epoch_know_the_epoch_that_goes_on(tmp_path, quiet):
    class Data(lk.DataModule):
        def train_dataloader(self):
            return DataLoader(loaders()[0].dataset, 3 + self.trainer.current_epoch, shuffle=True)

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    def fit(**options):
        lk.seed_everything(options.pop("seed", 3), verbose=False)
        net, callbacks = Plain(), options.pop("callbacks", None)
        t = quiet(max_epochs=3, reload_dataloaders_every_n_epochs=1, callbacks=callbacks)
        t.fit(net, datamodule=Data(), **options)
        return net, t

    whole = fit(callbacks=Save(tmp_path))
    for path in sorted(tmp_path.glob("*.ckpt"))[5::6]:
        same(whole, fit(seed=99, ckpt_path=path))
