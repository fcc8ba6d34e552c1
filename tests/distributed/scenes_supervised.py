"""What the processes of test_supervised.py do. Called by all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lightkit as lk

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long() + (X[:, 0] > 0.5)
METRICS = ["accuracy", "f1_score", "auroc"]
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def everything() -> dict[str, Any]:
    """Fits at a rate of almost nothing, so that all epochs see the same network."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    how: dict[str, Any] = {"loss": "cross_entropy", "metrics": METRICS, "batch_size": 4}
    # Six batches to train on, one to validate on: with two ranks one has none.
    first, last = (X, Y), (X[-4:], Y[-4:])
    history = lk.fit(net, first, last, epochs=2, optimizer="sgd", lr=1e-12, **how, **QUIET)
    return {
        "history": [{**row, "time": 0.0, "step": 0} for row in history],
        "evaluated": lk.evaluate(net, last, **how, **QUIET),
        "predicted": lk.predict(net, X, batch_size=4, **QUIET),
    }
