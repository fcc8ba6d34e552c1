from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightkit.distributed import Ranks, SingleDevice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        self.unused = nn.Linear(2, 2)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()


def trained(scale: float = 100.0) -> Net:
    torch.manual_seed(0)
    net = Net()
    (net.training_step(torch.randn(4, 7), 0) * scale).backward()
    return net


def test_single_device_moves_binds_and_gives_the_state() -> None:
    strategy = SingleDevice()
    net = Net()
    strategy.setup(net)
    assert strategy.bind(net, "training_step") == net.training_step
    assert list(strategy.model_state(net)) == list(net.state_dict())
    assert (strategy.world_size, strategy.is_global_zero) == (1, True)
    assert strategy.sync_gradients is None
    assert strategy.after_backward(net) is None
    strategy.begin(torch.device("meta"), Ranks())
    strategy.setup(net)
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("scale", [100.0, 1e-3])
def test_clipping_by_norm_has_the_bits_of_plain_torch(scale: float) -> None:
    ours, plain = trained(scale), trained(scale)
    norm = SingleDevice().clip_grad_norm(list(ours.parameters()), 0.5)
    wanted = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    assert norm.shape == ()
    assert torch.equal(norm, wanted)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_clipping_by_value_has_the_bits_of_plain_torch() -> None:
    ours, plain = trained(), trained()
    SingleDevice().clip_grad_value(list(ours.parameters()), 0.1)
    nn.utils.clip_grad_value_(plain.parameters(), 0.1)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert max(p.grad.abs().max() for p in ours.parameters() if p.grad is not None) <= 0.1


def test_a_strategy_can_be_copied() -> None:
    assert copy.copy(SingleDevice()).device.type == "cpu"
