"""What is logged on several ranks, against one process that has all of it.

The ranks are threads, each with a `MetricLog` of its own, which meet at a barrier.
"""

from __future__ import annotations

import copy
import io
import math
import threading

import pytest
import torch
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    Metric,
    MetricCollection,
    MinMetric,
    PearsonCorrCoef,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
)

import lightkit as lk
from lightkit.columns import Column
from lightkit.distributed import LaunchEnv, Ranks
from lightkit.errors import LoggingError, NonFiniteError
from lightkit.history import History
from lightkit.loggers import Logger
from lightkit.metrics import MetricLog
from lightkit.state import TrainState


class Meeting:
    """Where the threads of one test exchange values."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.held = [None] * size
        self.told: list[str] = []

    def swap(self, rank, value, what):
        self.held[rank] = (what, value)
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        assert {one for one, _ in found} == {what}, found
        if rank == 0:
            self.told.append(what)
        return [value for _, value in found]


class ThreadRanks(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, meeting):
        super().__init__(LaunchEnv(rank=rank, world_size=size, launched=True))
        self.meeting = meeting

    def exchange(self, numbers, what):
        found = self.meeting.swap(self.rank, [float(n) for n in numbers], what)
        assert len({len(one) for one in found}) == 1
        return found

    def gather(self, value, what):
        file = io.BytesIO()  # plain types and tensors only
        torch.save(value, file)
        return [
            torch.load(io.BytesIO(one), weights_only=True)
            for one in self.meeting.swap(self.rank, file.getvalue(), what)
        ]


class Rows(Logger):
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, {k: v for k, v in metrics.items() if k != "epoch"}))


class Net(lk.TaskModule):
    """Holds metric objects by name."""

    def __init__(self, **metrics):
        super().__init__()
        self.objects = torch.nn.ModuleDict(metrics)


class Rank:
    """One rank: its log, its task, and short words for what the loop does."""

    def __init__(self, ranks, task, **options):
        self.rows, self.task = Rows(), task
        self.log = MetricLog(TrainState(), [self.rows], History(), every=10, ranks=ranks, **options)
        self.log.setup(None, task, "fit")
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.world_size
        task._link.metrics = self.log

    def mine(self, batches):
        """Returns (number, batch) of the batches of this rank."""
        return list(enumerate(batches))[self.rank :: self.size]

    def train(self, batches, step, *, end=None):
        """Runs an epoch of training; ``step(rank, batch, number)`` logs."""
        log = self.log
        log.begin_epoch()
        log.begin_steps()
        for number, batch in self.mine(batches):
            log.now.batch, log.now.size = batch, len(batch)
            step(self, batch, number)
            log.state.global_step += 1
            log.on_train_batch_end(None, None, None, batch, number)
        log.end_steps()
        log.reduce(training=True)
        self.value = {k: float(v) for k, v in log.callback_metrics.items()}
        if end is not None:
            end(self)
        log.on_train_epoch_end(None, None)
        return self

    def evaluate(self, *loaders, step, end=None, rename=None):
        """Runs an evaluation over loaders; ``step(rank, batch, number)`` logs."""
        log = self.log
        log.begin_eval(sanity=False)
        for index, batches in enumerate(loaders):
            named = None if len(loaders) == 1 else lambda name, i=index: f"{name}/{i}"
            log.begin_eval(named, loader=index, sanity=False)
            log.begin_steps()
            for number, batch in self.mine(batches):
                log.now.batch, log.now.size = batch, len(batch)
                step(self, batch, number)
                log.seen.add(index)
                log.on_validation_batch_end(None, None, None, batch, number)
        log.begin_eval_hooks()
        log.reduce(training=False)
        if end is not None:
            end(self)
        log.on_validation_epoch_end(None, None)
        self.results = log.eval_results(len(loaders))
        return self


def run(size, does, make=Net, **options):
    """Calls ``does(rank)`` on so many ranks; returns what each returned or raised."""
    meeting, found = Meeting(size), [None] * size

    def thread(number):
        try:
            ranks = ThreadRanks(number, size, meeting) if size > 1 else Ranks()
            found[number] = does(Rank(ranks, make(), **options))
        except threading.BrokenBarrierError:
            found[number] = "alone"
        except Exception as error:  # noqa: BLE001
            found[number] = error
            if not isinstance(error, LoggingError):  # those are raised by all
                meeting.barrier.abort()

    threads = [threading.Thread(target=thread, args=(n,)) for n in range(size)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    run.told = meeting.told
    return found


def ranks(size, does, make=Net, **options):
    """As `run`, where nobody may raise."""
    found = run(size, does, make, **options)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def batches(samples, size=4):
    generator = torch.Generator().manual_seed(samples)  # one state for each thread
    return list(torch.randn(samples, dtype=torch.float64, generator=generator).split(size))


# --- means ---------------------------------------------------------------------------------------


def log_all(rank, batch, number):
    task = rank.task
    task.log("mean", batch.mean())
    task.log("sum", batch.sum(), reduce_fx="sum")
    task.log("low", batch.min(), reduce_fx="min")
    task.log("high", batch.max(), reduce_fx="max")
    task.log("weighted", batch.mean(), batch_size=number % 3)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("samples", [21, 23, 499])
def test_means_of_an_evaluation_are_those_of_one_process(samples, size):
    def does(rank):
        return rank.evaluate(batches(samples), step=log_all)

    (alone,), several = ranks(1, does), ranks(size, does)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], rel=1e-14)
        assert rank.results == several[0].results  # the same bits
        assert rank.rows.rows == several[0].rows.rows
    assert several[0].results[0]["low"] == alone.results[0]["low"]


def log_others(rank, batch, number):
    task = rank.task
    task.log("std", batch.mean(), reduce_fx="std")
    task.log("last", batch.mean(), reduce_fx="last")
    task.log("running", batch.mean(), reduce_fx="running:7")
    if number % 2:
        task.log("long", batch.mean(), reduce_fx="running:1000")
    else:
        task.log("long", batch.mean(), reduce_fx="running:1000", batch_size=0)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("samples", [21, 23, 499])
def test_other_reductions_of_an_evaluation_are_those_of_one_process(samples, size):
    """S1-07. Some ranks have a batch less than others."""

    def does(rank):
        return rank.evaluate(batches(samples), step=log_others)

    (alone,), several = ranks(1, does), ranks(size, does)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], rel=1e-12)
        assert rank.results == several[0].results  # the same bits
    data = [float(batch.mean()) for batch in batches(samples)]
    sizes = [len(batch) for batch in batches(samples)]
    assert alone.results[0]["last"] == several[0].results[0]["last"] == data[-1]
    pairs = list(zip(data, sizes, strict=True))[-7:]
    mean = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    assert alone.results[0]["running"] == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize("size", [2, 4])
def test_running_means_go_on_over_epochs_on_all_ranks(size):
    """S1-07. The rows of an epoch of 3 rounds begin with what the epoch before left."""
    data = batches(4 * 3 * size)

    def does(rank):
        values = []
        for _ in range(3):
            rank.train(data, log_others)
            values.append({k: v for k, v in rank.log.history[-1].items() if k != "time"})
        return rank, values

    found, ((one, alone),) = ranks(size, does), ranks(1, does)
    means = [float(batch.mean()) for batch in data] * 3
    for rank, values in found:
        assert values == found[0][1]
        assert rank.log.tails == found[0][0].log.tails
        for epoch, (here, there) in enumerate(zip(values, alone, strict=True), 1):
            assert here["running"] == pytest.approx(there["running"], rel=1e-12)
            assert here["last"] == there["last"] == means[-1]
            seen = means[: epoch * 3 * size][-7:]
            assert here["running"] == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    assert len(one.log.tails["long"]) == 3 * (3 * size // 2)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_training_are_means_over_all_ranks(size):
    data = batches(4 * 40 * size)

    def does(rank):
        return rank.train(data, log_all)

    several = ranks(size, does)
    for rank in several:
        assert rank.rows.rows == several[0].rows.rows
        assert rank.log.bar == several[0].log.bar
        assert {k: v for k, v in rank.log.history[0].items() if k != "time"} == {
            k: v for k, v in several[0].log.history[0].items() if k != "time"
        }
    steps = [step for step, row in several[0].rows.rows if "mean" in row]
    assert steps == [10, 20, 30, 40]
    for number, (_, row) in enumerate(several[0].rows.rows[:4]):
        window = torch.cat(data[10 * size * number : 10 * size * (number + 1)])
        assert row["mean"] == pytest.approx(float(window.mean()), rel=1e-14)
        assert row["sum"] == pytest.approx(float(window.sum()), rel=1e-14)
        assert (row["low"], row["high"]) == (float(window.min()), float(window.max()))
    assert several[0].value["mean"] == pytest.approx(float(torch.cat(data).mean()), rel=1e-7)


def test_one_exchange_per_flush_also_with_many_names():
    def step(rank, batch, number):
        for i in range(50):
            rank.task.log(f"value_{i}", batch.sum() * i, reduce_fx="sum")

    def does(rank):
        return rank.train(batches(4 * 40), step)

    several = ranks(2, does)
    # Twenty steps a rank: two windows, the end and the late ones; once more where room was made.
    assert len(run.told) == 5
    assert several[1].value["value_49"] == pytest.approx(
        float(torch.cat(batches(160)).sum() * 49), rel=1e-6
    )


def test_a_name_without_a_value_in_a_window_on_one_rank_is_neutral():
    def step(rank, batch, number):
        if rank.log.state.global_step == 0 or rank.rank == 0:
            rank.task.log("now_and_then", float(rank.rank + 1), batch_size=1)
            rank.task.log("least", float(rank.rank + 1), reduce_fx="min")

    several = ranks(2, lambda rank: rank.train(batches(4 * 40), step))
    rows = [row for _, row in several[1].rows.rows]
    assert rows[0]["now_and_then"] == pytest.approx(12 / 11)
    assert rows[1]["now_and_then"] == 1.0
    assert several[1].value["least"] == 1.0


def test_a_window_in_which_no_rank_has_a_value_leaves_the_name_out():
    def step(rank, batch, number):
        rank.task.log("always", 1.0)
        if rank.log.state.global_step == 0:
            rank.task.log("once", 1.0)

    several = ranks(2, lambda rank: rank.train(batches(4 * 40), step))
    assert ["once" in row for _, row in several[0].rows.rows] == [True, False]


def test_nan_and_inf_reach_all_ranks():
    def step(rank, batch, number):
        rank.task.log("x", math.nan if number == 1 else 1.0)
        rank.task.log("top", math.inf if number == 1 else 1.0, reduce_fx="sum")

    several = ranks(2, lambda rank: rank.evaluate(batches(16), step=step))
    for rank in several:
        assert math.isnan(rank.results[0]["x"])
        assert rank.results[0]["top"] == math.inf


def test_late_values_of_hooks_are_averaged_over_ranks():
    def end(rank):
        rank.task.log("late", float(rank.rank))
        rank.task.log("heavy", float(rank.rank), batch_size=1 + 2 * rank.rank)

    several = ranks(2, lambda rank: rank.evaluate(batches(16), step=log_all, end=end))
    for rank in several:
        assert rank.results[0]["late"] == 0.5
        assert rank.results[0]["heavy"] == 0.75
        assert float(rank.log.callback_metrics["late"]) == 0.5
    several = ranks(2, lambda rank: rank.train(batches(16), log_all, end=end))
    assert [rank.log.history[0]["late"] for rank in several] == [0.5, 0.5]


def test_values_of_steps_of_an_evaluation_come_in_the_order_of_batches():
    def step(rank, batch, number):
        rank.task.log("number", float(number), on_step=True, on_epoch=False)

    def does(rank):
        rank.evaluate(batches(20), step=step)
        return rank.evaluate(batches(8), step=step)

    (alone,), several = ranks(1, does), ranks(2, does)
    assert alone.rows.rows == several[0].rows.rows
    assert [row for row in several[0].rows.rows if "number" in row[1]][5:] == [
        (6, {"number": 0.0}),
        (7, {"number": 1.0}),
    ]


def test_an_evaluation_that_is_folded_many_times_is_exact(monkeypatch):
    monkeypatch.setattr("lightkit.metrics._FOLD_EVERY", 3)

    def does(rank):
        return rank.evaluate(batches(211), step=log_all)

    (alone,), several = ranks(1, does), ranks(2, does)
    assert several[1].results[0] == pytest.approx(alone.results[0], rel=1e-14)
    assert several[0].results == several[1].results


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_different_names_are_an_error_on_all_ranks_that_names_rank_and_key(where):
    def step(rank, batch, number):
        rank.task.log("both", 1.0)
        if rank.rank == 2:
            rank.task.log("extra", 1.0)

    def does(rank):
        if where == "train":
            return rank.train(batches(120), step)
        return rank.evaluate(batches(120), step=step)

    found = run(3, does)
    assert [type(one) for one in found] == [LoggingError] * 3
    assert len({str(one) for one in found}) == 1
    assert "ranks 0, 1 did not log 'extra', but rank 2 did" in str(found[0])
    assert "rank_zero_only" in str(found[0])


def test_as_many_but_other_names_are_an_error():
    found = run(2, lambda r: r.train(batches(16), lambda r, b, n: r.task.log(f"x{r.rank}", 1.0)))
    assert "rank 1 did not log 'x0', but rank 0 did" in str(found[1])
    assert "rank 0 did not log 'x1', but rank 1 did" in str(found[0])


def test_one_name_in_two_ways_is_an_error():
    def step(rank, batch, number):
        rank.task.log("x", 1.0, reduce_fx="mean" if rank.rank else "sum")

    found = run(2, lambda rank: rank.train(batches(16), step))
    for one in found:
        assert isinstance(one, LoggingError)
        assert "rank 0 reduce='sum'" in str(one)
        assert "rank 1 reduce='mean'" in str(one)


def test_a_name_that_only_a_hook_of_one_rank_logs_is_an_error():
    def end(rank):
        if rank.rank:
            rank.task.log("late", 1.0)

    found = run(2, lambda rank: rank.evaluate(batches(16), step=log_all, end=end))
    assert all("rank 0 did not log 'late', but rank 1 did" in str(one) for one in found)


def test_rank_zero_only_is_kept_by_rank_zero_alone():
    def step(rank, batch, number):
        rank.task.log("all", 1.0)
        rank.task.log("mine", float(number), rank_zero_only=True)

    several = ranks(2, lambda rank: rank.train(batches(4 * 40), step))
    assert several[0].log.history[0]["mine"] == 19.0  # 0, 2, .. 38
    assert [row["mine"] for _, row in several[0].rows.rows] == [9.0, 29.0]
    assert "mine" not in several[1].log.history[0]
    assert several[0].log.history[0]["all"] == several[1].log.history[0]["all"] == 1.0


def test_rank_zero_only_in_one_process_changes_nothing():
    def step(rank, batch, number):
        rank.task.log("mine", float(number), rank_zero_only=True)

    (alone,) = ranks(1, lambda rank: rank.train(batches(16), step))
    assert alone.log.history[0]["mine"] == 1.5


# --- ranks without a batch -----------------------------------------------------------------------


@pytest.mark.parametrize("samples", [3, 8])
def test_a_rank_without_a_batch_gets_the_results_of_the_others(samples):
    def step(rank, batch, number):
        log_all(rank, batch, number)
        rank.task.log("shown", 2.0, prog_bar=True, on_step=True, on_epoch=True)

    def does(rank):
        return rank.evaluate(batches(samples), step=step)

    (alone,), several = ranks(1, does), ranks(4, does)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], nan_ok=True)
        assert rank.log.bar == alone.log.bar
        assert dict(rank.log.callback_metrics).keys() == dict(alone.log.callback_metrics).keys()


def test_the_first_rank_may_be_the_one_without_a_batch():
    class Odd(Rank):
        def mine(self, given):
            return [] if self.rank == 0 else list(enumerate(given))

    def does(rank):
        rank.__class__ = Odd
        return rank.evaluate(batches(8), step=log_all)

    several = ranks(2, does)
    assert several[0].results == several[1].results
    assert several[0].rows.rows == several[1].rows.rows


def test_only_some_of_several_loaders_may_be_empty_for_a_rank():
    def does(rank):
        return rank.evaluate(batches(16), batches(4), batches(7), step=log_all)

    (alone,), several = ranks(1, does), ranks(2, does)
    for rank in several:
        for one, other in zip(rank.results, alone.results, strict=True):
            assert one == pytest.approx(other, nan_ok=True)
            assert list(one) == list(other) or rank.rank


# --- monitors ------------------------------------------------------------------------------------


def test_a_value_between_two_flushes_is_reduced_on_request():
    found = []

    def step(rank, batch, number):
        rank.task.log("mean", float(rank.rank), batch_size=1 + rank.rank)
        rank.task.log("sum", float(rank.rank + 1), reduce_fx="sum")
        rank.task.log("low", float(rank.rank + 1), reduce_fx="min")
        rank.task.log("std", float(rank.rank), reduce_fx="std")
        rank.task.log("last", float(rank.rank), reduce_fx="last")
        rank.task.log("running", float(rank.rank), reduce_fx="running:9")
        names = ("mean", "sum", "low", "std", "last", "running", "none")
        values = [rank.log.reduced(name) for name in names]
        found.append([None if v is None else float(v) for v in values])
        assert float(rank.log.callback_metrics["mean"]) == rank.rank  # its own

    ranks(2, lambda rank: rank.train(batches(4 * 24), step))
    assert len(found) == 24
    expected = [pytest.approx(2 / 3), 3.0, 1.0, pytest.approx(0.5**0.5), 1.0, 1.0, None]
    assert all(one == expected for one in found)


def test_what_was_reduced_already_is_the_same_object():
    def does(rank):
        rank.evaluate(batches(16), step=log_all)
        return rank.log.reduced("mean") is rank.log.callback_metrics["mean"]

    assert ranks(2, does) == [True, True]


@pytest.mark.parametrize("said", [True, False])
def test_a_monitor_that_one_rank_lacks_is_an_error_on_all(said):
    def step(rank, batch, number):
        if said:
            rank.task.log("mine", 1.0, rank_zero_only=True)
            with pytest.raises(LoggingError, match="on rank 0 only"):
                rank.log.check_shared("mine")  # known without a word between the ranks
            rank.log.check_shared("other")
        elif rank.rank == 0:
            rank.task.log("mine", 1.0)
        rank.log.reduced("mine")

    found = run(2, lambda rank: rank.train(batches(16), step))
    for one in found:
        assert isinstance(one, LoggingError)
        assert "'mine' is monitored, but it was logged on rank 0 only" in str(one)


def test_in_one_process_what_rank_zero_logs_may_be_monitored():
    def step(rank, batch, number):
        rank.task.log("mine", 2.0, rank_zero_only=True)
        assert rank.log.reduced("mine") == 2.0

    ranks(1, lambda rank: rank.train(batches(16), step))


def test_in_one_process_nothing_is_exchanged():
    def does(rank):
        rank.train(batches(4 * 24), log_all)
        return rank.log.reduced("mean") is rank.log.callback_metrics["mean"]

    assert ranks(1, does) == [True]
    assert run.told == []


# --- losses that are not finite ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_rank():
    def step(rank, batch, number):
        rank.log.add_loss(torch.tensor(math.nan if number == 5 else 1.0), None)

    found = run(2, lambda rank: rank.train(batches(4 * 40), step))
    assert isinstance(found[1], NonFiniteError)
    assert "became nan on rank 1 at step 3" in str(found[1])
    assert found[0] == "alone"


def test_or_it_is_only_a_warning(caplog):
    def step(rank, batch, number):
        rank.log.add_loss(torch.tensor(math.nan if number == 5 else 1.0), None)

    several = ranks(2, lambda rank: rank.train(batches(4 * 40), step), stop_on_nan=False)
    assert [r.message for r in caplog.records if "on rank 1" in r.message]
    assert all(math.isnan(rank.value["train_loss"]) for rank in several)


# --- metric objects ------------------------------------------------------------------------------


class Own(Metric):
    """A metric with a reduction of its own, and one of each kind."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("longest", torch.zeros(2), dist_reduce_fx=lambda x: x.amax(0))
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("average", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("parts", [], dist_reduce_fx=None)

    def update(self, batch):
        self.longest = torch.maximum(self.longest, torch.tensor([len(batch), 1.0]))
        self.average = (self.average * self.count + batch.mean()) / (self.count + 1)
        self.count += 1
        self.parts.append(batch.sum())

    def compute(self):
        return self.longest.sum() * 1000 + self.average * self.count + sum(self.parts)


class Ordered(Metric):
    """Depends on the order of what it has seen."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, batch):
        self.seen.append(batch)

    def compute(self):
        seen = torch.cat([*self.seen]) if isinstance(self.seen, list) else self.seen
        return (seen * torch.arange(len(seen), device=seen.device)).sum()


def all_metrics():
    return Net(
        accuracy=MulticlassAccuracy(3, average="micro"),
        macro=MulticlassAccuracy(3),
        f1=MulticlassF1Score(3),
        auroc=BinaryAUROC(),
        mean=MeanMetric(),
        sum=SumMetric(),
        low=MinMetric(),
        high=MaxMetric(),
        pearson=PearsonCorrCoef(),
        own=Own(),
        ordered=Ordered(),
    )


def samples(count, size=4):
    """Returns batches of (scores, targets)."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, 3, generator=generator)
    target = torch.randint(3, (count,), generator=generator)
    return [Pair(s, t) for s, t in zip(scores.split(size), target.split(size), strict=True)]


class Pair(tuple):
    def __new__(cls, *items):
        return super().__new__(cls, items)

    def __len__(self):
        return len(self[0])


def update_all(rank, batch, number, log=True):
    scores, target = batch[0], batch[1]
    for name, metric in rank.task.objects.items():
        if name in ("accuracy", "macro", "f1"):
            metric.update(scores, target)
        elif name == "auroc":
            metric.update(scores[:, 1].sigmoid(), target == 1)
        elif name == "pearson":
            metric.update(scores[:, 0], scores[:, 1] + target)
        else:
            metric.update(scores[:, 0].abs())  # sums without cancellation
        if log:
            rank.task.log(name, metric)


@pytest.mark.parametrize("how", ["train", "evaluate"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("count", [21, 23, 499])
def test_metric_objects_equal_one_process(count, size, how):
    def does(rank):
        if how == "train":
            return rank.train(samples(count), update_all)
        rank.evaluate(samples(count), step=update_all)
        rank.value = rank.results[0]
        return rank

    (alone,), several = ranks(1, does, all_metrics), ranks(size, does, all_metrics)
    for rank in several:
        if how == "evaluate":
            assert rank.value == several[0].value
        assert rank.value.keys() == alone.value.keys()
        assert rank.value == pytest.approx(alone.value, rel=1e-6, abs=1e-7)
        for name in ("accuracy", "low", "high", "ordered"):
            assert rank.value[name] == alone.value[name]
        for metric in rank.task.objects.values():
            assert not metric.update_called  # begun anew
    gathers = [what for what in run.told if "metric objects" in what]
    assert len(gathers) == 1  # one collective for all of them


@pytest.mark.gpu
def test_states_on_a_card_are_merged_and_put_back_there():
    device = torch.device("cuda")

    def step(rank, batch, number):
        scores, target = batch[0].to(device), batch[1].to(device)
        objects = rank.task.objects
        objects["accuracy"].update(scores, target)
        objects["auroc"].update(scores[:, 1].sigmoid(), target == 1)
        objects["ordered"].update(scores[:, 0])
        for name, metric in objects.items():
            rank.task.log(name, metric)
        rank.task.log("mean", scores.mean())

    def does(rank):
        rank.evaluate(samples(23), step=step)
        assert all(metric.device.type == "cuda" for metric in rank.task.objects.values())
        return rank

    def make():
        metrics = {"accuracy": MulticlassAccuracy(3), "auroc": BinaryAUROC()}
        return Net(ordered=Ordered(), **metrics).to(device)

    (alone,), several = ranks(1, does, make), ranks(2, does, make)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], rel=1e-6)


def test_counts_beyond_the_range_of_floats_are_exact():
    def step(rank, batch, number):
        metric = rank.task.objects["matrix"]
        metric.update(torch.tensor([0]), torch.tensor([number % 2]))
        metric.confmat += 2**60 // 4 * torch.eye(2, dtype=torch.int64)
        rank.task.objects["first"].update(metric.confmat[0, 0] * 0)
        rank.task.log("zero", rank.task.objects["first"])

    def end(rank):
        matrix = rank.task.objects["matrix"]
        column = Column("matrix", metric=matrix)
        from lightkit import metric_merging

        part = metric_merging._part(column, {}, False)
        parts = rank.ranks.gather(part, "test")
        states, _ = metric_merging.merged_states(
            [one["states"] for one in parts], {"": matrix}, going_on=False
        )
        rank.matrix = states[""]["values"]["confmat"]

    def make():
        return Net(matrix=MulticlassConfusionMatrix(2), first=SumMetric())

    several = ranks(2, lambda r: r.evaluate(batches(16), step=step, end=end), make)
    assert several[0].matrix.tolist() == [[2**60 + 2, 0], [2, 2**60]]
    assert several[0].matrix.dtype == torch.int64


def test_a_collection_with_compute_groups_counts_once():
    def make():
        group = MetricCollection(
            {
                "acc": MulticlassAccuracy(3),
                "f1": MulticlassF1Score(3),
                "precision": MulticlassPrecision(3),
            }
        )
        return Net(all=group)

    def step(rank, batch, number):
        group = rank.task.objects["all"]
        group.update(batch[0], batch[1])
        rank.task.log_dict(group)

    def does(rank):
        for _ in range(2):
            rank.evaluate(samples(23), step=step)
        return rank

    (alone,), several = ranks(1, does, make), ranks(2, does, make)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], rel=1e-6)


def test_a_rank_without_a_batch_computes_the_metrics_too():
    def does(rank):
        return rank.evaluate(samples(10), step=update_all)

    (alone,), several = ranks(1, does, all_metrics), ranks(4, does, all_metrics)
    for rank in several:
        assert rank.results[0] == pytest.approx(alone.results[0], rel=1e-6, abs=1e-7)


def test_also_where_the_task_does_not_know_the_metric():
    known = {}

    def step(rank, batch, number):
        metric = known.setdefault(rank.rank, MeanMetric())
        metric.update(batch)
        rank.task.log("hidden", metric)

    several = ranks(2, lambda rank: rank.evaluate(batches(4), step=step))
    assert several[1].results == several[0].results
    assert several[1].results[0]["hidden"] == pytest.approx(float(batches(4)[0].mean()))


@pytest.mark.parametrize("sizes", [(16, 12), (16, 4), (4, 16), (3, 3)])
def test_one_metric_object_for_several_loaders(sizes):
    def step(rank, batch, number):
        metric = rank.task.objects["mean"]
        metric.update(batch)
        rank.task.log("m", metric)

    def does(rank):
        for _ in range(2):
            rank.evaluate(*map(batches, sizes), step=step)
        return rank

    def make():
        return Net(mean=MeanMetric())

    (alone,), several = ranks(1, does, make), ranks(2, does, make)
    for rank in several:
        assert rank.results == [pytest.approx(one) for one in alone.results]


def test_a_metric_object_logged_in_a_hook_is_there_at_once():
    def end(rank):
        rank.task.log("late", rank.task.objects["cat"])
        assert float(rank.log.callback_metrics["late"]) == 3.0

    class Count(CatMetric):
        def compute(self):
            return torch.tensor(float(sum(len(v) for v in self.value)))

    def step(rank, batch, number):
        rank.task.objects["cat"].update(torch.ones(1))

    several = ranks(
        2,
        lambda rank: rank.evaluate(batches(12), step=step, end=end),
        lambda: Net(cat=Count()),
    )
    assert [rank.results[0] for rank in several] == [{"late": 3.0}] * 2


def test_a_metric_of_rank_zero_alone():
    def step(rank, batch, number):
        metric = rank.task.objects["mean"]
        metric.update(float(number))
        rank.task.log("mine", metric, rank_zero_only=True)

    several = ranks(2, lambda r: r.evaluate(batches(16), step=step), lambda: Net(mean=MeanMetric()))
    assert [rank.results[0] for rank in several] == [{"mine": 1.0}, {}]


def test_local_states_stay_as_they_were():
    def does(rank):
        log, metric = rank.log, rank.task.objects["mean"]
        log.begin_epoch()
        log.begin_steps()
        metric.update(float(rank.rank))
        rank.task.log("m", metric)
        before = copy.deepcopy(metric.metric_state)
        log.end_steps()
        log.reduce(training=True)
        assert metric.metric_state == before
        assert metric.update_count == 1
        assert metric._to_sync
        return float(log.callback_metrics["m"])

    assert ranks(2, does, lambda: Net(mean=MeanMetric())) == [0.5, 0.5]


def test_a_rank_that_repeats_another_counts_for_nothing():
    """As in tensor parallelism, where some ranks have the same batches."""

    def step(rank, batch, number):
        rank.task.objects["mean"].update(float(rank.rank))
        rank.task.log("object", rank.task.objects["mean"])
        rank.task.log("number", float(rank.rank))
        rank.task.log("count", 1.0, reduce_fx="sum")

    def does(rank):
        again = Rank(rank.ranks, rank.task, share=(rank.rank // 2, 1))
        again.log.begin_epoch()
        rank.task.log("open", float(rank.rank))
        states = rank.ranks.gather(again.log.local_state(), "a checkpoint")
        assert [bool(state) for state in states] == [True, False]
        again.log.load_state_dict({**again.log.state_dict(), "ranks": states})
        return again.evaluate(batches(16), step=step)

    several = ranks(2, does, lambda: Net(mean=MeanMetric()))
    assert [r.results[0] for r in several] == [{"object": 0.0, "number": 0.0, "count": 2.0}] * 2


# --- checkpoints ---------------------------------------------------------------------------------


def half(rank, batch, number):
    log_all(rank, batch, number)
    rank.log.add_loss(batch.mean(), None)
    for metric in rank.task.objects.values():
        metric.update(batch.abs())
        rank.task.log("object", metric)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1), (4, 2), (2, 4), (3, 2)])
def test_an_epoch_goes_on_with_another_number_of_ranks(before, after):
    data = batches(4 * 48)
    first, rest = data[:24], data[24:]

    def make():
        return Net(mean=MeanMetric())

    def begin(rank):
        log = rank.log
        log.begin_epoch()
        log.begin_steps()
        for number, batch in rank.mine(first):
            log.now.batch, log.now.size = batch, len(batch)
            half(rank, batch, number)
            log.state.global_step += 1
            log.on_train_batch_end(None, None, None, batch, number)
        states = rank.ranks.gather(log.local_state(), "a checkpoint")
        return {**log.state_dict(), "ranks": states}

    saved = ranks(before, begin, make)
    file = io.BytesIO()
    torch.save(saved[0], file)

    def go_on(rank):
        rank.log.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        return rank.train(rest, lambda r, b, n: half(r, b, n + 24))

    several = ranks(after, go_on, make)
    (alone,) = ranks(1, lambda rank: rank.train(data, half), make)
    for rank in several:
        for name, value in alone.value.items():
            assert rank.value[name] == pytest.approx(value, rel=1e-6), name
        assert rank.value["low"] == alone.value["low"]


def test_states_that_cannot_be_merged_are_told(caplog):
    def make():
        return Net(pearson=PearsonCorrCoef())

    def begin(rank):
        rank.log.begin_epoch()
        rank.log.begin_steps()
        rank.task.objects["pearson"].update(torch.randn(8), torch.randn(8))
        return {**rank.log.state_dict(), "ranks": rank.ranks.gather(rank.log.local_state(), "x")}

    saved = ranks(2, begin, make)[0]
    ranks(1, lambda rank: rank.log.load_state_dict(saved), make)
    assert "the states of objects.pearson cannot be merged" in caplog.text


def test_the_state_of_the_oldest_files_is_read():
    def begin(rank):
        rank.log.begin_epoch()
        rank.log.begin_steps()
        for number, batch in enumerate(batches(16)):
            rank.log.now.batch, rank.log.now.size = batch, len(batch)
            half(rank, batch, number)
        shared, own = rank.log.state_dict(), rank.log.local_state()
        columns = [{**c, **own["windows"].get(c["name"], {})} for c in shared["columns"]]
        loss = {**shared["loss"], **own["loss"]}
        rest = {"loss_steps": own["loss_steps"], "objects": own["objects"]}
        return {**shared, "columns": columns, "loss": loss, **rest}

    old = ranks(1, begin)[0]

    def go_on(rank):
        rank.log.load_state_dict(old)
        return rank.train([], half)

    (alone,) = ranks(1, go_on)
    assert alone.value["mean"] == pytest.approx(float(torch.cat(batches(16)).mean()))
    assert alone.value["train_loss"] == pytest.approx(alone.value["mean"])
