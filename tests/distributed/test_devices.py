from __future__ import annotations

from typing import Any

import pytest
import torch

from lightkit.distributed import LaunchEnv, resolve_device
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
        (4, {"gpus": 4}, "gpus=4 asks for 4 devices, and each.*torchrun --nproc-per-node 4 "),
        (0, {"gpus": 4}, "gpus=4 asks for a GPU, but torch sees none"),
        (4, {"devices": 4}, "devices=4 asks for 4 .*torchrun --nproc-per-node 4 "),
        (0, {"devices": 4}, "devices=4 asks for 4 .*torchrun --nproc-per-node 4 "),
        (4, {"gpus": "0,1"}, "asks for 2 .*torchrun --nproc-per-node 2 "),
        (4, {"devices": -1}, "asks for 4 .*torchrun --nproc-per-node 4 "),
        (4, {"gpus": -1}, "asks for 4 .*torchrun --nproc-per-node 4 "),
        (0, {"accelerator": "cpu", "devices": "3"}, "asks for 3 .*torchrun --nproc-per-node 3 "),
        (0, {"devices": 2, "num_nodes": 3}, "torchrun --nnodes 3 --nproc-per-node 2 --rdzv"),
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
    with pytest.raises(ConfigError, match=f"(?s){words}") as caught:
        resolve_device(**arguments)
    assert ("torchrun" in str(caught.value)) == ("torchrun" in words)


def process(local_rank: int, here: int, world: int | None = None) -> LaunchEnv:
    world = here if world is None else world
    return LaunchEnv(world - here + local_rank, local_rank, world, here, launched=True)


@pytest.mark.parametrize(
    ("present", "arguments", "devices"),
    [
        (4, {}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, {"gpus": 1}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, {"gpus": -1}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, {"gpus": 3}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, {"gpus": "auto"}, ["cuda:0", "cuda:1", "cuda:2"]),
        (3, {"devices": 3}, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, {"gpus": [3, 0, 2]}, ["cuda:3", "cuda:0", "cuda:2"]),
        (4, {"devices": "3,0,2"}, ["cuda:3", "cuda:0", "cuda:2"]),
        (4, {"gpus": 0}, ["cpu"] * 3),
        (4, {"accelerator": "cpu", "devices": 3}, ["cpu"] * 3),
        (0, {}, ["cpu"] * 3),
        (0, {"devices": 1}, ["cpu"] * 3),
        (0, {"devices": -1}, ["cpu"] * 3),
    ],
)
def test_under_a_launcher_each_process_has_its_own(
    monkeypatch: pytest.MonkeyPatch, present: int, arguments: dict[str, Any], devices: list[str]
) -> None:
    cards(monkeypatch, present)
    for world in (3, 6):  # one machine, or the second of two
        found = [resolve_device(**arguments, env=process(i, 3, world)) for i in range(3)]
        assert found == [torch.device(name) for name in devices]


@pytest.mark.parametrize(
    ("present", "arguments", "words"),
    [
        (4, {"gpus": 4}, r"gpus=4 asks for 4 devices, but .* 2 processes .*--nproc-per-node 4"),
        (0, {"devices": 3}, r"devices=3 asks for 3 devices, but .* 2 processes"),
        (4, {"gpus": [1]}, r"gpus=\[1\] asks for 1 device, but .* 2 processes"),
        (4, {"gpus": [0, 1, 2]}, r"asks for 3 devices, but .* 2 processes"),
        (4, {"gpus": [1, 1]}, "names a card twice"),
        (1, {}, r"2 processes .*torch sees 1 GPU, .*--nproc-per-node 1.*accelerator=.cpu"),
        (1, {"gpus": 2}, "2 processes .*torch sees 1 GPU,"),
        (4, {"gpus": [0, 7]}, "selects card 7, but there are only 4: 0 to 3"),
        (0, {"gpus": 1}, "asks for a GPU, but torch sees none"),
        (4, {"accelerator": "cpu", "devices": [0, 1]}, "selects a card"),
    ],
)
def test_another_number_than_the_launcher_started_is_an_error(
    monkeypatch: pytest.MonkeyPatch, present: int, arguments: dict[str, Any], words: str
) -> None:
    cards(monkeypatch, present)
    with pytest.raises(ConfigError, match=words):
        resolve_device(**arguments, env=process(1, 2))


def test_one_process_of_a_launcher_may_choose_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 4)
    assert resolve_device(gpus=[2], env=process(0, 1)) == torch.device("cuda:2")


def test_mps_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 0, mps=True)
    with pytest.raises(ConfigError, match="trains in one process, but the launcher started 2"):
        resolve_device("mps", env=process(0, 2))
    with pytest.raises(ConfigError, match='devices=2, but accelerator="mps" has one'):
        resolve_device("mps", 2)
