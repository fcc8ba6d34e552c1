"""Freezing: parameters, batch norms, and what survives a fit, a copy and a conversion."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit import freezing
from lightkit.distributed.ddp import DDPStrategy
from lightkit.errors import ConfigError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


class Net(lk.TaskModule):
    def __init__(self, bn="eval"):
        super().__init__()
        self.backbone, self.head = network()[:3], nn.Linear(4, 1)
        lk.freeze(self.backbone, bn=bn)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def loader(samples: int = 16) -> DataLoader:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3)) + 5
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def test_S0_09_a_frozen_part_gets_no_gradient_and_learns_nothing(quiet):
    task = Net()
    assert lk.is_frozen(task.backbone)
    assert not lk.is_frozen(task)
    before = copy.deepcopy(task.backbone.state_dict())
    seen = []

    class Watch(lk.Callback):
        def on_after_backward(self, trainer, task):
            seen.append([p.grad is None for p in task.backbone.parameters()])
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert {*map(id, held)} == {*map(id, task.head.parameters())}

    quiet(callbacks=[Watch()]).fit(task, loader(), loader(8))
    assert all(all(row) for row in seen)
    assert seen
    after = task.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("bn", ["eval", "update", "train"])
def test_S0_09_what_batch_norms_do(quiet, bn):
    task = Net(bn)
    norm, dropout = task.backbone[1], task.backbone[2]
    weight, mean = norm.weight.detach().clone(), norm.running_mean.clone()
    quiet(max_epochs=2).fit(task, loader(), loader(8))
    assert norm.weight.requires_grad == (bn == "train")
    assert torch.equal(norm.weight, weight) == (bn != "train")
    assert torch.equal(norm.running_mean, mean) == (bn == "eval")
    assert norm.training == (bn != "eval")
    assert dropout.training
    assert not task.backbone[0].weight.requires_grad


def test_S0_09_eval_mode_survives_train_and_ends_with_unfreeze():
    net = network()
    lk.freeze(net)
    norm = net[1]
    for mode in (True, False, True):
        assert net.train(mode) is net
        assert not norm.training
        assert net[2].training == mode
    assert norm.train() is norm
    lk.unfreeze(net)
    assert norm.training
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    assert not norm.training
    lk.freeze(norm)
    lk.unfreeze(net)
    assert not norm.training  # as the network that it is in
    net.train()
    assert norm.training


def test_a_copy_and_a_pickle_are_frozen_by_themselves():
    net = network()
    lk.freeze(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        other.train()
        assert not other[1].training
        lk.unfreeze(other)
        assert other[1].training
        assert not net[1].training
        assert net.state_dict().keys() == other.state_dict().keys()


def test_the_task_s_own_unfreeze_ends_it_too():
    task = Net()
    task.unfreeze()
    assert task.backbone[1].training
    assert not freezing.switches(task)["frozen"]


def test_switches_are_put_back_with_what_is_kept_in_eval_mode():
    task, other = Net(), Net("train")
    state = freezing.switches(task)
    assert state["kept"] == ["backbone.1"]
    freezing.set_switches(other, state)
    assert freezing.switches(other) == state
    other.train()
    assert not other.backbone[1].training
    freezing.set_switches(other, freezing.switches(Net("train")))
    other.train()
    assert other.backbone[1].training


def test_sync_batchnorm_is_kept_in_eval_mode_too():
    task = Net()
    strategy = DDPStrategy(sync_batchnorm=True)
    strategy.device = torch.device("cuda")  # all that is asked for; nothing is put there
    strategy._convert(task)
    task.train()
    assert isinstance(task.backbone[1], nn.SyncBatchNorm)
    assert not task.backbone[1].training


def test_another_policy_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'eval'"):
        lk.freeze(network(), bn="evl")
    with pytest.raises(ConfigError, match="takes a module, such as task.backbone; got"):
        lk.freeze(network().parameters())


def test_modes_come_back_but_what_was_frozen_meanwhile_stays_so():
    net = network()
    net[2].eval()
    with freezing.modes_kept(net):
        net.eval()
        net[2].train()
        lk.freeze(net[1])
    assert [part.training for part in net] == [True, False, False, True]
    with contextlib.suppress(ZeroDivisionError), freezing.modes_kept(net):
        net.eval()
        raise ZeroDivisionError
    assert net.training


def test_a_look_at_forward_leaves_no_trace():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("calls", torch.zeros(()))
            self.same = nn.Module()
            self.same.register_buffer("calls", self.calls)

        def forward(self, x):
            self.calls += 1
            return self.net(x) + torch.rand(())

    net, x = Counts(), torch.ones(2, 4)
    state, calls = torch.get_rng_state(), net.calls
    with freezing.at_rest(net):
        assert not net(x).requires_grad
        assert not net.training
        assert net.calls == 1
        assert net.same.calls is net.calls
    assert net.calls is calls
    assert net.same.calls is calls
    assert calls == 0
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert net(x).requires_grad
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with freezing.at_rest(lazy):
        pass


def test_what_a_task_logs_in_a_look_goes_nowhere():
    task = Net()
    metrics = object()  # would fail at the first call
    task._link.hold("trainer", metrics)
    with freezing.at_rest(task):
        assert task._link.trainer == "trainer"
        task.log("loss", 1.0)
    assert task._link.metrics is metrics
