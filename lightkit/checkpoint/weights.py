"""Weights alone: from a checkpoint of lightkit or Lightning, or from a bare state dict."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightkit.checkpoint.files import read_any
from lightkit.errors import CheckpointError, some

_log = logging.getLogger("lightkit")


def load_weights(
    task: nn.Module, path: str | Path, *, strict: bool = True, prefix: str = ""
) -> None:
    """Loads weights into a network, in place and on the device where it is.

    Args:
        task: The network, or any part of it.
        path: A checkpoint of lightkit (its "model") or Lightning (its "state_dict"), or a file
            with a bare state dict.
        strict: Every name and shape must agree. False loads what fits and says what did not.
        prefix: Take only the names that begin so, without it: ``prefix="net."`` loads ``task.net``
            of the checkpoint into a bare ``net``.

    Raises:
        CheckpointError: The file cannot be read, holds no weights, or (strict) does not fit; or the
            network is on the meta device. Then nothing was changed.
    """
    apply_weights(task, weights_of(read_any(path), path), path, strict=strict, prefix=prefix)


def weights_of(checkpoint: Any, source: object) -> Mapping[str, Any]:
    """Returns the weights that a loaded file holds.

    Args:
        checkpoint: What was loaded.
        source: Where from, for the message.

    Raises:
        CheckpointError: There are none.
    """
    if isinstance(checkpoint, Mapping):
        for candidate in (checkpoint.get("model"), checkpoint.get("state_dict"), checkpoint):
            if isinstance(candidate, Mapping) and _is_state_dict(candidate):
                return candidate
        raise CheckpointError(
            f"{source} holds no weights: neither 'model' nor 'state_dict' is in it, and it is no "
            f"state dict itself. Its keys are {some(checkpoint)}."
        )
    raise CheckpointError(f"{source} holds a {type(checkpoint).__name__}, not weights.")


def apply_weights(
    module: nn.Module,
    weights: Mapping[str, Any],
    source: object,
    *,
    strict: bool = True,
    prefix: str = "",
) -> None:
    """Loads weights that are in memory; see `load_weights`."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:  # torch would copy nothing
            raise CheckpointError(
                f"{name} of {type(module).__name__} is on the meta device, without memory to load "
                f"{source} into. Build it without torch.device('meta'); or load the weights in its "
                f"init_weights(self), which is called when there is memory."
            )
    chosen = _without_prefix(weights, prefix)
    if prefix and not chosen:
        raise CheckpointError(
            f"No name in {source} begins with {prefix!r}. The names are {some(weights)}."
        )
    chosen = _as_held(chosen, module)
    mismatch = _Mismatch(module, chosen)
    if not strict:
        for name in mismatch.shapes:
            del chosen[name]
    # Hooks of modules may rename, so only loading tells whether what differs is wrong. By then torch
    # has copied what fits.
    before = mismatch.copy() if strict and mismatch.described() else {}
    try:
        module.load_state_dict(chosen, strict=strict)
    except RuntimeError as error:
        mismatch.put_back(before)
        raise CheckpointError(
            f"The weights of {source} do not fit {type(module).__name__}: "
            f"{mismatch.described() or error}.{mismatch.hint()} strict=False loads what fits."
        ) from None
    if not strict and mismatch.described():
        _log.warning("Loaded what fits of %s: %s.", source, mismatch.described())


def _as_held(weights: OrderedDict[str, Any], module: nn.Module) -> OrderedDict[str, Any]:
    """Returns weights as a module takes them, where it or they are sharded; else themselves."""
    own = module.state_dict()
    in_parts = any(hasattr(value, "device_mesh") for value in own.values())
    if not in_parts and not any(hasattr(value, "whole") for value in weights.values()):
        return weights
    from lightkit.checkpoint import placing

    return placing.placed(weights, own)


class _Mismatch:
    """What differs between the names and shapes of a network and of some weights."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Any]) -> None:
        own = self._state = module.state_dict()
        self.own, self.given = list(own), list(weights)
        self.missing = [name for name in own if name not in weights]
        self.unexpected = [name for name in weights if name not in own]
        self.shapes: dict[str, str] = {}
        for name, value in own.items():
            given = weights.get(name)
            if not isinstance(given, Tensor) or not isinstance(value, Tensor):
                continue
            if not nn.parameter.is_lazy(value) and value.shape != given.shape:
                self.shapes[name] = f"{name} (file {tuple(given.shape)}, here {tuple(value.shape)})"

    def copy(self) -> dict[str, Tensor]:
        """Returns copies of all tensors of the network."""
        tensors = {k: v for k, v in self._state.items() if isinstance(v, Tensor)}
        return {k: v.clone() for k, v in tensors.items() if not nn.parameter.is_lazy(v)}

    def put_back(self, copies: Mapping[str, Tensor]) -> None:
        """Puts back what `copy` returned."""
        for name, value in copies.items():
            self._state[name].copy_(value)

    def described(self) -> str:
        """Returns the differences in words, a few names of each kind; "" if there are none."""
        parts = []
        for names, what in (
            (self.missing, "missing in the file"),
            (self.unexpected, "unknown here"),
            (list(self.shapes.values()), "of another shape"),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {some(names)}")
        return "; ".join(parts)

    def hint(self) -> str:
        """Returns what to change where only a prefix differs."""
        if not self.missing or not self.unexpected:
            return ""
        for long, short, advice in (
            (self.given, self.own, "The names fit with prefix={0!r}."),
            (self.own, self.given, "The file fits the part {1!r}: load it into that."),
        ):
            present = set(long)
            for name in long:
                if name.endswith(f".{short[0]}"):
                    prefix = name[: -len(short[0])]
                    if all(prefix + other in present for other in short):
                        return " " + advice.format(prefix, prefix.rstrip("."))
        return ""


def _without_prefix(weights: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """Returns the weights under a prefix, with the version notes that torch keeps beside them."""
    cut = len(prefix)
    chosen = OrderedDict((k[cut:], v) for k, v in weights.items() if k.startswith(prefix))
    notes = getattr(weights, "_metadata", None)
    if notes is not None:
        stem = prefix.rstrip(".")
        chosen._metadata = OrderedDict(  # type: ignore[attr-defined]
            ("" if name == stem else name[cut:], note)
            for name, note in notes.items()
            if name == stem or name.startswith(prefix)
        )
    return chosen


def _is_state_dict(candidate: Mapping[Any, Any]) -> bool:
    """Tells whether a mapping is from names to tensors (extra states of modules may be others)."""
    return all(isinstance(name, str) for name in candidate) and (
        not candidate
        or any(isinstance(value, Tensor) or hasattr(value, "whole") for value in candidate.values())
    )
