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
        loss = (name, output, target)
        return mend(RuntimeError("sizes"), None, {}, loss, [], nn.Linear(1, 1))

    labels = torch.zeros(4).long()
    assert of_loss("cross_entropy", torch.rand(5, 3), labels) == ""
    assert of_loss("mse_loss", torch.rand(4, 3), torch.rand(4)) == ""
    assert of_loss("nll_loss", torch.rand(4, 3), labels.int()) == (
        "target.long(), as class numbers are int64"
    )
