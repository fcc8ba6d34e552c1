"""One process of `assert_same_on_ranks`: a program that torchrun starts, with a folder as argument."""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import sys
import traceback
from pathlib import Path
from typing import Any


def found(module: str, file: str, name: str) -> Any:
    """Returns a function of a module; the file is read where another, or none, has its name."""
    try:
        home = importlib.import_module(module)
    except ImportError:
        home = None
    if home is None or getattr(home, "__file__", None) != file:  # as a script, which is __main__
        spec = importlib.util.spec_from_file_location(f"{Path(file).stem}_of_ranks", file)
        assert spec is not None
        assert spec.loader is not None
        home = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = home
        spec.loader.exec_module(home)
    return operator.attrgetter(name)(home)


def main(folder: Path) -> None:
    """Trains what the function makes, and writes what came of it on this rank."""
    order = json.loads((folder / "order.json").read_text("utf-8"))
    sys.path[:] = order["path"]  # as where the proof was begun, not the folder of this file
    from lightkit.checkpoint import save_file
    from lightkit.distributed import launched
    from lightkit.testing.ranks import train

    rank = launched().rank
    try:
        result = train(found(*order["function"]), order["seed"], folder, order["options"])
    except Exception:
        (folder / f"error_{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    save_file(result, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
