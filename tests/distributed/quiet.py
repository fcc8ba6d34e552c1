"""Trainers for the processes of tests, which show nothing and write nothing."""

from __future__ import annotations

from typing import Any

import lightkit as lk


def quiet_trainer(**options: Any) -> lk.Trainer:
    """Returns a trainer on the CPU, with a seed and without a sanity check."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "seed": 3,
    }
    return lk.Trainer(**quiet | options)
