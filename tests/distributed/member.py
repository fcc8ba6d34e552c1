"""One process of a torchrun test: calls a function and keeps what it returns for the test to read."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    """Calls ``module:function`` with the arguments as keywords."""
    target, arguments, root = sys.argv[1:4]
    torch.set_num_threads(1)
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    torch.save(result, Path(root) / f"rank_{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
