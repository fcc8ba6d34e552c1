from __future__ import annotations

from typing import Any

import pytest
import torch

from lightkit.distributed import resolve_device
from lightkit.errors import ConfigError


def cards(monkeypatch: pytest.MonkeyPatch, count: int, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("present", "arguments", "device"),
    [
        (0, {}, "cpu"),
        (1, {}, "cuda:0"),
        (4, {}, "cuda:0"),
        (4, {"accelerator": None, "devices": None}, "cuda:0"),
        (4, {"accelerator": "cpu"}, "cpu"),
        (4, {"accelerator": "CPU", "devices": 1}, "cpu"),
        (4, {"accelerator": "gpu"}, "cuda:0"),
        (4, {"accelerator": "cuda", "devices": 1}, "cuda:0"),
        (4, {"devices": 1}, "cuda:0"),
        (4, {"devices": "1"}, "cuda:0"),
        (4, {"devices": [2]}, "cuda:2"),
        (4, {"devices": "2,"}, "cuda:2"),
        (4, {"accelerator": "gpu", "devices": [3]}, "cuda:3"),
        (1, {"devices": -1}, "cuda:0"),
        (0, {"devices": -1}, "cpu"),
        (0, {"devices": 1}, "cpu"),
        (4, {"gpus": 0}, "cpu"),
        (0, {"gpus": 0}, "cpu"),
        (0, {"gpus": "0", "accelerator": "cpu"}, "cpu"),
        (4, {"gpus": 1}, "cuda:0"),
        (4, {"gpus": "1"}, "cuda:0"),
        (4, {"gpus": 1, "accelerator": "gpu"}, "cuda:0"),
        (4, {"gpus": [1]}, "cuda:1"),
        (4, {"gpus": (1,)}, "cuda:1"),
        (1, {"gpus": -1}, "cuda:0"),
        (1, {"gpus": "-1"}, "cuda:0"),
        (4, {"gpus": "auto"}, "cuda:0"),
        (0, {"gpus": "auto"}, "cpu"),
    ],
)
def test_choices(
    monkeypatch: pytest.MonkeyPatch, present: int, arguments: dict[str, Any], device: str
) -> None:
    cards(monkeypatch, present)
    assert resolve_device(**arguments) == torch.device(device)


def test_mps_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 0, mps=True)
    assert resolve_device() == torch.device("cpu")
    assert resolve_device("mps") == torch.device("mps")
    cards(monkeypatch, 0)
    with pytest.raises(ConfigError, match="Apple GPU"):
        resolve_device("mps")


@pytest.mark.parametrize(
    ("present", "arguments", "words"),
    [
        (0, {"gpus": 1}, r"gpus=1 asks for a GPU, but.*Trainer\(gpus=0\) or Trainer\(acc"),
        (0, {"gpus": -1}, "torch sees none"),
        (0, {"gpus": [0]}, "torch sees none"),
        (0, {"devices": [0]}, "torch sees none"),
        (0, {"accelerator": "gpu"}, 'accelerator="gpu" asks for a GPU'),
        (4, {"gpus": 4}, "gpus=4 asks for more than one device, which this version"),
        (0, {"gpus": 4}, "gpus=4 asks for more than one device"),
        (4, {"devices": 4}, "devices=4 asks for more than one device"),
        (0, {"devices": 4}, "devices=4 asks for more than one device"),
        (4, {"gpus": "0,1"}, "more than one device"),
        (4, {"devices": -1}, "asks for all 4 GPUs"),
        (4, {"gpus": -1}, "asks for all 4 GPUs"),
        (2, {"gpus": [2]}, "selects card 2, but there are only 2: 0 to 1"),
        (4, {"devices": 0}, 'devices=0 leaves nothing.*accelerator="cpu"'),
        (4, {"gpus": 1, "devices": 1}, "gpus=1 and devices=1"),
        (4, {"gpus": 0, "accelerator": "gpu"}, 'gpus=0 .*accelerator="gpu"'),
        (4, {"gpus": 1, "accelerator": "cpu"}, 'gpus=1 .*accelerator="cpu"'),
        (4, {"gpus": 1, "accelerator": "mps"}, 'gpus=1 .*accelerator="mps"'),
        (4, {"accelerator": "cpu", "devices": [0]}, "selects a card"),
        (4, {"accelerator": "gpus"}, "accelerator='gpus' is unknown. Did you mean 'gpu'"),
        (4, {"accelerator": 1}, "accelerator=1 is unknown"),
        (4, {"gpus": True}, "gpus=True cannot be read"),
        (4, {"gpus": []}, "gpus=.. cannot be read"),
        (4, {"gpus": "one"}, "gpus='one' cannot be read"),
        (4, {"gpus": -2}, "gpus=-2 cannot be read"),
        (4, {"devices": 1.0}, "devices=1.0 cannot be read"),
    ],
)
def test_what_cannot_be_is_an_error(
    monkeypatch: pytest.MonkeyPatch, present: int, arguments: dict[str, Any], words: str
) -> None:
    cards(monkeypatch, present)
    with pytest.raises(ConfigError, match=words) as caught:
        resolve_device(**arguments)
    assert "torchrun" not in str(caught.value)
