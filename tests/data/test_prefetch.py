"""One batch ahead: beside a stream that is made up here, so that everything but CUDA is tried."""

from __future__ import annotations

import os
import signal
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

import lightkit as lk
from lightkit import feeds
from lightkit.data import BatchStream, Feed
from lightkit.data.prefetch import Ahead, lane_of, with_tensors
from lightkit.errors import ConfigError, DataError
from tests.test_resume_loaders import Net, Noisy, StatefulStream, check, fit, own, tensors

#: A DataLoader says that there is nothing to pin memory for.
NO_PIN = pytest.mark.filterwarnings("ignore:.*pin_memory. argument is set as true")


class SlowLane:
    """Its copies hold nonsense until they arrive."""

    def __init__(self) -> None:
        self.sent, self.on_the_way = 0, []

    def send(self, batch: Any) -> Any:
        self.sent += 1

        def begun(tensor: torch.Tensor) -> torch.Tensor:
            copy = torch.full_like(tensor, 1)
            self.on_the_way.append((copy, tensor))
            return copy

        return with_tensors(batch, begun)

    def arrive(self) -> None:
        for copy, tensor in self.on_the_way:
            copy.copy_(tensor)
        self.on_the_way.clear()


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[SlowLane]:
    """Gives every loader of a run a lane; returns those that were made."""
    made: list[SlowLane] = []

    def lane(device: torch.device) -> SlowLane:
        made.append(SlowLane())
        return made[-1]

    monkeypatch.setattr(feeds, "lane_of", lane)
    return made


# --- one batch ahead -------------------------------------------------------------------------------


def reading(log: list[int], length: int = 4, fails: int = -1) -> Any:
    for number in range(length):
        log.append(number)
        if number == fails:
            raise ValueError("once")
        yield torch.tensor([number])


def test_one_batch_is_ahead_and_has_arrived_when_it_is_used() -> None:
    log: list[int] = []
    lane = SlowLane()
    ahead = Ahead(reading(log), lane)
    assert log == []  # nothing before its first batch is asked for
    for number in range(4):
        batch = next(ahead)
        assert log == [*range(min(number + 2, 4))]
        assert batch.tolist() == [number]
        assert all(copy.tolist() == [1] for copy, _ in lane.on_the_way)
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_is_read_than_is_used(most: int) -> None:
    log: list[int] = []
    ahead = Ahead(reading(log), SlowLane(), most)
    found = [int(batch) for batch in ahead]
    assert found == log == [*range(most)]


def test_an_error_comes_with_its_batch() -> None:
    log: list[int] = []
    ahead = Ahead(reading(log, fails=2), SlowLane())
    assert [int(next(ahead)), int(next(ahead))] == [0, 1]
    assert log == [0, 1, 2]
    with pytest.raises(ValueError, match="once") as caught:
        next(ahead)
    assert caught.traceback[-1].name == "reading"  # its own place


def test_leaving_a_pass_lets_go_of_the_batch_ahead() -> None:
    lane, log = SlowLane(), []
    feed = Feed([torch.tensor([i]) for i in range(4)])
    feed.lane = lane
    stream = BatchStream(feed.loader, feed=feed)
    stream.fetch()
    assert lane.on_the_way
    stream.close()
    assert not lane.on_the_way
    assert stream.fetched == 1
    del log


def test_any_nesting_is_sent_and_what_moves_by_itself_is_not() -> None:
    Pair = namedtuple("Pair", "x y")
    packed = pack_sequence([torch.ones(2)])
    batch = {"a": [torch.ones(1), "word"], "b": Pair(torch.ones(1), 3), "c": packed}
    found = with_tensors(batch, lambda tensor: tensor + 1)
    assert found["a"][0].item() == found["b"].x.item() == 2
    assert found["a"][1] == "word"
    assert found["b"].y == 3
    assert found["c"] is packed
    assert batch["a"][0].item() == 1
    assert with_tensors(batch, lambda tensor: tensor) is batch


def test_the_cpu_has_no_lane() -> None:
    assert lane_of(torch.device("cpu")) is None


# --- in a fit --------------------------------------------------------------------------------------


def noisy(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, **{"shuffle": True, "pin_memory": True} | options)


def replacing() -> DataLoader[Any]:
    sampler = RandomSampler(range(22), replacement=True, num_samples=30, generator=own())
    return noisy(shuffle=False, sampler=sampler)


#: Loaders whose ``next`` draws nothing in this process.
STEADY = {
    "tensors": lambda: tensors(22, pin_memory=True),
    "tensors with a generator": lambda: tensors(22, pin_memory=True, generator=own()),
    "workers": lambda: noisy(num_workers=1),
    "persistent workers": lambda: noisy(
        num_workers=2, persistent_workers=True, generator=own(), prefetch_factor=1
    ),
}
DRAWING = {
    "in this process": noisy,
    "with a generator": lambda: noisy(generator=own()),
    "replacing": replacing,
}


@NO_PIN
@pytest.mark.parametrize("kind", STEADY)
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}], ids=["whole", "limited"])
def test_by_default_no_bit_changes(tmp_path: Any, lanes: Any, kind: str, options: Any) -> None:
    val = lambda: tensors(9, pin_memory=True)  # noqa: E731
    net, found = fit(tmp_path, STEADY[kind](), val(), **options)
    sent = sum(lane.sent for lane in lanes)
    assert sent == 3 * (4 if options else 6) + 3 * 3
    wanted_net, wanted = fit(tmp_path, STEADY[kind](), val(), prefetch=False, **options)
    assert sum(lane.sent for lane in lanes) == sent
    assert net.seen == wanted_net.seen
    assert found == wanted


@NO_PIN
@pytest.mark.parametrize("kind", STEADY)
def test_a_run_goes_on_from_every_batch(tmp_path: Any, lanes: Any, kind: str) -> None:
    def make() -> Any:
        return STEADY[kind](), noisy()

    check(tmp_path, make, 1 if "tensors" in kind else 4, accumulate_grad_batches=2, max_epochs=2)
    check(tmp_path, make, 3, limit_train_batches=5, max_epochs=2, val_check_interval=2)
    assert sum(lane.sent for lane in lanes) > 30


@NO_PIN
@pytest.mark.parametrize("kind", DRAWING)
def test_a_run_goes_on_where_reading_draws(tmp_path: Any, lanes: Any, kind: str) -> None:
    """With ``prefetch=True``: a save holds the states in which the batch ahead was read, too."""
    check(tmp_path, lambda: (DRAWING[kind](), noisy()), prefetch=True, max_epochs=2)
    check(tmp_path, lambda: (DRAWING[kind](),), 2, prefetch=True, limit_train_batches=4)
    assert sum(lane.sent for lane in lanes) > 50
    seen = fit(tmp_path, DRAWING[kind]())[0].seen
    assert seen[:6] == fit(tmp_path, DRAWING[kind](), prefetch=True)[0].seen[:6]  # the same samples


@NO_PIN
def test_reading_that_draws_stays_in_its_turn_by_default(tmp_path: Any, lanes: Any) -> None:
    found = fit(tmp_path, noisy(), noisy())
    assert sum(lane.sent for lane in lanes) == 0
    wanted = fit(tmp_path, noisy(), noisy(), prefetch=False)
    assert (found[0].seen, found[1]) == (wanted[0].seen, wanted[1])


class Keeps(Net):
    """Takes down what it sees as a whole."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[1].tolist())
        return self.net(batch[1]).square().mean()


@NO_PIN
def test_a_run_that_had_no_batch_ahead_goes_on_with_one(tmp_path: Any, lanes: Any) -> None:
    class Save(lk.Callback):
        def on_save_point(self, trainer: Any, task: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "default_root_dir": tmp_path}
    net, rest = Keeps(), Keeps()
    lk.Trainer(callbacks=Save(), **options).fit(net, noisy())
    lk.Trainer(prefetch=True, **options).fit(rest, noisy(), ckpt_path=tmp_path / "3.ckpt")
    assert rest.seen[0] == net.seen[3]  # read in the states of the save
    assert len(rest.seen) == 3


class Failing(Dataset[Any]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        if index == 13:
            raise StopIteration if os.environ.get("LIGHTKIT_STOPS") else ValueError("sample 13")
        return torch.tensor(index), torch.ones(5)


@NO_PIN
@pytest.mark.parametrize("kind", [ValueError, DataError])
def test_the_steps_before_a_broken_batch_are_taken(
    tmp_path: Any, lanes: Any, monkeypatch: Any, kind: Any
) -> None:
    if kind is DataError:
        monkeypatch.setenv("LIGHTKIT_STOPS", "1")
    loader = DataLoader(Failing(), 4, pin_memory=True)
    trainer = lk.Trainer(max_epochs=1, prefetch=True, logger=False, default_root_dir=tmp_path)
    with pytest.raises(kind, match="sample 13|raised StopIteration at batch 3"):
        trainer.fit(Net(), loader)
    assert trainer.global_step == 3
    assert lanes[0].sent == 3


class Streaming(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return ((torch.tensor(i), torch.ones(5)) for i in range(22))


class Prepares(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@NO_PIN
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataLoader(Noisy(), 4), "not in pinned memory. Give the DataLoader pin_memory=T"),
        (lambda: tensors(22), "Give the TensorLoader pin_memory=True"),
        (
            lambda: [(torch.arange(4), torch.ones(4, 5))],
            r"training loader \(list\) keeps its place",
        ),
        (lambda: DataLoader(StatefulStream(), 4, pin_memory=True), r"\(DataLoader\) keeps its pla"),
        (lambda: DataLoader(Streaming(), 4, pin_memory=True), "over a data set with indices"),
    ],
)
def test_what_cannot_be_ahead(tmp_path: Any, lanes: Any, make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match="prefetch=True, but.*" + words):
        fit(tmp_path, make(), prefetch=True)
    fit(tmp_path, make(), max_epochs=1)
    assert sum(lane.sent for lane in lanes) == 0


@NO_PIN
def test_functions_that_get_batches_as_they_are(tmp_path: Any, lanes: Any) -> None:
    options = {"logger": False, "default_root_dir": tmp_path, "max_epochs": 1}
    with pytest.raises(ConfigError, match="on_before_batch_transfer is to get each batch as the"):
        lk.Trainer(prefetch=True, **options).fit(Prepares(), tensors(22, pin_memory=True))
    lk.Trainer(**options).fit(Prepares(), tensors(22, pin_memory=True))
    assert sum(lane.sent for lane in lanes) == 0


@NO_PIN
def test_an_iterable_data_set_in_workers(tmp_path: Any, lanes: Any) -> None:
    make = lambda: (DataLoader(Streaming(), 4, num_workers=1, pin_memory=True),)  # noqa: E731
    check(tmp_path, make, 3, max_epochs=2)
    assert sum(lane.sent for lane in lanes) > 12


def test_arguments_and_devices_without_a_lane(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="prefetch='epochs': allowed.*Did you mean 'epoch'"):
        lk.Trainer(prefetch="epochs")  # type: ignore[arg-type]
    found = fit(tmp_path, tensors(22), prefetch=True, accelerator="cpu")
    wanted = fit(tmp_path, tensors(22), accelerator="cpu")
    assert (found[0].seen, found[1]) == (wanted[0].seen, wanted[1])


# --- the next epoch during the validation ------------------------------------------------------------


class Looks(lk.Callback):
    """Takes down whether the next pass has begun when a validation begins."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, bool]] = []

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        if not trainer.sanity_checking:
            stream = trainer._run.next_stream
            self.begun.append((trainer.global_step, stream is not None))


def with_workers(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, **{"shuffle": True, "num_workers": 1} | options)


EARLY = {
    "persistent": lambda: with_workers(persistent_workers=True),
    "not persistent": with_workers,
    "a generator": lambda: with_workers(persistent_workers=True, generator=own()),
}


@pytest.mark.parametrize("kind", EARLY)
def test_the_next_epoch_begins_before_the_validation(tmp_path: Any, kind: str) -> None:
    looks = Looks()
    net, _ = fit(
        tmp_path, EARLY[kind](), tensors(9), prefetch="epoch", callbacks=looks, val_check_interval=4
    )
    assert looks.begun == [(4, False), (10, False), (16, False)]
    looks = Looks()
    net, _ = fit(tmp_path, EARLY[kind](), tensors(9), prefetch="epoch", callbacks=looks)
    assert looks.begun == [(6, True), (12, True), (18, True)]
    for epoch in range(3):  # whole epochs, each in an order of its own
        seen = [index for batch in net.seen[6 * epoch : 6 * epoch + 6] for index in batch]
        assert sorted(seen) == [*range(22)]
    assert net.seen[:6] != net.seen[6:12]


@pytest.mark.parametrize("kind", EARLY)
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}], ids=["whole", "limited"])
def test_a_run_whose_epochs_begin_early_goes_on_anywhere(
    tmp_path: Any, kind: str, options: Any
) -> None:
    make = lambda: (EARLY[kind](), with_workers(shuffle=False))  # noqa: E731
    check(tmp_path, make, 3, prefetch="epoch", max_epochs=3, **options)


def test_batches_that_are_kept_need_no_early_epoch(tmp_path: Any) -> None:
    how: dict[str, Any] = {"overfit_batches": 2, "max_epochs": 2}
    found = [fit(tmp_path, with_workers(), prefetch=early, **how) for early in ("epoch", None)]
    assert (found[0][0].seen, found[0][1]) == (found[1][0].seen, found[1][1])


class SaveInValidation(lk.Callback):
    """Saves at the end of the validation, where the epoch is not over and the next one has begun."""

    def __init__(self, path: Any) -> None:
        self.path, self.then = path, None

    def on_validation_end(self, trainer: Any, task: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            self.then = trainer.global_step


def test_a_save_between_two_passes(tmp_path: Any) -> None:
    save = SaveInValidation(tmp_path / "x.ckpt")
    make = EARLY["persistent"]
    net, _ = fit(tmp_path, make(), prefetch="epoch", callbacks=save, val=tensors(9))
    rest, _ = fit(tmp_path, make(), tensors(9), prefetch="epoch", ckpt_path=save.path, seed=9)
    assert rest.seen == net.seen[12:]


class Ends(Net):
    """Gets a signal in the middle of its second validation."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.ends and self.trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_validation_that_is_broken_off(tmp_path: Any) -> None:
    found = []
    for ends in (False, True):
        lk.seed_everything(3, verbose=False)
        options: dict[str, Any] = {"max_epochs": 3, "prefetch": "epoch", "logger": False}
        options |= {"default_root_dir": tmp_path / str(ends), "enable_progress_bar": False}
        loaders = EARLY["persistent"](), tensors(40)
        net, trainer = Ends(), lk.Trainer(**options)
        net.ends = ends
        if ends:
            with pytest.raises(SystemExit):
                trainer.fit(net, *loaders)
            assert trainer.global_step == 12
            loaders = EARLY["persistent"](), tensors(40)
            first, net, trainer = net, Ends(), lk.Trainer(**options)
            net.ends = False
            trainer.fit(net, *loaders, ckpt_path="auto")
            net.seen = first.seen + net.seen
        else:
            trainer.fit(net, *loaders)
        rows = [row["val_loss"] for row in trainer.history]
        weights = [p.tolist() for p in net.parameters()]
        found.append((net.seen, rows, weights, torch.rand(2).tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: tensors(22), {}, r"the training loader \(TensorLoader\) has none"),
        (lambda: DataLoader(Noisy(), 4), {}, r"\(DataLoader\) has none.*num_workers=1 or more"),
        (with_workers, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n"),
    ],
)
def test_what_cannot_begin_early(tmp_path: Any, make: Any, options: Any, words: str) -> None:
    class Makes(Net):
        def train_dataloader(self) -> Any:
            return make()

    trainer = lk.Trainer(prefetch="epoch", logger=False, default_root_dir=tmp_path, **options)
    with pytest.raises(ConfigError, match="prefetch='epoch'.*" + words):
        trainer.fit(Makes())
