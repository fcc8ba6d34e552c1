"""``strategy="ddp"`` under torchrun with one process: NCCL where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import torchrun
from tests.gpu.scenes_one_rank import train


@pytest.mark.parametrize(
    ("gpus", "backend", "precision"),
    [
        pytest.param(1, "nccl", "32", marks=pytest.mark.gpu),
        pytest.param(1, "nccl", "16-mixed", marks=pytest.mark.gpu),
        (0, "gloo", "32"),
    ],
)
def test_one_rank_equals_one_process(tmp_path, gpus, backend, precision):
    target = "tests.gpu.scenes_one_rank:train"
    (found,) = torchrun(target, 1, tmp_path / "ranks", gpus=gpus, precision=precision)
    alone = train(gpus, precision, strategy="auto")
    assert backend in str(found["backend"])
    assert found["strategy"] == "DDPStrategy"
    assert (alone["backend"], alone["strategy"]) == (None, "SingleDevice")
    assert found["steps"] == alone["steps"] == 20
    assert found["moves"] == alone["moves"]
    assert found["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)
