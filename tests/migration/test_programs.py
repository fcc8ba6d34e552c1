"""Programs in Lightning's names give the same losses under both, ported as the page says (S0-02).

Where Lightning is missing (``pip install 'lightkit[migration]'``) they run under lightkit alone.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings

import pytest
import torch

from tests.migration.porting import PROGRAMS, load

NAMES = sorted(path.stem for path in PROGRAMS.glob("*.py"))
#: Means over an epoch are summed up in another order.
MEANS = ("val", "test")


def ported(name, folder):
    return load(name, port=True).main(str(folder), fused=False)


def original(name, folder):
    """Runs the program as it was written; what Lightning warns of is not ours."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(name, port=False).main(str(folder))


def test_there_are_five():
    assert NAMES == ["autoencoder", "dqn", "finetuning", "gan", "language_model"]


@pytest.mark.parametrize("name", NAMES)
def test_a_ported_program_runs(name, tmp_path):
    result = ported(name, tmp_path)
    losses = torch.stack(result["losses"])
    assert losses.isfinite().all()
    assert len(losses) >= 10
    if name not in ("gan", "dqn"):  # whose losses have no reason to fall
        assert losses[-4:].mean() < losses[:4].mean()


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="no Lightning here")
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_lightning(name, tmp_path):
    ours, theirs = ported(name, tmp_path / "ours"), original(name, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        how = {} if key in MEANS else {"rtol": 0, "atol": 0}  # else bit for bit
        torch.testing.assert_close(value, theirs[key], check_dtype=False, **how)
