from __future__ import annotations

import io
import logging
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightkit import rng
from lightkit.errors import ConfigError


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_seed_gives_the_same_draws():
    assert rng.seed_everything(3) == 3
    first = draws()
    rng.seed_everything(3)
    assert draws() == first
    rng.seed_everything(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_seeding_equals_seeding_each_by_hand():
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    by_hand = draws()
    rng.seed_everything(7, workers=True)
    assert draws() == by_hand


def test_without_a_seed_one_is_drawn_and_repeats_the_run(caplog):
    with caplog.at_level(logging.INFO, logger="lightkit"):
        seed = rng.seed_everything()
    assert str(seed) in caplog.text
    first = draws()
    assert rng.seed_everything(seed, verbose=False) == seed
    assert draws() == first
    assert len({rng.seed_everything(verbose=False) for _ in range(8)}) == 8


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(5), True])
def test_valid_seeds(seed):
    assert rng.seed_everything(seed, verbose=False) == int(seed)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "7"])
def test_invalid_seeds_name_what_is_allowed(seed):
    with pytest.raises(ConfigError, match=r"0 to 4294967295 \(2\*\*32 - 1\), or None"):
        rng.seed_everything(seed)


def test_the_state_survives_a_file_that_is_loaded_safely():
    rng.seed_everything(1, verbose=False)
    random.gauss(0, 1)  # leaves a second number behind
    np.random.randn()
    file = io.BytesIO()
    torch.save(rng.rng_state(), file)
    first = draws(), random.gauss(0, 1), np.random.randn()
    file.seek(0)
    rng.set_rng_state(torch.load(file, weights_only=True))
    assert (draws(), random.gauss(0, 1), np.random.randn()) == first


def test_preserved_puts_everything_back_also_after_an_exception():
    before = rng.rng_state()
    first = draws()
    rng.set_rng_state(before)
    with rng.preserved():
        assert draws() == first
    with pytest.raises(ZeroDivisionError), rng.preserved():
        _ = draws() and 1 / 0
    assert draws() == first


def test_states_of_devices_that_are_not_here_are_left_out():
    state = rng.rng_state()
    state["cuda"] = [torch.get_rng_state()] * 64 if not torch.cuda.is_available() else []
    state["mps"] = torch.get_rng_state()
    rng.set_rng_state(state)


def test_numpy_that_nobody_imported_has_no_state(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    assert "numpy" not in rng.rng_state()


def test_seeding_works_without_numpy():
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch; from lightkit import rng\n"
        "rng.seed_everything(3); s = rng.rng_state(); a = torch.rand(3)\n"
        "rng.set_rng_state(s); assert torch.equal(a, torch.rand(3)); assert 'numpy' not in s\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_rank_gets_streams_of_its_own_from_a_common_state():
    found = {}
    for rank in (0, 1, 2, 1):
        rng.seed_everything(7, verbose=False)
        rng.for_rank(rank)
        assert found.setdefault(rank, now := draws()) == now
    rng.seed_everything(7, verbose=False)
    assert found[0] == draws(), "rank zero draws what one process draws"
    kinds = list(zip(*found.values(), strict=True))
    assert all(a != b != c != a for a, b, c in kinds)
    rng.for_rank(1)
    assert draws() != found[1], "another present state makes another stream"


def test_a_state_for_another_rank_is_made_without_touching_the_present_one():
    rng.seed_everything(7, verbose=False)
    state = rng.rng_state()
    rng.seed_everything(8, verbose=False)
    made, zero = rng.derived(state, 3), rng.derived(state, 0)
    first = draws()
    rng.seed_everything(8, verbose=False)
    assert draws() == first
    rng.set_rng_state(made)
    third = draws()
    rng.seed_everything(7, verbose=False)
    rng.for_rank(3)
    assert draws() == third
    rng.set_rng_state(zero)
    here = draws()
    rng.seed_everything(7, verbose=False)
    assert draws() == here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_states_are_kept_without_waiting_for_the_device():
    rng.seed_everything(5, verbose=False)
    torch.rand(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = rng.rng_state()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first = torch.rand(3, device="cuda").tolist()
    with rng.preserved():
        torch.rand(9, device="cuda")
    second = torch.rand(3, device="cuda").tolist()
    rng.set_rng_state(state)
    assert torch.rand(3, device="cuda").tolist() == first
    assert torch.rand(3, device="cuda").tolist() == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_that_wakes_up_inside_preserved_is_put_back():
    code = (
        "import torch; from lightkit import rng\n"
        "rng.seed_everything(3); assert not torch.cuda.is_initialized()\n"
        "with rng.preserved(): a = torch.rand(3, device='cuda').tolist()\n"
        "assert torch.rand(3, device='cuda').tolist() == a\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
