"""Where batches come from, how many are taken, and how they reach the step."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightkit as lk
from lightkit.errors import ConfigError, DataError


class Count(lk.TaskModule):
    """Notes the batches that it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.train_seen, self.val_seen, self.test_seen = [], [], []

    def forward(self, x):
        return x * self.weight

    def training_step(self, batch, batch_idx):
        self.train_seen.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.val_seen.append((dataloader_idx, batch))

    def test_step(self, batch, batch_idx):
        self.test_seen.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers(n: int, batch_size: int = 1, **options) -> DataLoader:
    return DataLoader(torch.arange(float(n)), batch_size, **options)


class Stream(IterableDataset):
    def __init__(self, n: int = 5):
        self.n = n

    def __iter__(self):
        return iter(torch.arange(float(self.n)))


@pytest.fixture
def quiet(tmp_path):
    def make(**options) -> lk.Trainer:
        defaults = {
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path / "runs",
        }
        return lk.Trainer(**defaults | options)

    return make


def plain(batches) -> list[float]:
    return torch.cat([b.reshape(-1) for b in batches]).tolist()


# --- sources -------------------------------------------------------------------------------------


class Data(lk.DataModule):
    def __init__(self):
        self.seen = []

    def prepare_data(self):
        self.seen.append("prepare")

    def setup(self, stage):
        self.seen.append(f"setup {stage}")

    def teardown(self, stage):
        self.seen.append(f"teardown {stage}")

    def train_dataloader(self):
        return numbers(3)

    def val_dataloader(self):
        return {"a": numbers(2), "b": numbers(4)}

    def test_dataloader(self):
        return numbers(5)

    def predict_dataloader(self):
        return [numbers(1), numbers(2)]


@pytest.mark.parametrize("how", ["datamodule", "instead of a loader"])
def test_a_data_module(quiet, how):
    data, net, t = Data(), Count(), quiet()
    given = {"datamodule": data} if how == "datamodule" else {"train_dataloaders": data}
    t.fit(net, **given)
    assert data.seen == ["prepare", "setup fit", "teardown fit"]
    assert plain(net.train_seen) == [0, 1, 2]
    assert [i for i, _ in net.val_seen] == [0, 0, 1, 1, 1, 1]
    assert t.num_val_batches == [2, 4]
    assert t.datamodule is data
    t.test(net, datamodule=data)
    assert len(net.test_seen) == 5
    assert [len(batches) for batches in t.predict(net, data)] == [1, 2]
    assert data.seen[3:] == [
        "prepare", "setup test", "teardown test", "prepare", "setup predict", "teardown predict",
    ]  # fmt: skip


def test_loaders_of_the_task(quiet):
    class Own(Count):
        def train_dataloader(self):
            return numbers(3)

        def val_dataloader(self):
            return numbers(2)

    net = Own()
    quiet().fit(net)
    assert (len(net.train_seen), len(net.val_seen)) == (3, 2)
    quiet().fit(net, numbers(1), numbers(1))  # what is passed comes first
    assert (len(net.train_seen), len(net.val_seen)) == (4, 3)


def test_any_object_with_loaders(quiet):
    class Anything:
        def train_dataloader(self):
            return numbers(3)

    net = Count()
    quiet().fit(net, datamodule=Anything())
    assert len(net.train_seen) == 3


def test_any_iterable_of_batches(quiet):
    batches = [torch.tensor([1.0]), torch.tensor([2.0])]
    net = Count()
    for data in (iter([[b] for b in batches]), ([b] for b in batches), [[b] for b in batches]):
        quiet().fit(net, data)
    assert len(net.train_seen) == 6
    assert net.train_seen[0][0] is batches[0]


def test_a_generator_gives_its_batches_once(quiet):
    with pytest.raises(DataError, match="used up"):
        quiet(max_epochs=2).fit(Count(), (batch for batch in [torch.ones(1)]))


def test_an_iterable_dataset_without_a_length(quiet):
    net, t = Count(), quiet(max_epochs=2)
    t.fit(net, DataLoader(Stream(5), 2), DataLoader(Stream(3), 2))
    assert t.num_training_batches is None
    assert t.num_val_batches == [None]
    assert t.global_step == 6
    assert plain(net.train_seen) == [0, 1, 2, 3, 4] * 2
    assert len(net.val_seen) == 4


def test_nested_batches_reach_the_step_as_they_are(quiet):
    Pair = namedtuple("Pair", "x y")

    @dataclass
    class Box:
        x: torch.Tensor

    x = torch.ones(2)
    for batch in (x, (x, x), [x, {"a": x}], {"x": [x]}, Pair(x, "name"), Box(x)):
        net = Count()
        quiet().fit(net, [[batch]] if batch is x else [batch])
        assert type(net.train_seen[0]) is (list if batch is x else type(batch))


def test_an_empty_loader_and_one_that_gives_nothing(quiet):
    with pytest.raises(DataError, match=r"The training loader is empty: its len\(\) is 0"):
        quiet().fit(Count(), numbers(0))
    with pytest.raises(DataError, match="gave no batch at all"):
        quiet().fit(Count(), DataLoader(Stream(0)))
    with pytest.raises(DataError, match="DataLoader"):
        quiet().fit(Count(), TensorDataset(torch.ones(3)))
    with pytest.raises(DataError, match="Training takes one loader, got 2"):
        quiet().fit(Count(), [numbers(1), numbers(2)])
    with pytest.raises(DataError, match="'b' is empty"):
        quiet().fit(Count(), numbers(1), {"a": numbers(1), "b": numbers(0)})


def test_a_validation_loader_without_a_step_for_it(quiet, caplog):
    class Simple(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet().fit(Simple(), numbers(2), numbers(2))
    assert "Simple defines no validation_step" in caplog.text


def test_the_same_loader_twice_is_a_loud_mistake(quiet, caplog):
    loader = numbers(2)
    quiet().fit(Count(), loader, loader)
    assert "is the training loader itself" in caplog.text
    caplog.clear()
    quiet().fit(Count(), loader, numbers(2))
    assert "validation loader" not in caplog.text.lower()


# --- how much ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "taken"), [(3, 3), (100, 8), (0.5, 4), (1.0, 8), (None, 8)])
def test_limits_as_numbers_and_fractions(quiet, limit, taken):
    names = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
    options = dict.fromkeys((*names, "limit_predict_batches"), limit)
    net, t = Count(), quiet(**options)
    t.fit(net, numbers(8), numbers(8))
    t.test(net, numbers(8))
    assert (len(net.train_seen), len(net.val_seen), len(net.test_seen)) == (taken,) * 3
    assert len(t.predict(net, numbers(8))) == taken
    assert t.num_training_batches == taken
    assert (t.num_val_batches, t.num_test_batches, t.num_predict_batches) == (
        [taken],
        [taken],
        [taken],
    )


def test_limits_of_nothing(quiet):
    net = Count()
    quiet(limit_val_batches=0).fit(net, numbers(2), numbers(2))
    quiet(limit_val_batches=0.0).fit(net, numbers(2), numbers(2))
    assert net.val_seen == []
    with pytest.raises(ConfigError, match="limit_train_batches=0 leaves nothing"):
        quiet(limit_train_batches=0).fit(net, numbers(2))
    with pytest.raises(ConfigError, match="limit_test_batches=0 leaves nothing"):
        quiet(limit_test_batches=0).test(net, numbers(2))
    with pytest.raises(ConfigError, match="leaves none of the 2 batches"):
        quiet(limit_train_batches=0.1).fit(net, numbers(2))
    with pytest.raises(ConfigError, match="a fraction, but the loader has no len"):
        quiet(limit_train_batches=0.5).fit(net, DataLoader(Stream()))


def test_a_number_limits_what_has_no_length(quiet):
    net = Count()
    quiet(limit_train_batches=2).fit(net, DataLoader(Stream(5)))
    assert len(net.train_seen) == 2


@pytest.mark.parametrize(("given", "taken"), [(2, 2), (0.25, 2), (1.0, 8)])
def test_overfitting_takes_the_same_batches_in_every_epoch(quiet, given, taken):
    net, t = Count(), quiet(max_epochs=3, overfit_batches=given)
    t.fit(net, numbers(8, shuffle=True), numbers(8, shuffle=False))
    seen = plain(net.train_seen)
    assert len(seen) == 3 * taken
    assert seen[:taken] == seen[taken : 2 * taken] == seen[2 * taken :]
    assert len(net.val_seen) == 3 * taken


@pytest.mark.parametrize("every", [1, 2])
def test_loaders_are_made_anew(quiet, every):
    class Fresh(lk.DataModule):
        made: list = []

        def train_dataloader(self):
            self.made.append("train")
            return numbers(2 + len(self.made) // 2)

        def val_dataloader(self):
            self.made.append("val")
            return numbers(1)

    data, net = Fresh(), Count()
    data.made = []
    t = quiet(max_epochs=4, reload_dataloaders_every_n_epochs=every)
    t.fit(net, datamodule=data)
    assert data.made == ["train", "val"] * (4 // every)
    assert len(net.train_seen) == t.global_step == {1: 2 + 3 + 4 + 5, 2: 2 + 2 + 3 + 3}[every]


def test_loaders_made_anew_may_be_more_and_longer(quiet):
    class Grows(lk.DataModule):
        epoch = -1

        def train_dataloader(self):
            self.epoch += 1
            return numbers(4 * 2**self.epoch)

        def val_dataloader(self):
            return [numbers(1)] * (self.epoch + 1)

    class Looks(lk.Callback):
        def on_validation_end(self, trainer, task):
            places.append((trainer.current_epoch, trainer.state.batch_idx))

    class Logs(Count):
        def validation_step(self, batch, batch_idx):
            return 1.0

    places = []
    t = quiet(
        max_epochs=2, reload_dataloaders_every_n_epochs=1, val_check_interval=0.5, callbacks=Looks()
    )
    history = t.fit(Logs(), datamodule=Grows())
    assert places == [(0, 2), (0, 4), (1, 4), (1, 8)]
    assert t.num_val_batches == [1, 1]
    assert [{k for k in row if k.startswith("val")} for row in history] == [
        {"val_loss"},
        {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"},
    ]


def test_only_what_can_be_made_anew_is(quiet):
    class TrainOnly(lk.DataModule):
        def train_dataloader(self):
            return numbers(2)

    net = Count()
    t = quiet(max_epochs=3, reload_dataloaders_every_n_epochs=1)
    t.fit(net, None, numbers(2), datamodule=TrainOnly())
    assert len(net.val_seen) == 6
    with pytest.raises(ConfigError, match="cannot be made anew"):
        t.fit(net, numbers(2))


# --- transfer ------------------------------------------------------------------------------------


class Hooks:
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        assert device.type == "cpu"
        return batch * 2

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch + 100 * dataloader_idx


def test_the_transfer_hooks_run_in_their_order_on_the_task(quiet):
    class Own(Hooks, Count):
        pass

    net = Own()
    quiet().fit(net, numbers(2), [numbers(1), numbers(1)])
    assert plain(net.train_seen) == [2, 4]
    assert [float(b) for _, b in net.val_seen] == [2, 102]


def test_and_on_the_data_module(quiet):
    class Own(Hooks, lk.DataModule):
        def train_dataloader(self):
            return numbers(2)

    net = Count()
    quiet().fit(net, datamodule=Own())
    assert plain(net.train_seen) == [2, 4]


@pytest.mark.parametrize("own_move", [False, True])
def test_precision_64_converts_the_floats_of_nested_batches(quiet, own_move):
    class Own(Count):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    net = Own() if own_move else Count()
    batch = {"x": torch.ones(2), "index": torch.ones(2, dtype=torch.long), "name": "a"}
    quiet(precision=64).fit(net, [batch])
    seen = net.train_seen[0]
    assert seen["x"].dtype is torch.float64
    assert seen["index"].dtype is torch.int64
    assert seen["name"] == "a"
    assert net.weight.dtype is torch.float64
    assert batch["x"].dtype is torch.float32


def test_batches_are_moved_to_the_device(quiet, monkeypatch):
    monkeypatch.setattr("lightkit.opening.resolve_device", lambda *_, **__: torch.device("meta"))
    net = Count()
    quiet(terminate_on_nan=False, fused=False).predict(
        net, [[torch.ones(2), {"a": [torch.ones(1)]}]]
    )
    assert net.weight.device.type == "meta"


def test_tensors_of_predict_are_on_the_device(quiet, monkeypatch):
    monkeypatch.setattr("lightkit.opening.resolve_device", lambda *_, **__: torch.device("meta"))

    class Look(Count):
        def predict_step(self, batch):
            return batch

    [x, rest] = quiet().predict(Look(), [[torch.ones(2), {"a": [torch.ones(1)]}]])[0]
    assert x.device.type == "meta"
    assert rest["a"][0].device.type == "meta"
