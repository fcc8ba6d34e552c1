"""``Trainer(memory_format="channels_last")``: another layout, the same names, shapes and files."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.distributed import SingleDevice
from lightkit.distributed.fsdp import FSDPStrategy
from lightkit.errors import ConfigError

LAST = torch.channels_last


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.conv, self.volume = nn.Conv2d(3, 5, 3), nn.Conv3d(1, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 1)
        self.register_buffer("mask", torch.ones(1, 3, 6, 6))
        self.register_buffer("places", torch.zeros(1, 3, 6, 6, dtype=torch.long))
        self.seen = []

    def forward(self, x):
        return self.head(self.norm(self.conv(x * self.mask)).relu().mean((2, 3)))

    def step(self, batch):
        self.seen.append(is_last(batch["images"]))
        return nn.functional.mse_loss(self(batch["images"]), batch["nested"][0])

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        return self.step(batch)

    def predict_step(self, batch, batch_idx):
        return is_last(batch["images"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def is_last(tensor):
    return tensor.is_contiguous(memory_format=LAST) and not tensor.is_contiguous()


def collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"images": x, "nested": (y, {"flat": x[:, 0], "indices": x.long(), "name": "batch"})}


def loader(seed: int = 1) -> DataLoader:
    x = torch.randn(22, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.mean((1, 2, 3))[:, None]), 4, collate_fn=collate)


def net():
    torch.manual_seed(4)
    return Net()


def test_it_equals_a_loop_by_hand(quiet):
    task, hand = net(), net()
    history = quiet(max_epochs=2, memory_format="channels_last", fused=False).fit(task, loader())
    for tensor in (hand.conv.weight, hand.mask):
        tensor.data = tensor.data.to(memory_format=LAST)
    optimizer, losses = hand.configure_optimizers(), []
    for _ in range(2):
        for batch in loader():
            batch["images"] = batch["images"].to(memory_format=LAST)
            optimizer.zero_grad()
            loss = hand.step(batch)
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), len(batch["images"])))
    for name, value in hand.state_dict().items():
        assert torch.equal(task.state_dict()[name], value), name
    assert all(task.seen)
    second = losses[6:]
    mean = sum(loss * size for loss, size in second) / 22
    assert history[-1]["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_what_is_laid_out(quiet):
    task = net()
    quiet(memory_format="channels_last").fit(task, loader(), loader(seed=2))
    assert is_last(task.conv.weight)
    assert is_last(task.mask)
    assert task.places.is_contiguous()  # no floating tensor
    assert task.volume.weight.is_contiguous()
    assert is_last(task.conv.weight.grad)
    assert set(task.seen) == {True}  # in the validation as well


def test_entry_points_besides_fit(quiet):
    task = net()
    trainer = quiet(memory_format="channels_last")
    assert trainer.predict(task, loader()) == [True] * 6
    assert is_last(task.conv.weight)
    trainer.validate(task, loader())
    assert set(task.seen) == {True}


def test_without_it_nothing_changes(quiet):
    task = net()
    quiet().fit(task, loader())
    assert task.conv.weight.is_contiguous()
    assert set(task.seen) == {False}


def test_batches_that_hooks_of_the_user_make(quiet):
    class Own(Net):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return {**batch, "images": batch["images"].clone()}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "images": batch["images"].contiguous() * 2}

    task = Own()
    quiet(memory_format="channels_last", precision="64").fit(task, loader())
    assert set(task.seen) == {True}


def test_checkpoints_fit_everywhere(quiet):
    saver = lk.callbacks.ModelCheckpoint()
    how = {"enable_checkpointing": True, "callbacks": saver}
    task = net()
    quiet(max_epochs=1, memory_format="channels_last", **how).fit(task, loader())
    saved = torch.load(saver.last_model_path, weights_only=True)["model"]
    plain = Net()
    plain.load_state_dict(saved)
    assert plain.conv.weight.is_contiguous()
    for name, value in task.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    # a fit goes on from it in either layout
    ends = []
    for layout in (None, "channels_last"):
        other = Net()
        trainer = quiet(max_epochs=2, memory_format=layout)
        trainer.fit(other, loader(), ckpt_path=saver.last_model_path)
        assert trainer.global_step == 12
        ends.append(other.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


def test_a_strategy_lays_out_in_place():
    task = net()
    weight = task.conv.weight
    before = weight.detach().clone()
    SingleDevice().to_channels_last(task)
    assert task.conv.weight is weight
    assert is_last(weight)
    assert torch.equal(weight, before)


def test_a_lazy_layer_cannot_be_laid_out():
    with pytest.raises(ConfigError, match=r"conv\.weight belongs to a lazy layer.*configure_model"):
        SingleDevice().to_channels_last(nn.ModuleDict({"conv": nn.LazyConv2d(2, 3)}))


def test_a_sharded_model_cannot_be_laid_out(monkeypatch):
    monkeypatch.setattr(FSDPStrategy, "sharded", True)
    with pytest.raises(ConfigError, match="parts of parameters are contiguous"):
        FSDPStrategy().to_channels_last(net())


def test_what_may_not_be_given():
    words = "memory_format='chanels_last': allowed: None, 'channels_last'. Did you mean"
    with pytest.raises(ConfigError, match=words):
        lk.Trainer(memory_format="chanels_last")
