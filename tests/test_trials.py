"""What trials look at in data, and put back."""

from __future__ import annotations

import collections
import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lightkit as lk
from lightkit import trials
from tests.small import Net, loader


class Held:
    """With all kinds of things that data hold."""

    def __init__(self):
        self.count, self.name, self.nothing, self.lazy = 0, "a", None, None
        self.recent, self.long = [1, 2], list(range(5000))
        self.cache, self.known, self.queue = {"a": 1}, {1}, collections.deque([1, 2], 3)
        self.made, self.order = torch.arange(3), np.arange(3)
        self.weights, self.array = torch.ones(3), np.ones(3)
        self.generators = {
            "torch": torch.Generator().manual_seed(1),
            "numpy": [np.random.default_rng(2), np.random.RandomState(3)],
            "python": random.Random(4),
        }

    def move(self):
        self.count, self.name, self.nothing, self.lazy = 5, "b", 7, object()
        self.recent.append(3)
        self.long.append(0)
        self.cache["b"] = 2
        self.known.add(2)
        self.queue.rotate(1)
        self.made, self.order = self.made + 1, self.order + 1
        self.weights *= 2
        self.array *= 2
        return self.draw()

    def draw(self):
        drawn = self.generators
        one, two = drawn["numpy"]
        own = float(torch.rand((), generator=drawn["torch"]))
        return own, one.random(), two.rand(), drawn["python"].random()


class Holding(Dataset):
    def __init__(self):
        self.transform = Held()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


class Rides(lk.Callback):
    def on_fit_start(self, trainer, task):
        held = trainer.train_dataloader.dataset.dataset.transform
        put_back = trials.keep(trainer._run)
        self.drawn = [held.move()]
        lazy = held.lazy
        put_back()
        state = held.count, held.name, held.nothing, held.recent, len(held.long), held.lazy
        assert state == (0, "a", None, [1, 2], 5000, lazy)  # what became a thing stays
        assert (held.cache, held.known, [*held.queue]) == ({"a": 1}, {1}, [1, 2])
        arrays = (held.made, held.order, held.weights, held.array)
        assert [one.tolist() for one in arrays] == [[0, 1, 2], [0, 1, 2], [1, 1, 1], [1, 1, 1]]
        self.drawn.append(held.draw())


def test_generators_and_counters_deep_in_the_data_come_back(quiet):
    rides = Rides()
    quiet(callbacks=rides, max_steps=0).fit(Net(), DataLoader(Subset(Holding(), range(4)), 2))
    assert rides.drawn[0] == rides.drawn[1]


class Lines(IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(self.source)


def test_what_gives_its_batches_once(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("1\n2\n")
    assert trials.gives_once(loader()) == ""
    assert trials.gives_once([1, 2]) == ""
    assert trials.gives_once(DataLoader(Lines([1, 2]))) == ""
    once = "the loader (DataLoader) holds a {}, which is read only once"
    with path.open() as file:
        assert trials.gives_once(DataLoader(Lines(file))) == once.format("TextIOWrapper")
    assert trials.gives_once(DataLoader(Lines(itertools.count()))) == once.format("count")
    assert trials.gives_once(iter([1])) == "the loader (list_iterator) gives its batches only once"


def test_data_are_found_but_neither_weights_nor_what_a_stream_holds():
    data, labels = torch.randn(2000, 4), list(range(2000))

    class Labelled(TensorDataset):
        labels: list

    held = Labelled(data)
    held.labels = labels
    task = Net()
    held.net, held.weight = nn.Linear(2, 2), task.net.weight
    found = trials.bulk(task, [DataLoader(held, 8)])
    assert {id(data), id(labels)} <= {id(one) for one in found}
    assert not any(one is p for one in found for p in (*task.parameters(), *held.net.parameters()))
    assert trials.bulk(task, [DataLoader(Lines(np.zeros(3000)))]) == []


class Hooked(Net):
    """With functions that hold the task, or what it holds."""

    def __init__(self):
        super().__init__()
        seen = self.seen = []
        self.net = nn.Linear(2, 2)
        self.net.register_forward_hook(lambda *_: seen.append(1))
        self.own = lambda: self
        self.again = (lambda function: lambda: function())(self.own)
        self.default = lambda held=self: held
        self.plain = nn.functional.relu
        if False:
            missing = 1
        self.empty = lambda: missing


def test_functions_of_a_copy_hold_the_copy():
    task = Hooked()
    twin = trials.copied(task, {})
    twin.net(torch.zeros(1, 2))
    assert (task.seen, twin.seen) == ([], [1])
    assert twin.own() is twin.again() is twin.default() is twin
    assert task.own() is task.again() is task.default() is task
    assert twin.plain is nn.functional.relu
