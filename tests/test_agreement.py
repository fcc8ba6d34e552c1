from __future__ import annotations

from lightkit import agreement
from lightkit.agreement import Agreement
from lightkit.distributed import LaunchEnv, Ranks
from lightkit.flow import Flow


class Two(Ranks):
    """Two ranks, of which the other one wants nothing."""

    def __init__(self) -> None:
        super().__init__(LaunchEnv(rank=0, world_size=2, launched=True))
        self.told: list[str] = []

    def exchange(self, numbers, what):
        self.told.append(what)
        return [list(numbers), [0.0] * len(numbers)]


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(agreement.time, "perf_counter", lambda: self.now)


def steps(agree, clock, number, seconds) -> int:
    """Makes so many steps of so many seconds; returns how often the ranks met."""
    before = len(agree._ranks.told)
    for _ in range(number):
        clock.now += seconds
        agree()
    return len(agree._ranks.told) - before


def test_ranks_meet_about_once_a_second_however_long_the_start_took(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    agree = Agreement(Flow(), Two())
    clock.now += 30.0  # loggers are imported
    agree.reach("the start of training")
    clock.now += 20.0  # the first step compiles
    assert 5 <= steps(agree, clock, 201, 0.01) <= 12  # in twos, until a second is over
    assert 9 <= steps(agree, clock, 1000, 0.01) <= 11
    assert 9 <= steps(agree, clock, 1000, 0.01) <= 11


def test_slow_steps_meet_at_each(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    agree = Agreement(Flow(), Two())
    assert steps(agree, clock, 10, 3.0) == 10


def test_validations_between_short_epochs_are_no_steps(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    agree = Agreement(Flow(), Two())
    met = []
    for _ in range(20):
        met.append(steps(agree, clock, 40, 0.01))
        clock.now += 60.0
        agree.reach("the end of a validation")
    assert met[0] <= 7
    assert set(met[1:]) == {1}
    assert 9 <= steps(agree, clock, 1000, 0.01) <= 15  # and still found once there is a second
