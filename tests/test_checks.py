from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

import lightkit as lk
from lightkit.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightkit.checks import check_loaders, check_modes, check_parameters
from lightkit.errors import OptimizerError
from lightkit.optim import OptimizerPlan

DATA: Dataset[Any] = TensorDataset(torch.arange(20.0))


def loader(dataset: Any = DATA, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, **kwargs)


def test_the_same_loader_is_told_with_its_name_and_the_fix() -> None:
    train = loader()
    ((name, message),) = check_loaders(
        train, [("val", loader(list(range(5)))), ("held_out", train)]
    )
    assert name == "same-data"
    assert "'held_out' is the training loader itself" in message
    assert "random_split" in message


def test_the_same_iterable_that_is_no_loader_is_told() -> None:
    batches = [torch.zeros(2)]
    assert len(check_loaders(batches, [("val", batches)])) == 1
    assert check_loaders(batches, [("val", [torch.zeros(2)])]) == []


class Evens(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(0, 20, 2))


class Buckets(Sampler[int]):
    """Indices of the user's own, which are something else."""

    indices = ((0, 1), (2, 3))

    def __iter__(self) -> Any:
        return iter(range(4))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(8))


STREAM = Stream()


def batches(indices: Any) -> DataLoader[Any]:
    """Batches of indices instead of single ones, as a dataset may want them."""
    sampler = BatchSampler(SubsetRandomSampler(indices), 4, False)
    return DataLoader(DATA, batch_size=None, sampler=sampler)


MEETING: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "the same dataset": (lambda: loader(shuffle=True), loader, "has the dataset"),
    "the same tensors": (
        lambda: loader(),
        lambda: loader(TensorDataset(*DATA.tensors)),  # type: ignore[attr-defined]
        "has the dataset",
    ),
    "a part of it": (
        lambda: loader(),
        lambda: loader(Subset(DATA, [1, 2])),
        "has the dataset of the training loader, whole or in part",
    ),
    "meeting subsets": (
        lambda: loader(Subset(DATA, range(15))),
        lambda: loader(Subset(DATA, range(12, 20))),
        "shares 3 of its 8 samples",
    ),
    "nested subsets": (
        lambda: loader(Subset(Subset(DATA, range(10, 20)), [0, 5])),
        lambda: loader(Subset(DATA, [15, 19])),
        "shares 1 of its 2 samples",
    ),
    "meeting samplers": (
        lambda: loader(sampler=SubsetRandomSampler([0, 1, 2])),
        lambda: loader(sampler=SubsetRandomSampler([2, 3])),
        "shares 1 of its 2 samples",
    ),
    "meeting batches of indices": (
        lambda: batches(range(12)),
        lambda: batches(range(10, 20)),
        "shares 2 of its 10 samples",
    ),
    "meeting names": (
        lambda: loader(Subset(DATA, ["a", "b"])),  # type: ignore[list-item]
        lambda: loader(Subset(DATA, ["b"])),  # type: ignore[list-item]
        "shares 1 of its 1 samples",
    ),
    "a batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 4, False)),
        loader,
        "has the dataset",
    ),
}


@pytest.mark.parametrize("case", MEETING)
def test_training_samples_in_validation_are_told(case: str) -> None:
    train, val, text = MEETING[case]
    ((name, message),) = check_loaders(train(), [("val", val())])
    assert name == "same-data"
    assert text in message


APART: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "other data": (loader, lambda: loader(TensorDataset(torch.arange(20.0)))),
    "disjoint subsets": (
        lambda: loader(Subset(DATA, range(15))),
        lambda: loader(Subset(DATA, range(15, 20))),
    ),
    "disjoint samplers": (
        lambda: loader(sampler=SubsetRandomSampler(range(15))),
        lambda: loader(sampler=SubsetRandomSampler(range(15, 20))),
    ),
    "a sampler of the user's own": (lambda: loader(sampler=Evens()), loader),
    "no dataset": (lambda: iter([1]), lambda: iter([1])),
    "disjoint batches of indices": (lambda: batches(range(10)), lambda: batches(range(10, 20))),
    "a stream": (
        lambda: DataLoader(STREAM, batch_size=None),
        lambda: DataLoader(STREAM, batch_size=None),
    ),
    "buckets": (lambda: loader(sampler=Buckets()), lambda: loader(sampler=Buckets())),
    "names": (lambda: loader(Subset(DATA, ["a", "b"])), lambda: loader(Subset(DATA, ["c"]))),
}


@pytest.mark.parametrize("case", APART)
def test_nothing_is_said_where_nothing_is_wrong_or_known(case: str) -> None:
    train, val = APART[case]
    assert check_loaders(train(), [("val", val())]) == []


def test_random_split_is_fine() -> None:
    train, val = random_split(DATA, [0.7, 0.3])
    assert check_loaders(loader(train), [("val", loader(val))]) == []


# --- parameters ------------------------------------------------------------------------------------


class Task(nn.Module):
    automatic_optimization = True

    def __init__(self, returned: Callable[[Task], Any]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.returned = returned

    def configure_optimizers(self) -> Any:
        return self.returned(self)


class ManualTask(Task):
    automatic_optimization = False


def found(returned: Callable[[Task], Any], task: type[Task] = Task) -> list[tuple[str, str]]:
    made = task(returned)
    plan = OptimizerPlan.build(made, fused=False, device=torch.device("cpu"))
    return check_parameters(made, plan)


def sgd(params: Any) -> SGD:
    return SGD(params, lr=0.1)


def test_nothing_is_said_about_what_is_right() -> None:
    def frozen(task: Task) -> SGD:
        task.body.requires_grad_(False)
        return sgd(task.head.parameters())

    def averaged(task: Task) -> SGD:
        task.average = AveragedModel(task.body)  # it moves by itself
        return sgd([*task.body.parameters(), *task.head.parameters()])

    assert found(lambda t: sgd(t.parameters())) == []
    assert found(frozen) == []
    assert found(averaged) == []


def test_parameters_in_no_optimizer_are_named() -> None:
    ((name, message),) = found(lambda t: sgd(t.head.parameters()))
    assert name == "no-optimizer"
    assert message.startswith("2 trainable parameters are in no optimizer")
    assert "body.weight, body.bias" in message


def test_long_lists_are_cut() -> None:
    class Deep(Task):
        def __init__(self, returned: Callable[[Task], Any]) -> None:
            super().__init__(returned)
            self.more = nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)])

    ((name, message),) = found(lambda t: sgd(t.head.parameters()), Deep)
    assert name == "no-optimizer"
    assert "10 trainable parameters" in message
    assert "more.1.bias" not in message
    assert "and 5 more" in message


def test_manual_optimization_may_leave_parameters_out() -> None:
    assert found(lambda t: [sgd(t.head.parameters())], ManualTask) == []


def test_parameters_in_two_optimizers_are_named() -> None:
    both = lambda t: [sgd(t.parameters()), sgd(t.head.parameters())]  # noqa: E731
    ((name, message),) = found(both, ManualTask)
    assert name == "two-optimizers"
    assert "2 parameters are in more than one optimizer" in message
    assert "head.weight, head.bias" in message


def test_an_optimizer_of_another_model_is_told() -> None:
    other = nn.Linear(2, 2)
    messages = found(lambda t: sgd([*t.parameters(), *other.parameters()]))
    assert len(messages) == 1
    assert messages[0][0] == "foreign-parameters"
    assert "holds 2 parameters that are not the task's own" in messages[0][1]


def test_nothing_to_train_is_an_error() -> None:
    def frozen(task: Task) -> SGD:
        task.requires_grad_(False)
        return sgd(task.parameters())

    with pytest.raises(OptimizerError, match="all of them are frozen"):
        found(frozen)


def test_no_optimizer_and_nothing_to_train_is_fine(caplog: pytest.LogCaptureFixture) -> None:
    def none(task: Task) -> None:
        task.requires_grad_(False)

    assert found(none) == []
    assert "no optimizer" in caplog.text


def test_a_monitor_whose_worse_values_count_as_better_is_told() -> None:
    ((name, message),) = check_modes(
        [Timer(), EarlyStopping("val_accuracy"), EarlyStopping("val/loss")]
    )
    assert name == "wrong-mode"
    assert message.startswith(
        "EarlyStopping('val_accuracy') has mode='min', by which a lower value"
    )
    assert "mode='max'" in message
    ((name, message),) = check_modes([ModelCheckpoint(monitor="val_loss", mode="max")])
    assert name == "wrong-mode"
    assert "mode='min'" in message


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_acc", "max"),
        ("val_loss", "min"),
        ("score", "min"),
        ("accurate_loss_f1", "min"),
        ("neg_loss", "max"),
    ],
)
def test_nothing_is_said_of_modes_that_are_right_or_unknown(name: str, mode: str) -> None:
    assert check_modes([EarlyStopping(name, mode=mode), ModelCheckpoint(monitor=None)]) == []


def test_a_fit_warns_of_the_mode(caplog: pytest.LogCaptureFixture) -> None:
    class Net(lk.TaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch: Any) -> Any:
            loss = self.net(batch[0][:, None]).square().mean()
            self.log("f1", -loss)
            return loss

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.01)

    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lk.Trainer(max_epochs=1, callbacks=EarlyStopping("f1"), **off).fit(Net(), loader())
    assert [record.message[:22] for record in caplog.records if record.levelname == "WARNING"] == [
        "EarlyStopping('f1') ha"
    ]
