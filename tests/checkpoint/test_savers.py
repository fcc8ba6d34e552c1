"""What is asked before a save; arguments, names and neighbours: see test_model_checkpoint.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightkit import loops
from lightkit.checkpoint.savers import in_validation, leaves_a_state
from lightkit.errors import CheckpointError, DataError, NonFiniteError


def raised(call) -> BaseException:
    try:
        call()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


def fail(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("mine"), True),
        (DataError("an empty batch"), True),
        (NonFiniteError("nan"), False),
        (CheckpointError("disk full"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(143), False),
    ],
)
def test_by_the_kind_of_the_error(error, expected):
    assert leaves_a_state(raised(lambda: fail(error))) is expected


class Broken(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("half done")


def test_an_optimizer_in_the_middle_of_its_step_does_not():
    optimizer = Broken(nn.Linear(1, 1).parameters(), lr=0.1)
    assert not leaves_a_state(raised(optimizer.step))
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert not leaves_a_state(raised(lambda: optimizer.step(lambda: fail(ValueError()))))


def step_optimizer():
    raise ValueError("a function of the user's that is called so")


def test_names_of_the_user_do_not_matter():
    assert leaves_a_state(raised(step_optimizer))

    class Stepper:
        def step(self):
            raise ValueError

    assert leaves_a_state(raised(Stepper().step))


def test_an_error_elsewhere_is_in_no_validation():
    assert not in_validation(raised(lambda: fail(ValueError())))
    assert not in_validation(None)
    assert in_validation(raised(lambda: loops.validate(None)))


def test_the_update_of_the_loop_does_not():
    assert not leaves_a_state(raised(lambda: loops.step_optimizer(None, 0, None, None)))
