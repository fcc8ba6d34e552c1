from __future__ import annotations

import logging
import pathlib

import pytest
import torch
from torch import nn

from lightkit.checkpoint import load_task, write_checkpoint
from lightkit.checkpoint.storable import storable_hparams
from lightkit.errors import CheckpointError, ConfigError
from lightkit.hparams import capture


@capture
class Task(nn.Module):
    def configure_model(self) -> None: ...

    def on_load_checkpoint(self, checkpoint) -> None: ...


class Net(Task):
    def __init__(self, width: int, lr: float = 0.1, folder: pathlib.Path = pathlib.Path("d")):
        super().__init__()
        self.lr, self.folder = lr, folder
        self.layer = nn.Linear(2, width)


class Headed(Task):
    def __init__(self, backbone: nn.Module, classes: int = 2, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.backbone, self.head, self.act = backbone, nn.Linear(3, classes), act()


class Configured(Task):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(2, config["width"])


def saved(tmp_path: pathlib.Path, task: Task, **more) -> pathlib.Path:
    path = tmp_path / "a.ckpt"
    header = {"format": 1, "version": "0"}
    contents = {"lightkit": header, "model": task.state_dict(), **more}
    contents.setdefault("hparams", storable_hparams(task.hparams))
    write_checkpoint(contents, path)
    return path


def test_rebuilt_from_its_arguments(tmp_path):
    task = Net(3, lr=0.5, folder=pathlib.Path("x/y"))
    loaded = load_task(Net, saved(tmp_path, task))
    assert (loaded.lr, loaded.folder) == (0.5, "x/y")
    assert torch.equal(loaded.layer.weight, task.layer.weight)
    assert loaded.training
    assert dict(loaded.hparams) == {"width": 3, "lr": 0.5, "folder": "x/y"}


def test_arguments_given_replace_those_stored(tmp_path):
    assert load_task(Net, saved(tmp_path, Net(3)), lr=0.9).lr == 0.9


def test_an_unknown_argument_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"Net has no argument 'widht'\. Did you mean 'width'\?"):
        load_task(Net, saved(tmp_path, Net(3)), widht=4)


def test_what_could_not_be_stored_is_asked_for(tmp_path):
    path = saved(tmp_path, Headed(nn.Linear(2, 3), act=nn.GELU))
    with pytest.raises(CheckpointError) as caught:
        load_task(Headed, path)
    assert "backbone (torch.nn.modules.linear.Linear)" in str(caught.value)
    assert f"Headed.load_from_checkpoint('{path}', backbone=..., act=...)" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"does not hold: act \(.*GELU\)\."):
        load_task(Headed, path, backbone=nn.Linear(2, 3))
    assert isinstance(load_task(Headed, path, backbone=nn.Linear(2, 3), act=nn.GELU).act, nn.GELU)


def test_an_argument_that_is_missing_is_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not hold: width\. Pass them: Net\.load_fr"):
        load_task(Net, saved(tmp_path, Net(3), hparams={}))


def test_a_stored_argument_that_the_class_lost_is_ignored_with_a_warning(tmp_path, caplog):
    path = saved(tmp_path, Net(3), hparams={"width": 3, "gone": 1})
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        assert load_task(Net, path).lr == 0.1
    assert "Net no longer has the stored argument gone: ignored" in caplog.text


def test_one_config_object_for_all(tmp_path):
    path = saved(tmp_path, Configured({"width": 4}), hparams={"width": 4, "lr": 0.1})
    assert load_task(Configured, path).layer.out_features == 4
    assert load_task(Configured, saved(tmp_path, Configured({"width": 5}))).layer.out_features == 5


class Starred(Task):
    def __init__(self, first, /, second=0, *sizes, third=0, **more):
        super().__init__()
        self.given = (first, second, sizes, third, more)


@pytest.mark.parametrize(
    "task",
    [Starred(1), Starred(1, 2, 3, 4, third=5, sixth=6), Starred(1, second=2, sixth=6)],
)
def test_every_kind_of_parameter(tmp_path, task):
    assert load_task(Starred, saved(tmp_path, task)).given == task.given


def test_lightnings_files(tmp_path):
    task = Net(3)
    path = tmp_path / "pl.ckpt"
    contents = {"state_dict": task.state_dict(), "pytorch-lightning_version": "2.5"}
    torch.save(contents | {"hyper_parameters": {"width": 3, "lr": 0.7}}, path)
    assert load_task(Net, path).lr == 0.7
    torch.save(contents, path)
    assert torch.equal(load_task(Net, path, width=3).layer.weight, task.layer.weight)


def test_weights_that_do_not_fit(tmp_path):
    path = saved(tmp_path, Net(3))
    with pytest.raises(CheckpointError, match=r"2 of another shape: layer\.weight"):
        load_task(Net, path, width=5)
    assert load_task(Net, path, strict=False, width=5).layer.out_features == 5


def test_layers_made_late_and_the_hook_come_before_the_weights(tmp_path):
    class Late(Net):
        def __init__(self, width: int):
            super().__init__(width)
            self.seen = None

        def configure_model(self) -> None:
            self.late = nn.Linear(1, 1)

        def on_load_checkpoint(self, checkpoint) -> None:
            self.seen = checkpoint["mine"]
            checkpoint["model"]["late.bias"] = torch.tensor([9.0])

    task = Late(3)
    task.configure_model()
    loaded = load_task(Late, saved(tmp_path, task, mine=42))
    assert loaded.seen == 42
    assert loaded.late.bias.item() == 9.0
    assert torch.equal(loaded.late.weight, task.late.weight)


def test_the_device(tmp_path):
    path = saved(tmp_path, Net(3))
    assert load_task(Net, path, map_location=None).layer.weight.device.type == "cpu"
    assert load_task(Net, path, map_location="meta").layer.weight.device.type == "meta"
