"""Names of losses, optimizers and metrics (S0-20, S1-06)."""

from __future__ import annotations

import functools

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from lightkit.errors import ConfigError
from lightkit.named import (
    kind_of_loss,
    loss_of,
    metric_class,
    optimizer_of,
    scheduler_of,
    snake,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cross_entropy", nn.CrossEntropyLoss),
        ("CrossEntropyLoss", nn.CrossEntropyLoss),
        ("mse", nn.MSELoss),
        ("mse_loss", nn.MSELoss),
        ("mae", nn.L1Loss),
        ("bce_with_logits", nn.BCEWithLogitsLoss),
        ("binary_cross_entropy_with_logits", nn.BCEWithLogitsLoss),
        ("smooth_l1", nn.SmoothL1Loss),
        ("nll_loss", nn.NLLLoss),
        ("binary_crossentropy", nn.BCELoss),  # Keras too means probabilities by it
    ],
)
def test_losses_of_torch_by_name(name, kind):
    assert type(loss_of(name)) is kind


def test_every_function_of_torch_has_its_class():
    assert kind_of_loss(F.cross_entropy) is nn.CrossEntropyLoss
    assert kind_of_loss(F.binary_cross_entropy_with_logits) is nn.BCEWithLogitsLoss
    assert kind_of_loss(F.mse_loss) is nn.MSELoss
    assert kind_of_loss(nn.HuberLoss(delta=2.0)) is nn.HuberLoss
    assert kind_of_loss(lambda output, target: output) is None
    assert kind_of_loss(None) is None


def test_losses_as_objects_classes_and_functions():
    weighted = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert loss_of(weighted) is weighted
    assert loss_of(F.mse_loss) is F.mse_loss
    assert type(loss_of(nn.MSELoss)) is nn.MSELoss


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cross_entropi", "Did you mean 'cross_entropy'"),
        ("sparse_categorical_crossentropy", "Write 'cross_entropy', of a network without softmax"),
        (3, "cannot be called"),
        (dict, "cannot be called"),
        (lambda y_true, y_pred: y_true, "is called with .output, target., but .* 'y_true'"),
    ],
)
def test_what_is_no_loss(given, message):
    with pytest.raises(ConfigError, match=message):
        loss_of(given)


def test_optimizers_by_name_class_function_and_object():
    weights = [nn.Parameter(torch.zeros(2))]
    for given in ("sgd", "SGD", torch.optim.SGD):
        made = optimizer_of(given, 0.5)(weights)
        assert type(made) is torch.optim.SGD
        assert made.param_groups[0]["lr"] == 0.5
    assert type(optimizer_of("adamw", None)(weights)) is torch.optim.AdamW
    assert optimizer_of("adamw", None)(weights).defaults["lr"] == 1e-3
    partial = functools.partial(torch.optim.SGD, momentum=0.9)
    assert optimizer_of(partial, 0.1)(weights).defaults["momentum"] == 0.9
    assert optimizer_of(made, None)(weights) is made


@pytest.mark.parametrize(
    ("given", "lr", "message"),
    [
        ("adamww", None, "Did you mean 'adamw'"),
        ("Optimizer", None, "none of torch.optim"),
        (3, None, "optimizer=3: allowed are"),
        ("sgd", -1, "lr=-1: allowed is a positive number"),
        ("sgd", "0.1", "lr='0.1'"),
        ("sgd", True, "lr=True"),
    ],
)
def test_what_is_no_optimizer(given, lr, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_of(given, lr)


def test_a_rate_for_an_optimizer_that_has_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)
    with pytest.raises(ConfigError, match=r"lr=0.5, but the SGD .* has its own"):
        optimizer_of(optimizer, 0.5)


def test_S1_06_metrics_by_name():
    assert metric_class("accuracy") is metric_class("acc") is torchmetrics.Accuracy
    assert metric_class("f1_score") is metric_class("F1Score") is torchmetrics.F1Score
    assert metric_class("mae") is torchmetrics.MeanAbsoluteError
    with pytest.raises(ConfigError, match="'acuracy' is no metric .* mean 'accuracy'"):
        metric_class("acuracy")


def test_names_as_they_are_written():
    names = ["CrossEntropy", "BCEWithLogits", "F1Score", "AUROC", "R2Score", "SmoothL1"]
    assert [snake(name) for name in names] == [
        "cross_entropy",
        "bce_with_logits",
        "f1_score",
        "auroc",
        "r2_score",
        "smooth_l1",
    ]


def test_schedules_take_the_optimizer_and_perhaps_the_trainer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)
    steps = torch.optim.lr_scheduler.StepLR
    assert type(scheduler_of(functools.partial(steps, step_size=2))(optimizer, None)) is steps
    assert scheduler_of(lambda optimizer: optimizer)(optimizer, None) is optimizer
    assert scheduler_of(lambda optimizer, trainer: trainer)(optimizer, "trainer") == "trainer"
    assert scheduler_of(None) is None
    with pytest.raises(ConfigError, match=r"told step_size: functools.partial\(StepLR, step_size="):
        scheduler_of(steps)
    with pytest.raises(ConfigError, match="'cosine': give a function of the optimizer"):
        scheduler_of("cosine")
