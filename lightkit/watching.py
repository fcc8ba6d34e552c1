"""Looks at every value that torch computes, for the operation that made the first nan or inf."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightkit.errors import NonFiniteError
from lightkit.explaining import DOORS, line_of, module_of, name_of, passes, seen
from lightkit.export import tensors_of

#: Operations that give what they are told to, or memory that holds anything.
_MADE = ("empty", "new_empty", "resize", "full", "new_full", "fill", "masked_fill", "scalar_tensor")


def unusual(*tensors: Tensor) -> str:
    """Returns "nan", "inf" or "" for what tensors hold. Waits for the device."""
    looked = [t for t in tensors if t.is_floating_point() and t.layout is torch.strided]
    looked = [t for t in looked if t.device.type != "meta" and not nn.parameter.is_lazy(t)]
    if any(bool(t.isnan().any()) for t in looked):  # host sync, as the next line
        return "nan"
    return "inf" if any(bool(t.isinf().any()) for t in looked) else ""


class Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operation made the first nan and which the first inf of finite values.

    Args:
        task: The task whose submodules are named.
        raising: Whether to raise `NonFiniteError` at the first nan, for the debugger.

    Attributes:
        found: What was found, in sentences, by "inf" and "nan".
    """

    def __init__(self, task: nn.Module, *, raising: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._task, self._raising = task, raising
        self.found: dict[str, str] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Computes, and looks at what went in and what came out."""
        given = tensors_of((args, kwargs or {}))
        before = unusual(*given)  # an operation in place changes them
        words = [_described(tensor) for tensor in given] if func._schema.is_mutable else []
        result = func(*args, **(kwargs or {}))
        after, name = unusual(*tensors_of(result)), func.overloadpacket.__name__
        if after and after != before and before != "nan" and not name.startswith(_MADE):
            words = words or [_described(tensor) for tensor in given]
            if after not in self.found:
                self.found[after] = self._sentence(name, after, words)
                if self._raising and after == "nan":
                    raise NonFiniteError(self.found[after])
        return result

    def _sentence(self, name: str, what: str, words: list[str]) -> str:
        frames: list[tuple[FrameType, int]] = []
        for frame, number in walk_stack(sys._getframe(2)):
            if passes(frame, DOORS):
                break
            frames.append((frame, number))
        frames.reverse()
        module, line = module_of(frames, self._task)[0], line_of(frames)
        lines = [f"{name} made the first {what}"]
        lines[0] += f", in {name_of(module, self._task)}" if module is not None else ""
        lines += [line[0]] if line is not None else []
        return "\n".join([*lines, *(f"  input {i}  {text}" for i, text in enumerate(words, 1))])


def _described(tensor: Tensor) -> str:
    """Returns the structure of a tensor and what its finite values lie between."""
    text = seen(tensor)
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or not tensor.numel():
        return text
    finite = tensor[tensor.isfinite()]
    if not finite.numel():
        return f"{text}, nothing finite"
    return f"{text} from {float(finite.min()):.4g} to {float(finite.max()):.4g}"  # host sync
