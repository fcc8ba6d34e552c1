"""What may be read of a task; `tests/distributed/test_ranks.py` has all_gather over ranks."""

from __future__ import annotations

import pytest
import torch

from lightkit.errors import NotRunningError, UsageError
from tests.small import Net


def test_what_is_known_without_a_trainer():
    task = Net()
    assert (task.current_epoch, task.global_step, task.global_rank, task.local_rank) == (0, 0, 0, 0)
    assert (task.logger, task.loggers, task.on_gpu) == (None, [], False)
    assert (task.device, task.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(NotRunningError, match="Net has no trainer yet"):
        _ = task.trainer


def test_all_gather_in_one_process():
    task, x = Net(), torch.ones(2, requires_grad=True)
    found = task.all_gather({"x": x, "numbers": [1, 2.5, True], "text": "a"}, sync_grads=True)
    assert found["x"] is x
    assert [t.dtype for t in found["numbers"]] == [torch.int64, torch.float32, torch.bool]
    assert found["text"] == "a"
    with pytest.raises(UsageError, match="group=3"):
        task.all_gather(x, group=3)
