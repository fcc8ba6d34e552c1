"""Which modules are put together one at a time; test_fsdp.py shards them on ranks."""

from __future__ import annotations

import pytest
from torch import nn

import lightkit as lk
from lightkit.distributed.blocks import blocks, check_parameters
from lightkit.errors import ConfigError


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(2, 2), nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


class Chosen(Net):
    chosen = ()

    def configure_sharding(self):
        return [getattr(self, name) for name in self.chosen]


def test_the_children_of_lists_are_blocks():
    task = Net()
    assert blocks(task) == [task.blocks[1], task.blocks[0]]  # inner and later ones first


def test_a_task_says_what_its_blocks_are():
    task = Chosen()
    task.chosen = ("inp", "out")
    assert set(blocks(task)) == {task.inp, task.out}
    task.chosen = ("inp", "blocks")
    with pytest.raises(ConfigError, match=r"Return the modules in it, .*\*self\.blocks"):
        blocks(task)


def test_one_parameter_is_of_one_block():
    task = Net()
    task.out.weight = task.inp.weight
    check_parameters(task, blocks(task))  # both are with the task itself
    check_parameters(task, [])
    with pytest.raises(ConfigError, match=r"inp\.weight and out\.weight of Net are one parameter"):
        check_parameters(task, [task.inp])
    task.blocks[1] = task.blocks[0]  # one block that is used twice
    check_parameters(task, blocks(task))
    task.blocks[1] = nn.Linear(2, 2)
    task.blocks[1].bias = task.blocks[0].bias
    with pytest.raises(ConfigError, match=r"blocks\.0\.bias and blocks\.1\.bias"):
        check_parameters(task, blocks(task))
