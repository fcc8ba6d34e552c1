"""Targets as losses and metrics take them, and what is said of those that do not fit."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightkit import targets
from lightkit.errors import DataError


def test_class_numbers_become_int64_of_one_dimension():
    logits = torch.zeros(3, 2)
    for given in (torch.tensor([0, 1, 1], dtype=torch.uint8), torch.tensor([[0], [1], [1]])):
        found = targets.fitted(nn.CrossEntropyLoss, logits, given)
        assert found.dtype == torch.int64
        assert found.tolist() == [0, 1, 1]
    same = torch.tensor([0, 1, 1])
    assert targets.fitted(nn.CrossEntropyLoss, logits, same) is same
    shares = torch.full((3, 2), 0.5)
    assert targets.fitted(nn.CrossEntropyLoss, logits, shares) is shares


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.BCEWithLogitsLoss])
def test_one_number_per_sample_is_compared_with_its_own_output(kind):
    """Else torch stretches (N, 1) and (N,) to (N, N) and trains on nonsense."""
    column, row = torch.zeros(3, 1), torch.tensor([1, 0, 1])
    found = targets.fitted(kind, column, row)
    assert found.shape == (3, 1)
    assert found.dtype == torch.float32
    assert targets.fitted(kind, torch.zeros(3), row[:, None]).shape == (3,)
    with pytest.raises(DataError, match=r"\(3, 4\) and the target \(3,\).*cross_entropy"):
        targets.fitted(kind, torch.zeros(3, 4), row)
    with pytest.raises(DataError, match=r"\(1, 3\) and the target \(3, 1\)"):
        targets.fitted(kind, torch.zeros(1, 3), row[:, None])


def test_a_loss_of_the_users_gets_the_target_as_it_is():
    target = {"boxes": 1}
    assert targets.fitted(None, torch.zeros(2), target) is target
    with pytest.raises(DataError, match="the target is of type dict with boxes"):
        targets.fitted(nn.MSELoss, torch.zeros(2), target)
    with pytest.raises(DataError, match="output of the network is of type tuple"):
        targets.fitted(nn.MSELoss, (torch.zeros(2),), torch.zeros(2))
    with pytest.raises(DataError, match="make batches: DataLoader"):
        targets.fitted(nn.MSELoss, torch.zeros(2), 1)


def test_what_metrics_of_classes_have_to_know():
    row, logits = torch.tensor([0, 1]), torch.zeros(2, 5)
    cross = nn.CrossEntropyLoss()

    def found(kind, loss, output, target):
        return targets.task_of(kind, loss, output, target)

    five = {"task": "multiclass", "num_classes": 5}
    assert found(nn.CrossEntropyLoss, cross, logits, row) == {**five, "ignore_index": -100}
    assert found(None, None, logits, row) == five
    tokens = torch.zeros(2, 7, dtype=torch.int64)
    assert found(nn.CrossEntropyLoss, cross, torch.zeros(2, 5, 7), tokens) == {
        **five,
        "ignore_index": -100,
    }
    ignoring = nn.CrossEntropyLoss(ignore_index=4)
    assert found(nn.CrossEntropyLoss, ignoring, logits, row)["ignore_index"] == 4
    bce = nn.BCEWithLogitsLoss
    assert found(bce, bce(), logits[:, :1], row[:, None]) == {"task": "binary"}
    labels = {"task": "multilabel", "num_labels": 5}
    assert found(bce, bce(), logits, torch.zeros(2, 5)) == labels
    assert found(nn.MSELoss, nn.MSELoss(), logits, torch.zeros(2, 5)) == {}
    assert found(None, None, [], row) == {}
    assert found(None, None, logits[:, :1], row) == {}  # probabilities or logits? nobody knows


def test_what_a_loss_of_classes_is_the_mean_of():
    row = torch.tensor([0, 2, -100])
    cross = nn.CrossEntropyLoss
    for loss in (cross(), nn.functional.cross_entropy):
        assert targets.weight_of(cross, loss, row) == 2
    assert targets.weight_of(cross, cross(ignore_index=2), row[:2]) == 1
    assert targets.weight_of(cross, cross(torch.tensor([1.0, 9.0, 3.0])), row) == 4
    soft = torch.ones(3, 2) / 2
    assert targets.weight_of(cross, cross(), soft) is None
    assert targets.weight_of(cross, cross(reduction="sum"), row) is None
    assert targets.weight_of(nn.MSELoss, nn.MSELoss(), soft) is None


def test_metrics_of_classes_get_probabilities_and_class_numbers():
    logits = torch.tensor([[0.2, 0.9], [0.8, 0.1]])  # between 0 and 1: not to be guessed
    scores, numbers = targets.for_classes(nn.CrossEntropyLoss, logits, torch.tensor([1, 0]))
    assert torch.equal(scores, logits.softmax(1))
    shares = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert targets.for_classes(nn.CrossEntropyLoss, logits, shares)[1].tolist() == [1, 0]
    given = targets.lined_up(logits[:, :1].half(), torch.tensor([[0.1], [0.9]]))
    scores, numbers = targets.for_classes(nn.BCEWithLogitsLoss, *given)
    assert torch.equal(scores, logits[:, 0].half().float().sigmoid())
    assert numbers.tolist() == [0, 1]
    assert torch.equal(
        targets.for_classes(nn.NLLLoss, logits.log(), numbers)[0], logits.log().exp()
    )


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (nn.Conv2d(3, 4, 3), torch.zeros(2, 8, 8, 3), r"X.transpose\(0, 3, 1, 2\) for an array"),
        (nn.BatchNorm1d(3), torch.zeros(1, 3), "last batch of one sample has no variance"),
        (nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 .*are float32"),
        (nn.Linear(3, 4), [1.0], "batches hold tensors"),
        (nn.Linear(3, 4).double(), torch.zeros(2, 3), r"a loader of your own, or write net.float"),
    ],
)
def test_inputs_that_a_network_cannot_take(layer, inputs, message):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        layer(inputs)
    assert re.search(message, targets.about_inputs(layer, inputs, str(caught.value)))
    assert targets.about_inputs(layer, torch.zeros(1), "a mistake in the user's network") == ""
