"""`lk.fit`, `lk.evaluate`, `lk.predict` on two ranks, against one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import scenes_supervised as scenes
from tests.distributed.harness import torchrun


def test_numbers_equal_one_process_also_where_a_rank_has_no_batch(tmp_path):
    alone = scenes.everything()
    for rank in torchrun("tests.distributed.scenes_supervised:everything", 2, tmp_path):
        assert rank["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-6)
        for row, wanted in zip(rank["history"], alone["history"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-6)
        torch.testing.assert_close(rank["predicted"], alone["predicted"])
