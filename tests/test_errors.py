"""The words of errors."""

from __future__ import annotations

import pytest

from lightkit.errors import ConfigError, OptimizerError, did_you_mean, one_of, ranks_named, some


def test_one_of():
    for value in ("step", "epoch", None):
        one_of("Timer: interval", value, ("step", "epoch", None))
    text = r"^Timer: interval='steps'; allowed are 'step', 'epoch' and None. Did you mean 'step'\?$"
    with pytest.raises(ConfigError, match=text):
        one_of("Timer: interval", "steps", ("step", "epoch", None))
    with pytest.raises(OptimizerError, match=r"^x=3; allowed are 'a' and 'b'.$"):
        one_of("x", 3, ("a", "b"), OptimizerError)


def test_some():
    assert some([]) == ""
    assert some("abcde") == "a, b, c, d, e"
    assert some("abcdef") == "a, b, c, d, e and 1 more"
    assert some(iter(range(6)), most=2) == "0, 1 and 4 more"


def test_ranks_named():
    assert ranks_named([3]) == "rank 3"
    assert ranks_named([0, 2]) == "ranks 0, 2"


def test_did_you_mean():
    assert did_you_mean("max_epoch", ["max_epochs", "devices"]) == " Did you mean 'max_epochs'?"
    assert did_you_mean("zzz", ["max_epochs"]) == ""
