"""Names of checkpoint files: templates with the epoch, the step and metrics in them."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping

from lightkit.checkpoint.files import SUFFIX
from lightkit.errors import ConfigError, did_you_mean


def check_template(template: str) -> list[str]:
    """Returns the names of the fields of a template such as ``"{epoch}-{val_loss:.2f}"``.

    Raises:
        ConfigError: It is no template, or leads out of the folder of the checkpoints.
    """
    shown = f"filename={template!r}"
    try:
        fields = [
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        ]
    except ValueError as error:
        raise ConfigError(
            f"{shown} is no template ({error}). Write, for example, '{{epoch}}-{{val_loss:.2f}}'."
        ) from None
    if "" in fields or not template:
        raise ConfigError(
            f"{shown} has an empty name. Write, for example, '{{epoch}}-{{val_loss:.2f}}'."
        )
    if os.path.isabs(template) or ".." in template.split("/"):
        raise ConfigError(f"{shown} is a path. Give the folder as dirpath= and only a name here.")
    return fields


def render(template: str, values: Mapping[str, float], auto_insert: bool) -> str:
    """Returns the file name, without suffix, that a template makes of ``values``.

    Args:
        template: For example ``"{epoch}-{val_loss:.2f}"``.
        values: The epoch, the step and the metrics.
        auto_insert: Write ``name=`` before each value: ``epoch=3-val_loss=0.12``. A ``/`` in a
            metric's name becomes ``_``.

    Raises:
        ConfigError: A name is not in ``values``, or a format does not fit its value.
    """
    parts: list[str] = []
    for literal, field, spec, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        if field not in values:
            raise ConfigError(
                f"filename={template!r} needs {field!r}, which is not logged."
                f"{did_you_mean(field, values)} There are: {', '.join(sorted(values))}."
            )
        value = values[field]
        try:
            text = format(value, spec or ("" if isinstance(value, int) else ".5g"))
        except ValueError as error:
            raise ConfigError(f"filename={template!r}, field {field!r}: {error}.") from None
        name = field.replace("/", "_").replace(os.sep, "_")
        if auto_insert and not literal.endswith(f"{name}="):
            text = f"{name}={text}"
        parts.append(text)
    rendered = "".join(parts)
    return rendered.removesuffix(SUFFIX)
