"""Tasks that were built without memory, in one process; test_fsdp.py has them on ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit.distributed import Ranks
from lightkit.distributed.meta import materialise
from lightkit.distributed.strategies import is_meta
from lightkit.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def validation_step(self, batch, batch_idx):
        return self.net(batch).mean()


class Own(Net):
    def init_weights(self):
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def on_meta(kind):
    with torch.device("meta"):
        return kind()


def test_modules_set_their_values():
    task = on_meta(Net)
    assert is_meta(task)
    torch.manual_seed(3)
    materialise(task, CPU, Ranks())
    assert not is_meta(task)
    assert 0.1 < float(task.net[0].weight.detach().std()) < 0.6
    assert torch.equal(task.net[1].running_var, torch.ones(4))
    other = on_meta(Net)
    torch.manual_seed(3)
    materialise(other, CPU, Ranks())
    assert all(
        torch.equal(a, b) for a, b in zip(task.parameters(), other.parameters(), strict=True)
    )


def test_the_task_sets_all_values():
    task = on_meta(Own)
    materialise(task, CPU, Ranks())
    assert all(bool((p == 0.5).all()) for p in task.parameters())
    assert torch.equal(task.net[1].running_mean, torch.zeros(4))


class Tied(lk.TaskModule):
    def __init__(self, path=None):
        super().__init__()
        self.path = path
        self.inp, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.inp.weight


class Loaded(Tied):
    def init_weights(self):
        self.load_weights(self.path)


def test_two_names_of_a_parameter_stay_two_names():
    task = on_meta(Tied)
    materialise(task, CPU, Ranks())
    assert task.out.weight is task.inp.weight
    assert len(list(task.parameters())) == 1


def test_weights_are_loaded_when_there_is_memory(tmp_path):
    path = tmp_path / "weights.ckpt"
    whole = Tied()
    torch.save(whole.state_dict(), path)
    task = on_meta(lambda: Loaded(path))
    with pytest.raises(CheckpointError, match=r"inp\.weight of Loaded is on the meta device"):
        task.load_weights(path)
    materialise(task, CPU, Ranks())
    assert torch.equal(task.out.weight, whole.inp.weight)
    assert task.out.weight is task.inp.weight


def test_what_has_values_keeps_them():
    task = on_meta(Net)
    task.net[0] = nn.Linear(3, 4)
    before = task.net[0].weight.detach().clone()
    materialise(task, CPU, Ranks())
    assert torch.equal(task.net[0].weight, before)


def test_only_one_number_is_drawn_from_the_stream():
    torch.manual_seed(3)
    torch.randint(2**62, ())
    expected = torch.rand(2)
    torch.manual_seed(3)
    materialise(on_meta(Net), CPU, Ranks())
    assert torch.equal(torch.rand(2), expected)


def test_values_that_nobody_sets_are_named():
    task = on_meta(Net)
    task.extra = on_meta(Scaled)
    with pytest.raises(ConfigError, match="nothing says the first values of extra"):
        materialise(task, CPU, Ranks())

    class Forgets(Own):
        def init_weights(self):
            nn.init.zeros_(self.net[0].weight)

    with pytest.raises(ConfigError, match=r"these got no values: net\.0\.bias"):
        materialise(on_meta(Forgets), CPU, Ranks())


def test_a_trainer_of_one_process_takes_it():
    task = on_meta(Net)
    trainer = lk.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    (result,) = trainer.validate(task, DataLoader(torch.ones(4, 3), 2), verbose=False)
    assert abs(result["val_loss"]) < 10
