"""The contenders. Each module has ``train(job)``, and ``REQUIRES`` with the package it needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.works import Job


@dataclass(frozen=True)
class Contender:
    """Somebody who trains.

    Attributes:
        title: The name in tables.
        module: The module here.
        package: The distribution that it needs, or None.
        imports: What a user imports, to measure the import; None for nothing beyond torch.
        variant: Handed to ``train``.
        work: The only work that it is for; empty for all.
    """

    title: str
    module: str
    package: str | None = None
    imports: str | None = None
    variant: str = ""
    work: str = ""

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        if self.package is None:
            return True
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    def load(self) -> Callable[[Job], None]:
        """Imports it, and returns what trains a job."""
        module: Any = importlib.import_module(f"tests.benchmarks.contenders.{self.module}")
        if not self.variant:
            return module.train
        return lambda job: module.train(job, self.variant)


#: The reference is the first one.
CONTENDERS = {
    "hand": Contender("loop by hand", "hand", "tqdm"),
    "silent": Contender("by hand, nothing logged or written", "hand", "tqdm", variant="silent"),
    "usual": Contender("by hand, `loss.item()` in each step", "hand", "tqdm", variant="usual"),
    "lightkit": Contender("lightkit", "ours", imports="lightkit"),
    "plain": Contender("lightkit, `fused=False`", "ours", variant="plain"),
    "choices": Contender(
        "lightkit, `TensorLoader`, channels_last", "ours", variant="choices", work="digits"
    ),
    "lightning": Contender("Lightning", "lightning", "lightning", "lightning"),
    "fabric": Contender("Fabric", "fabric", "lightning", "lightning.fabric"),
    "accelerate": Contender("accelerate", "accelerate", "accelerate", "accelerate"),
    "ignite": Contender("ignite", "ignite", "pytorch-ignite", "ignite.engine"),
}


def versions() -> str:
    """Returns the packages of the contenders that are installed, with their versions."""
    names = ["torch", *dict.fromkeys(c.package for c in CONTENDERS.values() if c.package)]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
