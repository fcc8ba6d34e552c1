"""Which strategy ``Trainer(strategy=)`` means."""

from __future__ import annotations

from typing import Any

from lightkit import elsewhere
from lightkit.distributed.env import LaunchEnv
from lightkit.distributed.strategies import SingleDevice, Strategy
from lightkit.errors import ConfigError, did_you_mean

#: What a strategy may be called.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "hsdp")


def check_strategy(given: Any) -> None:
    """Raises `ConfigError` for what is neither a name of a strategy nor one."""
    if isinstance(given, Strategy) or (isinstance(given, str) and given in STRATEGIES):
        return
    hint = ""
    if isinstance(given, str):
        known = elsewhere.STRATEGIES.get(given)
        hint = did_you_mean(given, STRATEGIES) if known is None else f" Write {known}."
    if isinstance(given, type) and issubclass(given, Strategy):
        hint = f" Make an object of it: {given.__name__}()."
    raise ConfigError(
        f"strategy={given!r}: allowed are {', '.join(map(repr, STRATEGIES))}, or a strategy object "
        f"such as DDPStrategy(find_unused_parameters=True).{hint}"
    )


def make_strategy(given: str | Strategy, env: LaunchEnv, *, sync_batchnorm: bool) -> Strategy:
    """Returns the strategy of a call.

    Args:
        given: As the Trainer was given it. "auto" is one device for one process, and data
            parallelism for several; "ddp" without a launcher is one device as well.
        env: This process among those that a launcher started.
        sync_batchnorm: Whether batch norms compute their means over all ranks.
    """
    check_strategy(given)
    name = given if isinstance(given, str) else given.name
    if name == "auto":
        name = "ddp" if env.world_size > 1 else "single_device"
    if name.startswith("ddp") and not env.launched:
        return SingleDevice()
    if not isinstance(given, str):
        strategy = given
    elif name == "single_device":
        strategy = SingleDevice()
    elif name in ("fsdp", "hsdp"):
        from lightkit.distributed.fsdp import FSDPStrategy

        strategy = FSDPStrategy.named(name)
    else:
        from lightkit.distributed.ddp import DDPStrategy

        strategy = DDPStrategy(find_unused_parameters=name.endswith("_true"))
    if sync_batchnorm:
        strategy.sync_batchnorm = True
    return strategy
