"""Lives that are cheap to start, and runs that were left alone to compare them with."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.faults.harness import Lives, Outcome
    from tests.faults.victim import Settings

#: Processes are forked, killed and looked at through /proc.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session")
def lives() -> Iterator[Lives]:
    from tests.faults.harness import Lives

    found = Lives()
    yield found
    found.close()


@pytest.fixture(scope="session")
def reference(
    lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Settings], Outcome]:
    """Returns the outcome of the same run that nobody killed; made once for each settings."""
    known: dict[str, Outcome] = {}

    def outcome(settings: Settings) -> Outcome:
        key = repr(dataclasses.replace(settings, root=""))
        if key not in known:
            root = tmp_path_factory.mktemp("left_alone")
            alone = dataclasses.replace(settings, root=str(root))
            known[key] = lives.run(alone, timeout=300.0)
        return known[key]

    return outcome


@pytest.fixture
def dies_and_is_the_same(
    lives: Lives, reference: Callable[[Settings], Outcome], tmp_path: Path
) -> Callable[..., Outcome]:
    """Kills a run, starts it again until it ends, and compares all that it leaves behind."""
    from tests.faults.victim import Settings

    def check(*kills: dict[str, Any], timeout: float = 60.0, **settings: Any) -> Outcome:
        given = Settings(root=str(tmp_path), **settings)
        expected, found = reference(given), lives.run(given, *kills, timeout=timeout)
        different = expected.differences(found)
        assert not different, "\n".join([str(kills), *different[:20]])
        return found

    return check
