"""The learning rate finder and the batch size finder: what they find, and that nothing remains."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.differences import compare
from lightkit.errors import ConfigError, UsageError
from lightkit.tuning import RateSweep
from tests.distributed.harness import torchrun


def dataset(samples: int = 48) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader(**options) -> DataLoader:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(dataset(), 4, shuffle=True, generator=generator, **options)


class Net(lk.TaskModule):
    """With everything that a trial might leave traces in: dropout, batch norm, metric, attribute."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1)
        )
        self.seen = 0

    def training_step(self, batch, batch_idx):
        self.seen += 1
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("own", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": plateau}


def by_hand(task: Net, batches, steps: int, low: float, high: float) -> list[float]:
    """The sweep as one would write it."""
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9)
    losses = []
    while len(losses) < steps:
        for x, y in batches:
            optimizer.param_groups[0]["lr"] = low * math.exp(
                math.log(high / low) / (steps - 1) * len(losses)
            )
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(task.layers(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                break
    return losses


def test_it_is_the_ordinary_training_with_rising_rates(quiet):
    lk.seed_everything(1, verbose=False)
    task = Net()
    other = copy.deepcopy(task)
    lk.seed_everything(2, verbose=False)
    found = lk.lr_find(quiet(fused=False), task, loader(), min_lr=1e-4, max_lr=0.1, steps=30)
    lk.seed_everything(2, verbose=False)
    assert found.losses == by_hand(other, loader(), 30, 1e-4, 0.1)
    assert len(found.rates) == 30
    assert found.rates[0] == pytest.approx(1e-4)
    assert found.rates[-1] == pytest.approx(0.1)
    ratios = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * 29)


def everything(trainer, task, history) -> dict:
    return {
        "weights": task.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "history": [{k: v for k, v in row.items() if k != "time"} for row in history],
        "seen": task.seen,
        "random": lk.rng.rng_state(),
    }


class Stream(torch.utils.data.IterableDataset):
    """A stream that knows its place."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        for _ in range(40):
            self.next += 1
            x = torch.full((4,), float(self.next % 7))
            yield x, x[:1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


LOADERS = {
    "shuffled": loader,
    "workers": lambda: loader(num_workers=1, persistent_workers=True),
    "global": lambda: DataLoader(dataset(), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_fit_gives_the_same_bits_with_and_without_it_before(quiet, tmp_path, kind):
    ends = []
    for finds in (True, False):
        lk.seed_everything(5, verbose=False)
        task, train, val = Net(), LOADERS[kind](), DataLoader(dataset(8), 4)
        logger = lk.loggers.CSVLogger(tmp_path / f"{kind}_{finds}")
        trainer = quiet(max_epochs=2, logger=logger, gradient_clip_val=1.0, callbacks=[])
        if finds:
            before = copy.deepcopy(task.state_dict())
            found = lk.lr_find(trainer, task, train, min_lr=1e-5, max_lr=1.0, steps=15)
            assert len(found.losses) > 3
            assert lk.scale_batch_size(trainer, task, sized, most=4, steps=1) == 4
            assert list(compare(before, task.state_dict(), "", [])) == []
            assert not list(tmp_path.iterdir())
            assert (trainer.global_step, trainer.history, dict(trainer.callback_metrics)) == (
                0,
                [],
                {},
            )
            assert task._link.trainer is None
        history = trainer.fit(task, train, val)
        ends.append(everything(trainer, task, history))
    assert list(compare(*ends, "", [])) == []


def test_the_data_of_the_task_and_of_a_data_module_are_put_back(quiet):
    class Data(lk.DataModule):
        def __init__(self):
            super().__init__()
            self.batch_size, self.generator = 4, torch.Generator().manual_seed(2)

        def train_dataloader(self):
            return DataLoader(dataset(), self.batch_size, shuffle=True, generator=self.generator)

    data = Data()
    state = data.generator.get_state()
    lk.lr_find(quiet(), Net(), datamodule=data, steps=5)
    lk.lr_find(quiet(), Net(), data, steps=5)
    assert lk.scale_batch_size(quiet(), Net(), data, most=20, mode="binsearch", steps=2) == 20
    assert torch.equal(data.generator.get_state(), state)
    assert (data.batch_size, data.trainer) == (4, None)


def test_it_stops_where_the_loss_explodes_and_suggests_the_steepest_slope(quiet):
    found = lk.lr_find(quiet(terminate_on_nan=True), Net(), loader(), steps=60, max_lr=1e6)
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 60
    assert all(map(math.isfinite, found.losses))
    slopes = torch.gradient(torch.tensor(found.smoothed[10:-1], dtype=torch.float64))[0]
    assert found.suggestion() == found.rates[10 + int(slopes.argmin())]
    mean = 0.0
    for number, (loss, smoothed) in enumerate(zip(found.losses, found.smoothed, strict=True), 1):
        mean = 0.98 * mean + 0.02 * loss
        assert smoothed == pytest.approx(mean / (1 - 0.98**number))


def test_groups_keep_their_proportions_and_schedules_are_left_out(quiet):
    rows = []

    class Two(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(lk.param_groups(list(self.layers), 0.1, decay=4.0))
            return [optimizer], [OneCycleLR(optimizer, 0.1, total_steps=3)]

        def on_before_optimizer_step(self, optimizer):
            rows.append([group["lr"] for group in optimizer.param_groups])

    class Even(Two):
        def configure_optimizers(self):
            return torch.optim.SGD(lk.param_groups(list(self.layers), 0.1, decay=4.0))

    found = lk.lr_find(quiet(accumulate_grad_batches=2), Even(), loader(), steps=8, max_lr=0.1)
    assert [row[-1] for row in rows] == pytest.approx(found.rates)
    assert all(row[1] == pytest.approx(4 * row[0]) for row in rows)
    assert len(lk.lr_find(quiet(), Two(), loader(), steps=8, max_lr=0.1).rates) == 8


def test_a_schedule_that_begins_at_zero_or_asks_for_the_epochs(quiet):
    rates = []

    class Rising(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [LambdaLR(optimizer, lambda step: step / 10)]

        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    class Asks(Rising):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            epochs = self.trainer.max_epochs
            return [optimizer], [OneCycleLR(optimizer, 0.1, epochs=epochs, steps_per_epoch=12)]

    for kind in (Rising, Asks):
        rates.clear()
        found = lk.lr_find(quiet(max_epochs=2), kind(), loader(), steps=14, max_lr=0.1)
        assert rates == pytest.approx(found.rates)
        assert len(rates) == 14


def test_what_changes_the_training_takes_part_as_a_copy(quiet):
    learning = []

    class Watched(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            learning.append(sum(p.requires_grad for p in self.parameters()))

    class Stops(lk.Callback):
        def on_train_start(self, trainer, task):
            raise AssertionError("it takes no part")

    callback = lk.callbacks.Unfreeze({1: "layers.0"})
    trainer = quiet(callbacks=[callback, Stops(), lk.callbacks.EarlyStopping("val_loss")])
    added = []
    trainer.add_to_loss(lambda trainer, task: added.append(1) or 0.0 * task.layers[3].weight.sum())
    lk.lr_find(trainer, Watched(), loader(), steps=15, max_lr=0.1)
    assert learning == [4] * 12 + [6] * 3
    assert len(added) == 15
    assert callback._done == 0


def test_manual_optimization(quiet):
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss}

    class Silent(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    class Moves(Manual):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.lr_schedulers().step()
            rates.append(self.optimizers().param_groups[0]["lr"])
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5)}]

    rates = []
    assert len(lk.lr_find(quiet(), Manual(), loader(), steps=6, max_lr=0.1).losses) == 6
    found = lk.lr_find(quiet(), Moves(), loader(), steps=6, max_lr=0.1)
    assert rates == pytest.approx(found.rates)
    with pytest.raises(UsageError, match="needs the loss of every step"):
        lk.lr_find(quiet(), Silent(), loader(), steps=6)


def test_plot(quiet, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    rates = [10 ** (i / 10 - 4) for i in range(40)]
    losses = [3.0 - 2 / (1 + math.exp(-(i - 20) / 2)) for i in range(40)]
    found = RateSweep(rates, losses, losses)
    assert found.suggestion() == pytest.approx(rates[20])
    figure = found.plot(tmp_path / "rates.png")
    assert figure.axes[0].get_xscale() == "log"
    assert (tmp_path / "rates.png").stat().st_size > 1000
    RateSweep(rates[:4], losses[:4], losses[:4]).plot()


def test_no_suggestion_is_an_error_not_a_number():
    up = [float(i) for i in range(30)]
    with pytest.raises(UsageError, match="fell at no rate between"):
        RateSweep(up, up, up).suggestion()
    with pytest.raises(UsageError, match="took 5 steps"):
        RateSweep(up[:5], up[:5], up[:5]).suggestion()
    with pytest.raises(ConfigError, match="skip_begin=-5"):
        RateSweep(up, up[::-1], up[::-1]).suggestion(skip_begin=-5)


def test_what_cannot_be_tried_is_refused(quiet):
    class Inside(lk.Callback):
        def on_train_start(self, trainer, task):
            lk.lr_find(trainer, task, loader())

    class Sealed(Net):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with pytest.raises(UsageError, match="in the middle of fit"):
        quiet(callbacks=[Inside()]).fit(Net(), loader())
    with pytest.raises(UsageError, match="cannot be copied: no copies"):
        lk.lr_find(quiet(), Sealed(), loader())
    with pytest.raises(UsageError, match="only once"):
        lk.lr_find(quiet(), Net(), iter(loader()))
    for wrong in (
        {"min_lr": 0.0},
        {"min_lr": 2.0, "max_lr": 1.0},
        {"steps": 2},
        {"smoothing": 1.0},
        {"steps": "9"},
        {"steps": 9.5},
        {"min_lr": "small"},
        {"stop_at": 1},
    ):
        with pytest.raises(ConfigError, match="is not possible"):
            lk.lr_find(quiet(), Net(), loader(), **wrong)
    with pytest.raises(UsageError, match="First comes the trainer"):
        lk.lr_find(Net(), quiet(), loader())
    with pytest.raises(UsageError, match="a TaskModule is needed, got Linear"):
        lk.lr_find(quiet(), nn.Linear(4, 1), loader())


def test_what_would_go_on_for_ever_or_find_nothing_is_refused(quiet):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None

    class Fixed(Net):
        def configure_optimizers(self):
            return None

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset())

    with pytest.raises(UsageError, match="needs the loss of every step"):
        lk.lr_find(quiet(), Skips(), loader(), steps=3)
    with pytest.raises(UsageError, match="Fixed has no optimizer"):
        lk.lr_find(quiet(), Fixed(), loader())
    with pytest.raises(UsageError, match="has no length.*most="):
        lk.scale_batch_size(quiet(), Net(), lambda size: DataLoader(Stream(), size), steps=1)
    found = lk.scale_batch_size(quiet(), Net(), lambda n: DataLoader(Stream(), n), most=8, steps=1)
    assert found == 8


def test_it_puts_everything_back_also_when_a_step_fails(quiet):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    train, task = loader(), Fails()
    before, state, level = (
        lk.rng.rng_state(),
        train.generator.get_state(),
        logging.getLogger("lightkit").level,
    )
    with pytest.raises(ZeroDivisionError):
        lk.lr_find(quiet(), task, train)
    assert torch.equal(train.generator.get_state(), state)
    assert list(compare(before, lk.rng.rng_state(), "", [])) == []
    assert logging.getLogger("lightkit").level == level


# --- the batch size ------------------------------------------------------------------------------


class Hungry(Net):
    """Memory ends above a batch of so many samples."""

    room = 21
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory")
    tried: list[int] = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.tried.append(len(batch[0]))
        if len(batch[0]) > self.room:
            raise self.error
        return super().training_step(batch, batch_idx)


def sized(size: int) -> DataLoader:
    return DataLoader(dataset(), size, shuffle=True)


@pytest.mark.parametrize(
    ("mode", "start", "most", "wanted", "tried"),
    [
        ("power", 2, None, 16, [2, 4, 8, 16, 32]),
        ("binsearch", 8, None, 21, [8, 16, 32, 24, 20, 22, 21]),
        ("power", 3, 12, 12, [3, 6, 12]),
        ("binsearch", 3, 14, 14, [3, 6, 12, 14]),
        ("power", 8, 10, 8, [8]),
    ],
)
def test_the_largest_batch_that_fits(quiet, mode, start, most, wanted, tried):
    Hungry.tried.clear()
    found = lk.scale_batch_size(
        quiet(), Hungry(), sized, mode=mode, start=start, most=most, steps=1
    )
    assert (found, Hungry.tried) == (wanted, tried)


def test_the_data_set_is_a_limit_too(quiet, monkeypatch):
    monkeypatch.setattr(Hungry, "room", 1000)
    Hungry.tried.clear()
    assert lk.scale_batch_size(quiet(), Hungry(), sized, start=16, steps=1) == 32
    assert lk.scale_batch_size(quiet(), Hungry(), sized, mode="binsearch", start=32, steps=1) == 48
    size = lk.scale_batch_size(
        quiet(), Hungry(), sized, mode="binsearch", start=32, most=500, steps=1
    )
    assert size == max(Hungry.tried) == 48


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_the_ways_in_which_memory_ends(quiet, monkeypatch, error):
    monkeypatch.setattr(Hungry, "error", error)
    assert lk.scale_batch_size(quiet(), Hungry(), sized, start=16, steps=1) == 16


def test_other_errors_and_impossible_things_are_told(quiet, monkeypatch):
    with pytest.raises(UsageError, match="Not even a batch size of 32"):
        lk.scale_batch_size(quiet(), Hungry(), sized, start=32)
    with pytest.raises(UsageError, match="lambda size: DataLoader"):
        lk.scale_batch_size(quiet(), Hungry(), sized(4))
    with pytest.raises(ConfigError, match="Did you mean 'power'"):
        lk.scale_batch_size(quiet(), Hungry(), sized, mode="powers")
    for start in (0, 2.0, "2"):
        with pytest.raises(ConfigError, match=f"start={start!r}"):
            lk.scale_batch_size(quiet(), Hungry(), sized, start=start)
    monkeypatch.setattr(Hungry, "error", RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        lk.scale_batch_size(quiet(), Hungry(), sized)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="one process"):
        lk.scale_batch_size(quiet(), Hungry(), sized)


# --- several ranks -------------------------------------------------------------------------------


def test_two_ranks_find_the_same_and_what_one_process_finds(tmp_path):
    from tests.distributed import scenes_finetuning as scenes

    first, second = torchrun("tests.distributed.scenes_finetuning:finding", 2, tmp_path, world=2)
    alone = scenes.finding(1)
    assert first == second
    assert first["rates"] == alone["rates"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["same fit"]
    assert alone["same fit"]
