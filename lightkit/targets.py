"""How the outputs of a network and its targets fit the losses of torch and metrics of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightkit.errors import DataError

#: Losses of torch that take class numbers, and those that compare element by element.
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_ELEMENTS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.HingeEmbeddingLoss,
)
#: Those whose targets are 0 or 1 for each element, and those of them that take logits.
_BINARY = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
_LOGITS = _BINARY[1:]


def fitted(kind: Any, output: Any, target: Any) -> Any:
    """Returns the target as a loss of torch takes it, where only one thing can be meant.

    Args:
        kind: torch's class of the loss; None for a loss of the user's, which gets the target as it
            is.
        output: What the network returned.
        target: What the batch has.

    Raises:
        DataError: Shapes that would be stretched to fit each other, which is no comparison of each
            output with its target; or an output or a target that is no tensor.
    """
    if kind is None:
        return target
    for what, value in (("output of the network", output), ("target", target)):
        if not isinstance(value, Tensor):
            hint = "Give loss= a function of output and target that knows them."
            if isinstance(value, (int, float)):
                hint = "If these are single samples, make batches: DataLoader(samples, 32)."
            raise DataError(
                f"{kind.__name__} takes tensors, but the {what} is {seen(value)}. {hint}"
            )
    if kind in _CLASSES and not target.is_floating_point():
        if target.ndim == output.ndim and target.ndim > 1 and target.shape[1] == 1:
            target = target.squeeze(1)
        return target if target.dtype == torch.int64 else target.long()
    if kind in _ELEMENTS:
        if not target.is_floating_point():
            target = target.to(torch.get_default_dtype())
        if target.shape != output.shape:
            target = _reshaped(kind, output, target)
    return target


def _reshaped(kind: Any, output: Tensor, target: Tensor) -> Tensor:
    """Returns a target of ``(N,)`` as ``(N, 1)``, or the other way round, as the output is."""
    short, long = sorted((tuple(output.shape), tuple(target.shape)), key=len)
    if long == (*short, 1):
        return target.reshape(output.shape)
    one_more = output.ndim == target.ndim + 1
    hint = " For one class out of several use loss='cross_entropy'." if one_more else ""
    raise DataError(
        f"{kind.__name__} compares element by element, but the output has the shape "
        f"{tuple(output.shape)} and the target {tuple(target.shape)}. The network must return as "
        f"many numbers per sample as the target has.{hint}"
    )


def about_inputs(net: nn.Module, inputs: Any, error: str) -> str:
    """Returns what is wrong with inputs that a network could not take; "" where it is not known."""
    weight = next((p for p in net.parameters() if p.is_floating_point()), None)
    if "must be Tensor" in error:
        return (
            f"{type(net).__name__} cannot take the inputs ({seen(inputs)}), as batches hold tensors: "
            f"{error}. A DataLoader makes them of samples: DataLoader(samples, batch_size=32)."
        )
    if weight is None or not isinstance(inputs, Tensor):
        return ""
    name, own = type(net).__name__, str(weight.dtype).removeprefix("torch.")
    if inputs.dtype != weight.dtype and "type" in error:
        give = f"X.astype('{own}') for an array or a data frame, X.to(torch.{own}) for a tensor"
        if own == "float64":  # which would be shortened again
            give = "by a loader of your own, or write net.float()"
        return (
            f"{name} cannot compute with the inputs ({seen(inputs)}), as its weights are {own}: "
            f"{error}. Give them as {own}: {give}."
        )
    if "shape" not in error and "size" not in error and "channels" not in error:
        return ""
    hint = ""
    if "channels" in error and inputs.ndim == 4 and inputs.shape[-1] in (1, 3, 4):
        hint = (
            ". torch takes images as (N, channels, height, width): X.transpose(0, 3, 1, 2) for an "
            "array, X.permute(0, 3, 1, 2) for a tensor"
        )
    elif "more than 1 value per channel" in error:
        hint = (
            ". A last batch of one sample has no variance: choose another batch_size, or drop_last"
        )
    return f"{name} cannot take the inputs ({seen(inputs)}): {error}{hint}"


def about_target(kind: Any, output: Any, target: Any, error: str) -> str:
    """Returns what is wrong with a target that a loss of torch refused; "" where it is not known."""
    if kind is None:
        return ""
    name, both = kind.__name__, f"output: {seen(output)}; target: {seen(target)}"
    if kind in _CLASSES:
        classes = output.shape[1] if output.ndim > 1 else 0
        if target.is_floating_point():
            return (
                f"{name} takes the number of each sample's class, as whole numbers; the target "
                f"holds floats ({both}). If they are class numbers: y.astype('int64') for an "
                f"array, y.long() for a tensor. If they are measured values: loss='mse'."
            )
        if "out of bounds" in error:
            return (
                f"{name}: the classes of {classes} outputs per sample are numbered from 0 to "
                f"{classes - 1}, but: {error} Give the network as many outputs as there are "
                f"classes, and number them from 0."
            )
        hint = " If the rows are one-hot: y.argmax(1)." if output.shape == target.shape else ""
        return (
            f"{name} takes outputs (N, classes) and targets (N), for images (N, classes, height, "
            f"width) and (N, height, width): {error} ({both}).{hint}"
        )
    if kind is nn.BCELoss:
        return (
            f"BCELoss takes probabilities and targets, both from 0 to 1: {error} ({both}). Give the "
            f"network a sigmoid at its end, or use loss='bce_with_logits' without one."
        )
    return ""


def task_of(kind: Any, loss: Any, output: Any, target: Any) -> dict[str, Any]:
    """Returns what a metric of classes has to know, from the first batch; nothing where unknown.

    Args:
        kind: torch's class of the loss, or None.
        loss: The loss; one that ignores a class tells which.
        output: ``(N, classes)``, ``(N, labels)`` or ``(N)``, and more dimensions behind.
        target: The target as `fitted` returned it.
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return {}
    numbers = not target.is_floating_point()
    classes = output.shape[1] if output.ndim > 1 else 1
    if kind in _CLASSES or (
        kind is None and numbers and classes > 1 and output.ndim == target.ndim + 1
    ):
        found = {"task": "multiclass", "num_classes": classes}
        ignored = getattr(loss, "ignore_index", -100)
        # Leaving out waits for a GPU with each batch, so it is done only where something is ignored:
        # of class numbers of one dimension the first batch tells, which waits once.
        if kind in _CLASSES[:2] and (
            ignored != -100
            or target.ndim > 1
            or target.device.type == "cpu"
            or bool((target == ignored).any())
        ):
            found["ignore_index"] = ignored
        return found
    if output.shape == target.shape and (kind in _BINARY or (kind is None and numbers)):
        return {"task": "multilabel", "num_labels": classes} if classes > 1 else {"task": "binary"}
    return {}


def weight_of(kind: Any, loss: Any, target: Any) -> Tensor | None:
    """Returns what the loss of a batch is the mean of, where that is not its samples; else None.

    A loss of class numbers divides by the weights of the classes that are there, and leaves out
    those to be ignored. No host sync.
    """
    if kind not in _CLASSES[:2] or getattr(loss, "reduction", "mean") != "mean":
        return None
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    kept = target != getattr(loss, "ignore_index", -100)
    weights = getattr(loss, "weight", None)
    return kept.sum() if weights is None else (weights[target * kept] * kept).sum()


def for_classes(kind: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns probabilities and class numbers, as metrics of classes take them.

    torchmetrics guesses from each batch's values whether it got logits; the loss knows it.
    """
    if kind in _LOGITS:
        output = output.sigmoid()
    elif kind is nn.CrossEntropyLoss:
        if target.is_floating_point():  # probabilities of all classes
            target = target.argmax(1)
        output = output.softmax(1)
    elif kind is nn.NLLLoss:
        output = output.exp()
    if kind in _BINARY:
        target = (target > 0.5).long()
    return output, target


def lined_up(output: Any, target: Any) -> tuple[Any, Any]:
    """Returns one number per sample as ``(N,)``, and of at least 32 bits; all else as it is."""
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return output, target
    if output.is_floating_point() and output.element_size() < 4:
        output = output.float()
    if output.numel() == target.numel() == (len(output) if output.ndim else 1):
        return output.flatten(), target.flatten()
    return output, target


def seen(value: Any) -> str:
    """Returns the type and shape of a value for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"of type {type(value).__name__} with {', '.join(map(str, value))}"
    return f"of type {type(value).__name__}"
