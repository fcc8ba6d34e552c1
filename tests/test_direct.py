"""`Update` and `Backward` do what ``optimizer.step()`` and ``loss.backward()`` do."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

import lightkit as lk
from lightkit import direct
from lightkit.direct import Backward, Update
from tests.small import Net, loader

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "differentiable": lambda p: torch.optim.SGD(p, lr=0.1, differentiable=False),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def train(net, step, backward, batches=8):
    torch.manual_seed(4)
    for _ in range(batches):
        for parameter in net.parameters():
            parameter.grad = None
        backward(net(torch.randn(5, 4)).square().mean())
        step()
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_same_bits(kind):
    mine, plain = model(), model()
    update = Update(OPTIMIZERS[kind](mine.parameters()))
    optimizer = OPTIMIZERS[kind](plain.parameters())
    ours = train(mine, update, Backward())
    theirs = train(plain, optimizer.step, lambda loss: loss.backward())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Counted(torch.optim.SGD):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


def test_a_step_of_the_users_own_class():
    optimizer = Counted(model().parameters(), lr=0.1)
    Update(optimizer)()
    assert optimizer.calls == 1


def watched(optimizer, calls):
    """Notes the calls of torch's wrapper, which makes the label for the profiler."""
    inner = optimizer._optimizer_step_code
    optimizer._optimizer_step_code = lambda: (calls.append(1), inner())


def test_the_wrapper_is_left_out_only_where_it_is_idle():
    calls: list[int] = []
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    watched(optimizer, calls)
    update = Update(optimizer)
    update()
    assert calls == []
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    assert calls == [1]
    assert "Optimizer.step#SGD.step" in {event.key for event in profiled.key_averages()}
    update()
    assert calls == [1]


@pytest.mark.parametrize("place", ["before", "after", "all"])
def test_hooks_that_come_and_go_are_called(place):
    calls: list[str] = []
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    update = Update(optimizer)
    update()
    register = {
        "before": optimizer.register_step_pre_hook,
        "after": optimizer.register_step_post_hook,
        "all": register_optimizer_step_post_hook,
    }[place]
    handle = register(lambda *_: calls.append(place))
    update()
    handle.remove()
    update()
    assert calls == [place]


def test_a_step_that_somebody_replaces_is_the_one_that_is_called(monkeypatch):
    calls: list[str] = []
    optimizer = Counted(model().parameters(), lr=0.1)
    update = Update(optimizer)
    optimizer.step = lambda: calls.append("object")
    update()
    Update(optimizer)()  # also where it was there before
    del optimizer.step
    monkeypatch.setattr(Counted, "step", lambda self: calls.append("class"))
    update()
    Update(optimizer)()
    assert calls == ["object", "object", "class", "class"]


def noting(step, calls):
    """A decorator as people write it: `wraps` copies torch's marks, too."""

    @functools.wraps(step)
    def wrapper(*arguments, **options):
        calls.append(1)
        return step(*arguments, **options)

    return wrapper


@pytest.mark.parametrize("schedule", [False, True])
def test_a_decorator_around_the_step_is_called(monkeypatch, schedule):
    calls: list[int] = []
    torch.optim.SGD(model().parameters(), lr=0.1)  # torch puts its wrapper around the class's step
    Decorated = type("Decorated", (torch.optim.SGD,), {"step": noting(torch.optim.SGD.step, calls)})
    optimizer = Decorated(model().parameters(), lr=0.1)
    if schedule:
        lr_scheduler.StepLR(optimizer, 1)
    Update(optimizer)()
    assert calls == [1]
    monkeypatch.setattr(torch.optim.SGD, "step", noting(torch.optim.SGD.step, calls))
    Update(torch.optim.SGD(model().parameters(), lr=0.1))()
    assert calls == [1, 1]


def test_schedules_know_that_a_step_was_taken():
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls: list[int] = []
    watched(optimizer, calls)
    Update(optimizer)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where no step came before
        schedule.step()
    assert (calls, optimizer.param_groups[0]["lr"]) == ([], 0.05)


def test_a_version_of_torch_without_the_names(monkeypatch):
    for name in ("_profiling", "_BEFORE", "_engine"):
        with monkeypatch.context() as patch:
            patch.setattr(direct, name, None)
            mine, plain = model(), model()
            ours = train(mine, Update(OPTIMIZERS["sgd"](mine.parameters())), Backward())
            optimizer = OPTIMIZERS["sgd"](plain.parameters())
            theirs = train(plain, optimizer.step, lambda loss: loss.backward())
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def test_an_engine_that_takes_other_arguments(monkeypatch):
    def engine(tensors, gradients):
        raise AssertionError("never asked with these arguments")

    monkeypatch.setattr(direct, "_engine", engine)
    net = model()
    Backward()(net(torch.ones(2, 4)).sum())
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_nothing_is_differentiated_before_the_first_loss(monkeypatch):
    """It starts autograd's threads, where there is a GPU, and workers are forked after that."""
    calls: list[int] = []
    monkeypatch.setattr(direct, "_engine", lambda *_, **__: calls.append(1))
    backward = Backward()
    assert not calls
    backward(model()(torch.ones(2, 4)).sum())
    assert calls


def test_an_engine_that_gives_something_else(monkeypatch):
    monkeypatch.setattr(direct, "_engine", lambda *_, **__: None)
    net = model()
    Backward()(net(torch.ones(2, 4)).sum())
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_formats_may_change_between_steps():
    backward = Backward()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        x = torch.ones((), dtype=dtype, requires_grad=True)
        backward(x * 3)
        assert x.grad == 3
        assert x.grad.dtype is dtype


def test_the_gradient_of_the_loss_is_one_even_if_somebody_changes_it():
    """A function that works in place on what it is given spoils no later step."""
    backward, seen = Backward(), []
    for _ in range(3):
        x = torch.ones((), requires_grad=True)
        loss = x * 2
        loss.register_hook(lambda grad: (seen.append(float(grad)), grad.mul_(5))[1])
        backward(loss)
        assert x.grad == 10
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("view", [torch.squeeze, lambda x: x.reshape(()), lambda x: x.view(())])
def test_a_gradient_is_not_shared_with_later_steps(view):
    """Old code clips through `.data`, of which no version counter knows."""
    backward = Backward()
    for _ in range(3):
        x = torch.ones(1, requires_grad=True)
        backward(view(x))
        assert x.grad == 1
        x.grad.data.mul_(0.5)


class Own(torch.Tensor):
    """A tensor of its own kind, which must be asked itself."""

    asked = 0

    def backward(self, *arguments, **options):
        type(self).asked += 1
        return super().backward(*arguments, **options)


def test_a_loss_of_its_own_kind():
    x = torch.ones((), requires_grad=True)
    Backward()((x * 2).as_subclass(Own))
    assert (Own.asked, x.grad) == (1, 2)


def test_errors_are_those_of_torch():
    x = torch.ones((), requires_grad=True)
    loss = (x * x).exp()
    backward = Backward()
    backward(loss)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(loss)
    with pytest.raises(RuntimeError, match="only for real scalar outputs"):
        backward(torch.complex(x, x))


def test_a_hook_registered_in_the_middle_of_a_fit(quiet):
    calls: list[int] = []

    class Hooks(lk.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            if batch_idx == 2:
                trainer.optimizers[0].register_step_post_hook(lambda *_: calls.append(batch_idx))

    trainer = quiet(max_epochs=1, callbacks=Hooks())
    trainer.fit(Net(), loader())
    assert len(calls) == trainer.global_step - 2
