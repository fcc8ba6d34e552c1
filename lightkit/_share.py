"""Finds the templates and configurations that ship with lightkit, and copies templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lightkit.errors import ConfigError, did_you_mean

#: Never part of a copy: what running a template in place leaves behind.
_LEFTOVERS = frozenset({"__pycache__", ".pytest_cache", "runs"})


def share_dir(kind: Literal["templates", "configs"]) -> Path:
    """Returns the folder of the shipped templates or configurations.

    An installed wheel holds them inside the package; in a clone they lie beside it.

    Args:
        kind: Which of the two folders.

    Raises:
        FileNotFoundError: The installation lacks the folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_shared" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"This installation of lightkit has no {kind}; install it again.")


def templates() -> dict[str, str]:
    """Returns the name of each template with one line about it, sorted by name.

    The line is the title of the template's ``README.md``, without the name in front.
    """
    found = {}
    for readme in sorted(share_dir("templates").glob("*/README.md")):
        title = readme.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        name = readme.parent.name.replace("_", "-")
        found[name] = title.removeprefix(f"{name}:").strip()
    return found


def copy_template(name: str, target: str | Path) -> list[Path]:
    """Copies a template and its configuration into a new folder, ready to run there.

    The configuration becomes ``config.yaml``; class paths such as
    ``templates.digits.model.DigitsNet`` become ``model.DigitsNet``, which is what the copy can
    import when it is the current folder.

    Args:
        name: One of `templates`; ``_`` for ``-`` will do.
        target: The folder to make. It may exist when nothing is in it but ``.git`` and the like.

    Returns:
        The files written, sorted.

    Raises:
        ConfigError: There is no such template, or the target is not empty.
    """
    name, known = name.replace("_", "-"), templates()
    if name not in known:
        raise ConfigError(
            f"There is no template {name!r}.{did_you_mean(name, known)} "
            f"The templates are: {', '.join(known)}."
        )
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{str(target)!r} is a file. Choose another folder.")
    if target.exists() and any(not path.name.startswith(".") for path in target.iterdir()):
        raise ConfigError(f"{str(target)!r} exists and is not empty. Choose another folder.")
    name = name.replace("-", "_")  # a package of Python
    source = share_dir("templates") / name
    files = [
        file
        for file in source.rglob("*")
        if file.is_file() and _LEFTOVERS.isdisjoint(file.relative_to(source).parts)
    ]
    written = []
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        written.append(copy)
    config = (share_dir("configs") / f"{name}.yaml").read_text(encoding="utf-8")
    copy = target / "config.yaml"
    copy.write_text(_as_copied(name, config), encoding="utf-8")
    return sorted([*written, copy])


def _as_copied(name: str, config: str) -> str:
    """Rewrites a template's configuration for the folder that it is copied to."""
    config = re.sub(rf"\btemplates\.{re.escape(name)}\.", "", config)
    return config.replace(f"configs/{name}.yaml", "config.yaml")
