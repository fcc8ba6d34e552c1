"""Hints that need no fit; `test_explaining` has those of whole steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightkit.mending import mend


def hint(text: str, module: nn.Module | None = None, **inputs: object) -> str:
    return mend(RuntimeError(text), module, inputs, None, [], module or nn.Linear(1, 1))


def test_what_cuda_tells_late_names_what_tells_at_once() -> None:
    assert "accelerator='cpu'" in hint("CUDA error: device-side assert triggered")


def test_nothing_is_said_where_it_is_not_certain() -> None:
    conv = nn.Conv2d(3, 4, 5)
    assert hint("Kernel size can't be greater", conv, input=torch.rand(2, 3, 4, 4)) == ""
    assert hint("shape '[2, 7]' is invalid for input of size 12") == ""
    assert hint("expected 3D or 4D input", conv, input=torch.rand(8, 8)) == ""
    assert hint("size of tensor", nn.Embedding(3, 2), input=torch.tensor([0, 2])) == ""
    assert hint("anything", nn.Linear(3, 2), input=object()) == ""


def test_losses_that_fit_are_not_blamed() -> None:
    def of_loss(name: str, output: Tensor, target: Tensor) -> str:
        return of(name, output, target, "dtype")

    labels = torch.zeros(4).long()
    assert of_loss("cross_entropy", torch.rand(5, 3), labels) == ""
    assert of_loss("mse_loss", torch.rand(4, 3), torch.rand(4)) == ""
    assert of_loss("nll_loss", torch.rand(4, 3), labels.int()) == (
        "target.long(), as class numbers are int64"
    )


def of(name: str, output: Tensor, target: Tensor, text: str, ignored: int = -100) -> str:
    loss = (name, output, target, ignored)
    return mend(RuntimeError(text), None, {}, loss, [], nn.Linear(1, 1))


def test_class_numbers_are_told_from_other_targets() -> None:
    column = torch.zeros(2, 1, 8, 8).long()
    assert of("cross_entropy", torch.rand(2, 5, 8, 8), column, "x") == "target.squeeze(1)"
    assert of("cross_entropy", torch.rand(4, 2), torch.rand(4), "dtype") == ""  # a regression
    single = of("cross_entropy", torch.rand(4, 1), torch.ones(4), "dtype")
    assert single.startswith("binary_cross_entropy_with_logits")
    beyond = torch.tensor([0, 255, 5])
    assert "goes from 0 to 5," in of("cross_entropy", torch.rand(3, 5), beyond, "x", ignored=255)
    assert of("cross_entropy", torch.rand(8, 2), torch.ones(4), "batch_size") == ""


def test_what_would_fail_again_is_not_told() -> None:
    depthwise = nn.Conv2d(32, 32, 3, groups=32)
    assert hint("channels", depthwise, input=torch.rand(2, 16, 8, 8)) == ""
    assert hint("channels", nn.GroupNorm(4, 16), input=torch.rand(8, 3, 4)) == ""
    heads = nn.MultiheadAttention(64, 8)
    assert hint("embedding", heads, query=torch.rand(5, 8, 30)) == ""
    wide = nn.Conv2d(16, 4, 3)  # as wide as it has channels: not channels last
    assert hint("channels", wide, input=torch.rand(8, 8, 16, 16)) == "Conv2d(in_channels=8)"
    image = torch.rand(4, 8, 6, 6)
    assert hint("mat1", nn.Linear(10, 2), input=image) == "flatten or pool before it"
    assert hint("scalar type", nn.Embedding(9, 2), input=torch.ones(3).byte()) == "input.long()"


class Own(nn.Module):
    """Has a weight of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(1, 5, 4))


def test_the_weight_of_a_module_of_the_user_tells_nothing_of_its_input() -> None:
    assert hint("expected same dtype", Own(), ids=torch.ones(2, 5).long()) == ""
