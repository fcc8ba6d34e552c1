from __future__ import annotations

import pytest

from lightkit.distributed import LaunchEnv, SingleDevice, check_strategy, make_strategy
from lightkit.distributed.ddp import DDPStrategy
from lightkit.errors import ConfigError

ALONE = LaunchEnv()
ONE = LaunchEnv(launched=True)
TWO = LaunchEnv(world_size=2, local_world_size=2, launched=True)


@pytest.mark.parametrize(
    ("given", "env", "kind"),
    [
        ("auto", ALONE, SingleDevice),
        ("auto", ONE, SingleDevice),
        ("auto", TWO, DDPStrategy),
        ("ddp", ALONE, SingleDevice),
        ("ddp", ONE, DDPStrategy),
        ("ddp", TWO, DDPStrategy),
    ],
)
def test_what_a_name_means(given, env, kind) -> None:
    assert type(make_strategy(given, env, sync_batchnorm=False)) is kind


def test_an_object_is_taken_as_it_is() -> None:
    mine = DDPStrategy(find_unused_parameters=True)
    assert make_strategy(mine, TWO, sync_batchnorm=True) is mine
    assert mine.sync_batchnorm
    assert type(make_strategy(mine, ALONE, sync_batchnorm=False)) is SingleDevice


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("dpp", "strategy='dpp': allowed are 'auto', 'ddp'.*Did you mean 'ddp'"),
        (SingleDevice, r"Make an object of it: SingleDevice\(\)"),
        (None, "strategy=None"),
    ],
)
def test_what_is_none_is_named(given, words) -> None:
    with pytest.raises(ConfigError, match=words):
        check_strategy(given)
