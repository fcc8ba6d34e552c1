"""Wrong results of ``training_step`` and wrong names, as a user meets them in a fit."""

from __future__ import annotations

import logging

import pytest
import torch

import lightkit as lk
from lightkit.errors import LoggingError, OptimizerError, UsageError
from tests.small import Net, loader


class Wrong(Net):
    """Returns what ``change`` makes of the loss, or calls it with the task alone."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def training_step(self, batch, batch_idx):
        return self.change(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda loss: (loss, 1), "tuple. Return the loss as a tensor"),
        (lambda loss: {}, r"without a tensor under 'loss' \(it has: nothing\)"),
        (lambda loss: {"loss": loss.item()}, "it has: 'loss' is float"),
        (lambda loss: {"loss": None}, "it has: 'loss' is NoneType.* or None to skip the batch"),
        (lambda loss: {"loss": loss, "weight": -1}, "'weight': -1. It is the number of samples"),
        (lambda loss: {"loss": loss, "weight": float("nan")}, "'weight': nan. .* 0 or more"),
        (lambda loss: {"loss": loss, "weight": "8"}, "'weight': '8'. It is the number"),
        (lambda loss: {"loss": loss, "weight": torch.ones(2)}, r"'weight' of shape \(2,\)"),
    ],
)
def test_what_is_no_loss(quiet, change, words):
    with pytest.raises(UsageError, match=f"training_step returned .*{words}"):
        quiet().fit(Wrong(change), loader())


@pytest.mark.parametrize("weight", [4, 2.5, torch.tensor(3), torch.ones(1)])
def test_what_is_a_weight(quiet, weight):
    run = quiet(accumulate_grad_batches=2)
    history = run.fit(Wrong(lambda loss: {"loss": loss, "weight": weight}), loader())
    assert history[0]["step"] == 3


class Logs(Net):
    def __init__(self, *names, **arguments):
        super().__init__()
        self.names, self.arguments = names, arguments

    def training_step(self, batch, batch_idx):
        for i, name in enumerate(self.names):
            self.log(name, float(i), **(self.arguments if name == "a" else {}))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["step", "epoch", "time"])
def test_names_that_every_row_has_are_refused(quiet, name):
    with pytest.raises(LoggingError, match=rf"self.log\('{name}'\): every row has .* another name"):
        quiet().fit(Logs(name), loader())


@pytest.mark.parametrize("names", [("a", "a_step"), ("a_epoch", "a"), ("a_step", "b", "a")])
def test_two_names_that_would_be_one_curve_are_refused(quiet, names):
    both = {"on_step": True, "on_epoch": True}
    with pytest.raises(LoggingError, match=r"self.log\('a', on_step=True, on_epoch=True\), which"):
        quiet().fit(Logs(*names, **both), loader())
    quiet().fit(Logs(*names, on_step=True), loader())  # then "a" is "a"
    quiet().fit(Logs(*names), loader())


class Optimized(Net):
    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def configure_optimizers(self):
        return torch.optim.Adam(self.choose(self))


def test_no_parameters_for_the_optimizer_says_why(quiet):
    class Empty(Optimized):
        def __init__(self):
            super().__init__(lambda task: task.parameters())
            del self.net

    with pytest.raises(OptimizerError, match="No parameter of Empty can be trained: there is none"):
        quiet().fit(Empty(), loader())
    frozen = Optimized(lambda task: [p for p in task.parameters() if p.requires_grad])
    frozen.requires_grad_(False)
    with pytest.raises(OptimizerError, match="of Optimized can be trained: all of them are frozen"):
        quiet().fit(frozen, loader())
    with pytest.raises(OptimizerError, match="Optimized has 2 parameters .* how they are chosen"):
        quiet().fit(Optimized(lambda task: []), loader())


def test_an_error_of_the_users_own_in_configure_optimizers_stays_what_it_is(quiet):
    with pytest.raises(ValueError, match="not mine"):
        quiet().fit(Optimized(lambda task: int("not mine")), loader())


def test_parameters_in_no_optimizer_are_told_before_the_start(quiet, caplog):
    caplog.set_level(logging.WARNING, logger="lightkit")
    quiet().fit(Optimized(lambda task: [task.net.weight]), loader())
    assert "in no optimizer and will never change: net.bias. Give them to" in caplog.text


def test_no_training_loader_in_a_list(quiet):
    with pytest.raises(lk.errors.DataError, match="The training loader is empty"):
        quiet().fit(Net(), [])
