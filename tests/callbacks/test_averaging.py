from __future__ import annotations

import copy
import os
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightkit as lk
from lightkit.callbacks import (
    EMA,
    SWA,
    EarlyStopping,
    ModelCheckpoint,
    Unfreeze,
    WeightAveraging,
)
from lightkit.checkpoint import read_checkpoint
from lightkit.errors import ConfigError
from lightkit.testing import assert_resumes_exactly
from tests.distributed.harness import torchrun
from tests.distributed.scenes_averaging import averaged, data


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # run folders go there


class Net(lk.TaskModule):
    """Batch norm, a schedule, and what the validations saw."""

    def __init__(self, norm=True):
        super().__init__()
        middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 1))
        self.seen, self.rates = [], []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.seen.append(float(loss))
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def loader(samples=22, seed=1):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


def trainer(*callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "fused": False}
    quiet |= {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0}
    return lk.Trainer(callbacks=[*callbacks], **quiet | options)


def hand_loop(net, epochs, after_step, end_epoch, shown):
    """A plain loop; returns the network, the losses of its validations, and the rates.

    ``end_epoch`` gets the number of the epoch and moves the schedule; ``shown`` returns what is
    validated.
    """
    net = copy.deepcopy(net)
    (optimizer,), (schedule,) = net.configure_optimizers()
    seen, rates = [], []
    for epoch in range(epochs):
        net.train()
        for x, y in loader():
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            nn.functional.mse_loss(net.net(x), y).backward()
            optimizer.step()
            after_step(net.net)
        end_epoch(epoch, net.net, optimizer, schedule)
        model = shown(epoch, net.net).eval()
        with torch.no_grad():
            for x, y in loader(9, seed=2):
                seen.append(float(nn.functional.mse_loss(model(x), y)))
    return net, seen, rates


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("use_buffers", [False, True])
def test_ema_is_that_of_a_loop_by_hand_bit_for_bit(use_buffers, tmp_path):
    """S0-19: averages of torch's AveragedModel; training, validations and the end are the same."""
    net = Net()
    average = AveragedModel(
        net.net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers
    )
    ours = copy.deepcopy(net)
    hand, seen, rates = hand_loop(
        net,
        3,
        average.update_parameters,
        lambda epoch, net, optimizer, schedule: schedule.step(),
        lambda epoch, net: average.module,
    )
    ema = EMA(0.8, use_buffers=use_buffers)
    trainer(ema, max_epochs=3, default_root_dir=tmp_path).fit(ours, loader(), loader(9, seed=2))
    assert ours.seen == seen
    assert ours.rates == rates
    for name, value in average.module.state_dict().items():
        if "num_batches" not in name:  # torch averages whole numbers too
            assert torch.equal(value, ours.net.state_dict()[name]), name
    assert ema.updates == int(average.n_averaged) == 18
    saved = read_checkpoint(next(tmp_path.rglob("last.ckpt")))
    trained = saved["callbacks"]["EMA"]["trained"]
    for name, value in hand.net.named_parameters():  # the training knew nothing of it
        assert torch.equal(trained[f"net.{name}"], value)
    for name, value in ours.net.named_parameters():
        assert torch.equal(saved["model"][f"net.{name}"], value)


@pytest.mark.parametrize("annealing", [0, 2])
def test_swa_is_that_of_a_loop_by_hand_bit_for_bit(annealing):
    """Mean, rates of SWALR from the start epoch on, and batch norms found anew."""
    net, schedules = Net(), []
    average = AveragedModel(net.net)
    ours = copy.deepcopy(net)

    def end_epoch(epoch, model, optimizer, schedule):
        if epoch >= 2:
            average.update_parameters(model)
            schedules[0].step()
            update_bn(loader(), average)
            return
        schedule.step()
        if epoch == 1:
            schedules.append(SWALR(optimizer, 0.05, anneal_epochs=annealing))

    _, seen, rates = hand_loop(
        net,
        5,
        lambda net: None,
        end_epoch,
        lambda epoch, net: net if epoch < 2 else average.module,
    )
    callback = SWA(0.05, swa_epoch_start=0.5, annealing_epochs=annealing)
    trainer(callback, max_epochs=5, enable_checkpointing=False).fit(
        ours, loader(), loader(9, seed=2)
    )
    assert ours.rates == rates
    assert ours.seen == seen
    same(ours.net, average.module)
    assert callback.updates == 3


@pytest.mark.parametrize("validated", [True, False])
def test_the_last_checkpoint_of_swa_has_its_batch_norms(validated, tmp_path):
    task, val = Net(), loader(9, seed=2) if validated else None
    run = trainer(SWA(0.05, swa_epoch_start=1), max_epochs=3, default_root_dir=tmp_path)
    run.fit(task, loader(), val)
    again = Net()
    again.load_weights(next(tmp_path.rglob("last.ckpt")))
    same(again, task)
    saved = read_checkpoint(next(tmp_path.rglob("last.ckpt")))["callbacks"]["SWA"]["trained"]
    assert not torch.equal(saved["net.1.running_mean"], task.net[1].running_mean)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 18}])
def test_every_checkpoint_of_swa_has_the_batch_norms_of_its_mean(limit, tmp_path):
    """Without a validation too, and whatever ends the fit."""
    saver = ModelCheckpoint(save_top_k=-1, every_n_epochs=1)
    trainer(SWA(0.05, 1), saver, default_root_dir=tmp_path, **limit).fit(Net(), loader())
    for step in (12, 18):
        task = Net()
        task.load_weights(next(tmp_path.rglob(f"step_0000{step}.ckpt")))
        found = copy.deepcopy(task.net)
        update_bn(loader(), found)
        assert torch.equal(task.net[1].running_mean, found[1].running_mean)


@pytest.mark.parametrize("rest", [lk.freeze, nn.Module.eval])
@pytest.mark.parametrize("validated", [True, False])
def test_swa_leaves_batch_norms_alone_that_rest(rest, validated):
    """A frozen backbone keeps its running means, and what comes behind it is found with them."""
    task = Net()
    task.net = nn.Sequential(*task.net[:2], nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    task.net[1].running_mean.fill_(3.0)
    rest(task.net[1])
    val = loader(9, seed=2) if validated else None
    run = trainer(SWA(0.05, 1), max_epochs=3, enable_checkpointing=False)
    run.fit(task, loader(), val)
    assert not task.net[1].training
    assert task.net[3].training
    assert task.net[3].momentum == 0.1
    assert task.net[1].running_mean.tolist() == [3.0] * 8
    with torch.no_grad():
        hidden = torch.stack([task.net[:3].eval()(x).mean(0) for x, _ in loader()])
    torch.testing.assert_close(task.net[3].running_mean, hidden.mean(0))


def test_swa_that_has_begun_goes_on_in_a_run_that_became_longer(tmp_path):
    """A share of more epochs begins later, but there is a mean already, and its rate."""
    trainer(SWA(0.05, 0.5), max_epochs=4, default_root_dir=tmp_path).fit(Net(), loader())
    swa = SWA(0.05, 0.5)
    longer = trainer(swa, max_epochs=12, default_root_dir=tmp_path)
    longer.fit(Net(), loader(), ckpt_path=next(tmp_path.rglob("last.ckpt")))
    assert swa.updates == 10


def test_swa_without_rates_leaves_the_schedule_alone():
    task, plain = Net(norm=False), Net(norm=False)
    for one, callbacks in ((task, [SWA(None, swa_epoch_start=0)]), (plain, [])):
        trainer(*callbacks, max_epochs=3, enable_checkpointing=False).fit(one, loader())
    assert task.rates == plain.rates


class Pointers(lk.Callback):
    """Where the weights are, and what they are, in and outside of validations."""

    def __init__(self):
        self.places, self.outside, self.inside = set(), [], []

    def look(self, task):
        self.places.add(tuple(p.data_ptr() for p in task.parameters()))
        return [p.detach().clone() for p in task.parameters()]

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.outside = self.look(task)

    def on_validation_end(self, trainer, task):
        self.inside = self.look(task)

    def on_train_epoch_end(self, trainer, task):
        after = self.look(task)
        assert all(torch.equal(a, b) for a, b in zip(after, self.outside, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(after, self.inside, strict=True))


def test_the_weights_of_the_training_come_back_in_place():
    pointers = Pointers()
    run = trainer(EMA(0.9), pointers, max_epochs=2, enable_checkpointing=False)
    run.fit(Net(), loader(), loader(9))
    assert len(pointers.places) == 1


def test_whoever_listens_to_the_end_of_a_validation_sees_the_average():
    task, seen = Net(), []

    def look(*_):
        seen.append(task.net[0].weight.detach().clone())

    run = trainer(
        lk.callbacks.LambdaCallback(on_validation_end=look), EMA(0.9),
        max_epochs=1, enable_checkpointing=False,
    )  # fmt: skip
    run.on("on_validation_end", look)
    run.fit(task, loader(), loader(9))
    assert len(seen) == 2
    assert all(torch.equal(one, task.net[0].weight) for one in seen)


def test_they_come_back_after_an_exception(tmp_path):
    class Failing(Net):
        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step > 6 and batch_idx == 1:
                self.inside = self.net[0].weight.detach().clone()
                raise RuntimeError("stopped")
            return super().validation_step(batch, batch_idx)

    task, plain = Failing(), Net()
    plain.load_state_dict(task.state_dict())
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(EMA(0.9), max_epochs=2, default_root_dir=tmp_path).fit(task, loader(), loader(9))
    trainer(max_epochs=2, enable_checkpointing=False).fit(plain, loader())
    same(task.net, plain.net)
    saved = read_checkpoint(next(tmp_path.rglob("last.ckpt")))  # saved after the exception
    assert torch.equal(saved["model"]["net.0.weight"], task.inside)
    assert torch.equal(saved["callbacks"]["EMA"]["trained"]["net.0.weight"], plain.net[0].weight)


def test_a_signal_in_a_validation_leaves_both(tmp_path):
    """It breaks the validation off, and the run goes on as if it never had been stopped."""

    class Stopped(Net):
        def validation_step(self, batch, batch_idx):
            if self.stop and self.trainer.current_epoch == 1 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    stopped, whole = Stopped(), Stopped()
    whole.load_state_dict(stopped.state_dict())
    stopped.stop, whole.stop = True, False
    options = {"max_epochs": 3, "default_root_dir": tmp_path}
    with pytest.raises(SystemExit):
        trainer(EMA(0.9), **options).fit(stopped, loader(), loader(17))
    again = Stopped()
    again.stop = False
    trainer(EMA(0.9), **options).fit(again, loader(), loader(17), ckpt_path="auto")
    trainer(EMA(0.9), max_epochs=3, enable_checkpointing=False).fit(whole, loader(), loader(17))
    same(again, whole)


def test_the_best_checkpoint_is_an_average(tmp_path):
    """S0-18: what is monitored, kept, restored and tested is the same network."""
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=-1, every_n_epochs=1)
    stopping = EarlyStopping("val_loss", restore_best=True, patience=10)
    task = Net()
    run = trainer(stopping, checkpoint, EMA(0.5), max_epochs=4, default_root_dir=tmp_path)
    history = run.fit(task, loader(), loader(9, seed=2))
    best = min(entry["val_loss"] for entry in history)
    assert float(run.validate(task, loader(9, seed=2))[0]["val_loss"]) == best
    for path, score in checkpoint.best_k_models.items():
        assert run.validate(task, loader(9, seed=2), ckpt_path=path)[0]["val_loss"] == score


def test_nothing_is_shown_before_the_first_update(caplog):
    task = Net()
    plain = copy.deepcopy(task)
    late = EMA(0.9, update_starting_at_step=100)
    trainer(late, max_epochs=2).fit(task, loader(), loader(9))
    trainer(max_epochs=2).fit(plain, loader(), loader(9))
    assert late.updates == 0
    assert "EMA averaged nothing" in caplog.text
    assert task.seen == plain.seen
    same(task, plain)


def test_updates_are_every_so_many_steps_from_a_step_on():
    ema = EMA(0.9, update_every_n_steps=2, update_starting_at_step=3)
    trainer(ema, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=False).fit(
        Net(), loader()
    )
    assert ema.updates == 1  # of 6 steps after step 5


def test_the_step_of_a_group_that_the_loader_tore(caplog):
    class Short(IterableDataset):
        def __len__(self):
            return 24

        def __iter__(self):
            return iter(loader(20).dataset)

    ema, options = EMA(0.9), {"max_epochs": 2, "accumulate_grad_batches": 3}
    run = trainer(ema, enable_checkpointing=False, **options)
    run.fit(Net(), DataLoader(Short(), 4))
    assert "ended after 2 of the 3 batches" in caplog.text
    assert ema.updates == run.global_step == 4


def test_a_subclass_says_when():
    class Ends(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            asked.append((step_idx, epoch_idx))
            return epoch_idx is not None

    asked, ends = [], Ends()
    trainer(ends, max_epochs=2, limit_train_batches=2, enable_checkpointing=False).fit(
        Net(), loader(), loader(9)
    )
    assert asked == [(0, None), (1, None), (None, 0), (2, None), (3, None), (None, 1)]
    assert ends.updates == 2


class Tied(Net):
    """Shared weights, and a mask of infinities among the buffers."""

    def __init__(self):
        super().__init__(norm=False)
        self.other = nn.Linear(4, 8)
        self.other.weight = self.net[0].weight
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("scale", torch.ones(1))

    def training_step(self, batch, batch_idx):
        self.scale += 1
        return super().training_step(batch, batch_idx)


def test_shared_weights_and_masks(tmp_path):
    task = Tied()
    run = trainer(EMA(0.5, use_buffers=True), max_epochs=2, default_root_dir=tmp_path)
    run.fit(task, loader())
    assert task.other.weight is task.net[0].weight
    assert torch.isneginf(task.mask[0, 1])
    assert 11 < float(task.scale) < 13
    again = Tied()
    again.load_weights(next(tmp_path.rglob("last.ckpt")))
    same(again, task)


@pytest.mark.parametrize("make", [lambda: SWA(0.05, 1), lambda: EMA(0.5, use_buffers=True)])
def test_buffers_that_have_two_names(make, tmp_path):
    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.norm = self.net[1]

    task = Twice()
    run = trainer(make(), max_epochs=3, default_root_dir=tmp_path)
    run.fit(task, loader(), loader(9))
    again = Twice()
    again.load_weights(next(tmp_path.rglob("last.ckpt")))
    same(again, task)


class Late(Net):
    """Its first layer joins the optimizer late, by a callback."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


def test_groups_that_join_after_the_start_of_swa():
    """They follow SWALR in proportion, also when the run goes on."""
    task = Late()
    run = trainer(SWA([0.05], 1, 2), Unfreeze({2: "net.0"}, decay=2), max_epochs=4)
    run.fit(task, loader())
    first, late = run.optimizers[0].param_groups
    assert (first["lr"], late["lr"]) == pytest.approx((0.05, 0.025))
    assert_resumes_exactly(
        Late,
        loader(),
        callbacks=lambda: [SWA([0.05], 1), Unfreeze({2: "net.0"}, decay=2)],
        max_epochs=4,
        accelerator="cpu",
    )


@pytest.mark.parametrize("make", [list, lambda: [EMA(0.9)], lambda: [SWA(0.05, 1)]])
@pytest.mark.parametrize("where", ["on_validation_batch_start", "on_validation_end"])
def test_what_is_saved_within_a_validation_goes_on_exactly(make, where, tmp_path):
    """Modules are in eval mode there, and averages are shown: neither is what goes on."""
    file = tmp_path / "there.ckpt"

    def save(trainer, task, *_):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(file)

    task, again = Net(), Net()
    saver = lk.callbacks.LambdaCallback(**{where: save})
    trainer(*make(), saver, max_epochs=3).fit(task, loader(), loader(9))
    trainer(*make(), max_epochs=3).fit(again, loader(), loader(9), ckpt_path=file)
    same(again, task)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: EMA(0.7), {}),
        (lambda: EMA(0.7, use_buffers=True, update_every_n_steps=2), {"val_check_interval": 3}),
        (lambda: SWA([0.05], swa_epoch_start=1, annealing_epochs=2), {}),
        (lambda: SWA(0.05, swa_epoch_start=0.0), {"val_check_interval": 2}),
    ],
    ids=["ema", "buffers", "swa", "swa within"],
)
def test_a_run_goes_on_exactly(make, options):
    assert_resumes_exactly(
        Net,
        loader(),
        loader(9, seed=2),
        callbacks=lambda: [make()],
        max_epochs=3,
        accelerator="cpu",
        **options,
    )


def test_weights_only_files_hold_the_average_alone(tmp_path):
    task = Net()
    checkpoint = ModelCheckpoint(save_weights_only=True)
    run = trainer(EMA(0.5), checkpoint, max_epochs=2, default_root_dir=tmp_path)
    run.fit(task, loader(), loader(9))
    saved = read_checkpoint(checkpoint.last_model_path)
    assert "callbacks" not in saved
    assert torch.equal(saved["model"]["net.0.weight"], task.net[0].weight)


class NoForward(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.BatchNorm1d(4)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class TwoInputs(Net):
    def forward(self, x, y):
        return self.net(x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EMA(1.5), "from 0 to 1"),
        (lambda: EMA(update_every_n_steps=0), "from 1"),
        (lambda: SWA(0.0), "above 0"),
        (lambda: SWA(torch.tensor(0.1)), "above 0"),
        (lambda: trainer(SWA([]), max_epochs=2).fit(Net(), loader()), "1 groups"),
        (lambda: SWA(0.1, swa_epoch_start=1.5), "share of max_epochs"),
        (lambda: SWA(0.1, annealing_strategy="cosine"), "Did you mean 'cos'"),
        (lambda: SWA(0.1, annealing_epochs=-1), "from 0"),
        (lambda: trainer(EMA(), SWA(0.1)).fit(Net(), loader()), "Two callbacks average"),
        (lambda: trainer(SWA(0.1), max_epochs=2).fit(NoForward(), loader()), "forward"),
        (lambda: trainer(SWA(0.1), max_epochs=2).fit(TwoInputs(), loader()), "of one argument"),
        (lambda: trainer(SWA(0.1), max_steps=2).fit(Net(), loader()), "share of max_epochs"),
        (lambda: trainer(SWA([0.1] * 2), max_epochs=2).fit(Net(), loader()), "1 groups"),
    ],
)
def test_what_cannot_be_is_said(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_a_trial_run_and_a_copy_of_what_was_used():
    for callback in (EMA(), SWA(0.1)):
        trainer(callback, fast_dev_run=True).fit(Net(), loader(), loader(9))
        assert callback.updates == 1
        assert pickle.loads(pickle.dumps(callback)).updates == 1


def test_the_names_of_others():
    assert lk.callbacks.EMAWeightAveraging is EMA
    assert lk.callbacks.StochasticWeightAveraging is SWA


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return torchrun("tests.distributed.scenes_averaging:both", 2, root, folder=str(root))


@pytest.mark.parametrize("kind", ["ema", "swa", "fsdp"])
def test_all_ranks_have_the_same_average(ranks, kind):
    """Also of a model of which each rank has a part; the checkpoints hold it whole."""
    first, other = (rank[kind] for rank in ranks)
    assert first["history"] == other["history"]
    assert first["best"] == pytest.approx(min(first["history"]))
    for name, value in first["weights"].items():
        assert torch.equal(value, other["weights"][name])
        assert torch.equal(value, first["saved"][name])
        assert torch.equal(value, first["resumed"][name])
        if name in first["trained"]["trained"] and "num_batches" not in name:
            assert not torch.equal(value, first["trained"]["trained"][name])


@pytest.mark.parametrize("kind", ["ema", "fsdp"])
def test_it_is_that_of_one_process(ranks, kind, tmp_path):
    alone = averaged(1, "ema", tmp_path)
    found = ranks[0][kind]
    assert found["history"] == pytest.approx(alone["history"], rel=1e-5)
    assert len(found["norms"]) == 4  # and so are the norms of `Statistics`
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_batch_norms_are_found_over_all_ranks(ranks):
    """The means over what the ranks found are those of one pass over all batches."""
    weights = ranks[0]["swa"]["weights"]
    hidden = torch.stack(
        [nn.functional.linear(x, weights["net.0.weight"], weights["net.0.bias"])
         for x, _ in DataLoader(data(), 4)]
    )  # fmt: skip
    torch.testing.assert_close(weights["net.1.running_mean"], hidden.mean((0, 1)))
    torch.testing.assert_close(weights["net.1.running_var"], hidden.var(1).mean(0))
