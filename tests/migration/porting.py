"""Changes in a program what docs/migrate-from-lightning.md tells to change: imports and two names."""

from __future__ import annotations

import types
from pathlib import Path

PROGRAMS = Path(__file__).parent / "programs"
CHANGES = {
    "import lightning as L": "import lightkit as L",
    "from lightning.pytorch.callbacks": "from lightkit.callbacks",
    "from lightning.pytorch.loggers": "from lightkit.loggers",
    "L.LightningModule": "L.TaskModule",
    "L.LightningDataModule": "L.DataModule",
}


def load(name: str, *, port: bool) -> types.ModuleType:
    """Returns a program as a module: as it is, or ported to lightkit."""
    path = PROGRAMS / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    for old, new in CHANGES.items() if port else ():
        source = source.replace(old, new)
    module = types.ModuleType(f"{name}_{'ported' if port else 'original'}")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
