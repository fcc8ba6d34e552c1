"""A clock that stands still but where a test moves it, so that shares of time are exact."""

from __future__ import annotations

import time

import torch

PLACES = ("lightkit.timing._clock", "lightkit.data.stream._clock", "lightkit.advice._clock")


class Clock:
    """Stands for ``perf_counter`` wherever lightkit looks at it."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", self)
        for place in PLACES:
            monkeypatch.setattr(place, self)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow:
    """Batches that each take a while."""

    def __init__(self, clock, seconds, batches):
        self.clock, self.seconds, self.batches = clock, seconds, batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            self.clock.sleep(self.seconds)
            yield torch.ones(2, 4), torch.ones(2, 1)
