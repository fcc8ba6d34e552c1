"""What to change where shapes, dtypes or devices do not fit, told only where it is certain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

#: Layers, their argument that an input must match, and in which of its dimensions.
_SIZES: tuple[tuple[type[nn.Module], str, int], ...] = (
    (nn.Linear, "in_features", -1),
    (_ConvNd, "in_channels", 1),
    (_BatchNorm, "num_features", 1),
    (nn.GroupNorm, "num_channels", 1),
    (nn.RNNBase, "input_size", -1),
    (nn.RNNCellBase, "input_size", -1),
    (nn.MultiheadAttention, "embed_dim", -1),
)
_NORMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
_CLASSES = ("cross_entropy", "nll_loss")


def mend(
    error: BaseException,
    module: nn.Module | None,
    inputs: Mapping[str, Any],
    loss: tuple[str, Any, Any, int] | None,
    names: Sequence[tuple[str, Any]],
    task: nn.Module,
) -> str:
    """Returns what to change; "" where that is not certain.

    Args:
        error: The exception.
        module: The innermost module that was called; None for none.
        inputs: What it was called with, by name.
        loss: The loss function of torch's that failed, its input, its target and the number that
            is no class; None for none.
        names: The tensors that the user's line could see.
        task: The task.
    """
    text = str(error)
    if "device-side assert" in text:
        return (
            "accelerator='cpu', which names the place. CUDA tells late, mostly of an index beyond an "
            "embedding, or of a target that is no class"
        )
    if "device" in text and (hint := _device(names, task)):
        return hint
    if loss is not None:
        return _classes(*loss[1:], text) if loss[0] in _CLASSES else _same(*loss[1:3], text)
    name, value = next(iter(inputs.items()), ("", None))
    if module is None or ".forward() " in text:  # called with too many or too few arguments
        return ""
    if isinstance(value, (list, tuple)) and "Tensor" in text:
        return (
            f"{name} is a {type(value).__name__}: take it apart, and give the tensor that is meant"
        )
    if not isinstance(value, Tensor):
        return ""
    weight = next(module.parameters(recurse=False), None)
    if weight is not None and weight.device != value.device:
        if all(one is not module for one in task.modules()):
            return "nn.ModuleList, or an attribute of the task: only then it moves with the task"
        return f"{name}.to({str(weight.device)!r}), where the weights are"
    if isinstance(module, nn.Embedding):
        return _index(name, value, module.num_embeddings, "num_embeddings")
    of_torch = type(module).__module__.startswith("torch.")  # another may turn ids into floats
    if of_torch and weight is not None and weight.dtype != value.dtype and "type" in text:
        made = ", or make it so in the data set (NumPy makes float64)"
        return f"{name}.to({weight.dtype}){made if value.dtype is torch.float64 else ''}"
    for kind, argument, dim in _SIZES:
        if isinstance(module, kind):
            return _size(module, argument, dim, name, value, text)
    return ""


def _size(module: Any, argument: str, dim: int, name: str, value: Tensor, text: str) -> str:
    """Returns how an input and the size that a layer was made for come together."""
    wanted, kind = getattr(module, argument), type(module).__name__
    if isinstance(module, _ConvNd):
        missing = module.weight.ndim - value.ndim
        if missing == 1 and wanted == 1:
            return f"{name}.unsqueeze(1), for the dimension of the channel"
        if missing:
            return ""
        if value.shape[1] != wanted == value.shape[-1] != value.shape[-2]:
            return f"{name}.movedim(-1, 1): torch takes channels as the second dimension"
    if "more than 1 value per channel" in text:
        return "drop_last=True in the training loader: its last batch has a single sample"
    if isinstance(module, _BatchNorm) and kind != (right := _NORMS.get(value.ndim, kind)):
        return f"{right} for an input of {value.ndim} dimensions"
    if value.ndim <= max(dim, 0) or (got := value.shape[dim]) == wanted:
        return ""
    if got % max(getattr(module, part, 1) for part in ("groups", "num_groups", "num_heads")):
        return ""
    if not isinstance(module, nn.Linear):
        return f"{kind}({argument}={got})"
    if value.ndim > 2 and math.prod(value.shape[1:]) == wanted:
        return f"{name}.flatten(1) before it"
    if value.ndim > 3:
        return "flatten or pool before it"
    return f"{kind}({argument}={got}), or flatten or pool differently before it"


def _device(names: Sequence[tuple[str, Any]], task: nn.Module) -> str:
    """Returns which of the tensors that a line could see are elsewhere than the task."""
    home = next((p.device for p in task.parameters()), None)
    away = [name for name, t in names if isinstance(t, Tensor) and t.ndim and t.device != home]
    if home is None or not away:
        return ""
    return (
        f"{' and '.join(away)} must be on {home}, as the task is: make a tensor with "
        f"device=self.device, or keep it with register_buffer"
    )


def _classes(output: Tensor, target: Tensor, ignored: int, text: str) -> str:
    """Returns what to change for a loss that takes the numbers of classes."""
    if target.shape == output.shape and not target.is_floating_point():
        return "target.argmax(1), as one-hot targets are no class numbers"
    if output.ndim > 1 and output.shape[1] == 1:
        return "binary_cross_entropy_with_logits, as the network has a single output"
    if target.ndim > 1 and output[:, :1].shape == target.shape:
        return f"target.squeeze(1){'' if target.dtype is torch.int64 else '.long()'}"
    if output.ndim > 2 and output.shape[:-1] == target.shape:
        return "input.movedim(-1, 1): torch takes classes as the second dimension"
    if target.dtype is not torch.int64 and "type" in text:
        if target.is_floating_point() and target.device.type == "cpu" and bool((target % 1).any()):
            return ""  # no class numbers at all
        return "target.long(), as class numbers are int64"
    if output.ndim > 1 and target.dtype is torch.int64:
        return _index("target", target, output.shape[1], "classes", ignored)
    return ""


def _same(output: Tensor, target: Tensor, text: str) -> str:
    """Returns what to change for a loss that takes an input and a target of one shape."""
    if target.shape == (*output.shape, 1):
        return "target.squeeze(-1)"
    if output.shape == (*target.shape, 1):
        return "input.squeeze(-1), the output of the network"
    if output.shape == target.shape and "ype" in text and not target.is_floating_point():
        return "target.float()"
    return ""


def _index(name: str, value: Tensor, size: int, what: str, ignored: int | None = None) -> str:
    """Returns which numbers of a tensor are no index below ``size``."""
    if value.dtype not in (torch.int32, torch.int64):
        return f"{name}.long()"
    if value.device.type != "cpu":  # it may not be readable any more
        return ""
    value = value if ignored is None else value[value != ignored]
    if not value.numel():
        return ""
    low, high = int(value.min()), int(value.max())  # on the CPU: no sync
    if low >= 0 and high < size:
        return ""
    return f"{name} goes from {low} to {high}, and allowed are 0 to {size - 1} ({what}={size})"
