"""What is not seen through the callbacks; see tests/callbacks/test_averaging.py for the rest."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightkit.averages import Averages

EMA = {"avg_fn": None, "multi_avg_fn": get_ema_multi_avg_fn(0.7)}


def tensors():
    torch.manual_seed(0)
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    return {str(kind): torch.randn(3, 2).to(kind) for kind in kinds}


def changed(values, by=0.5):
    for tensor in values.values():
        tensor.mul_(by).add_(1)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
@pytest.mark.parametrize("how", [EMA, {"avg_fn": None, "multi_avg_fn": None}])
def test_the_bits_are_those_of_torch_for_every_kind(how, device):
    values = tensors()
    module = torch.nn.ParameterList(values.values())
    expected = AveragedModel(module, **how)
    averages = Averages([(k, v, False) for k, v in values.items()], [], device, how)
    for _ in range(4):
        changed(values)
        for parameter, value in zip(module, values.values(), strict=True):
            parameter.data.copy_(value)
        expected.update_parameters(module)
        averages.update()
    trained = {name: value.clone() for name, value in values.items()}
    averages.exchange()
    assert averages.shown
    for parameter, (name, value) in zip(expected.module, values.items(), strict=True):
        assert torch.equal(parameter.data, value), name
    averages.exchange()
    assert not averages.shown
    assert all(torch.equal(trained[name], value) for name, value in values.items())


def test_a_state_is_exchanged_whichever_is_shown():
    values, beside = tensors(), {"count": torch.tensor(3)}
    every = values | beside
    averages = Averages([(k, v, False) for k, v in values.items()], beside.items(), None, EMA)
    averages.update()
    changed(values)
    averages.update()
    one = dict(every)
    first = averages.put_into(one)
    one, first = ({k: v.clone() for k, v in state.items()} for state in (one, first))
    averages.exchange()
    other = dict(every)
    second = averages.put_into(other)
    for name in every:
        assert torch.equal(one[name], other[name])
        assert torch.equal(first[name], second[name])
    averages.exchange()
    again = Averages([(k, v, False) for k, v in values.items()], beside.items(), None, EMA)
    again.load(one, 2)
    for both in (averages, again):
        both.update()
    state, same = dict(every), dict(every)
    averages.put_into(state)
    again.put_into(same)
    assert all(torch.equal(state[name], same[name]) for name in every)
    assert again.updates == averages.updates == 3
