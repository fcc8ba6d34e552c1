"""`task.export`: programs that compute the same, weights that are the same, or no file (S4-06)."""

from __future__ import annotations

import logging
import random
import sys

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.cli import main
from lightkit.errors import CheckpointError, ExportError, UsageError
from tests.small import Net, loader

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
PROGRAMS = ("net.pt2", "net.onnx")
FILES = (*PROGRAMS, "net.safetensors", "net.pt")
PACKAGES = {"net.onnx": ("onnx", "onnxscript", "onnxruntime"), "net.safetensors": ("safetensors",)}


def made(name, folder):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    return folder / "made" / name


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    return made(request.param, tmp_path)


@pytest.fixture(params=PROGRAMS)
def program(request, tmp_path):
    return made(request.param, tmp_path)


class Rich(lk.TaskModule):
    """Dropout, batch norm, tied weights, an LSTM that sets its own attributes, a frozen child."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(9, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.rnn, self.out = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.example_input_array = None, torch.arange(3)[None]
        self.norm.eval()

    def forward(self, tokens, scale=None):
        self.calls += 1
        self.log("calls", self.calls)
        self.seen = self.drop(self.rnn(self.embed(tokens))[0].mean(1))
        out = self.out(self.norm(self.seen))
        return {"out": out if scale is None else out * scale[:, None], "none": None}


def run(file, *args, **kwargs):
    """Returns what the file computes, by what reads it elsewhere."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(*args, **kwargs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    values = [t.numpy() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])


def test_s4_06_a_trained_task_is_written_in_every_format(file, tmp_path):
    task = Net()
    lk.Trainer(max_epochs=1).fit(task, loader())
    assert task.export(file, X) == file
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing left beside it
    if file.name in PROGRAMS:
        for rows in (1, 3, 8):
            batch = torch.randn(rows, 4)
            assert torch.allclose(run(file, batch), task(batch), atol=1e-6)
        return
    other = Net()
    other.load_weights(file)
    assert torch.equal(other.net.weight, task.net.weight)
    if file.suffix == ".pt":
        assert set(torch.load(file, weights_only=True)) == {"net.weight", "net.bias"}


def test_the_task_is_afterwards_as_it_was(file):
    task = Rich()
    parameters, buffers = dict(task.named_parameters()), dict(task.named_buffers())
    before = {name: value.clone() for name, value in task.state_dict().items()}
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    task.export(file)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert [m for m in task.modules() if not m.training] == [task.norm]
    for name, value in {**parameters, **buffers}.items():
        assert {**dict(task.named_parameters()), **dict(task.named_buffers())}[name] is value
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert task.out.weight is task.embed.weight
    assert all(p.requires_grad and p.grad is None for p in task.parameters())
    task(torch.zeros(2, 3, dtype=torch.long))["out"].sum().backward()  # its LSTM knows them too
    assert task.rnn.weight_ih_l0.grad is not None


@pytest.mark.parametrize("how", ["position", "name", "default"])
def test_inputs_by_position_by_name_and_by_default(program, how):
    task = Rich().eval()
    tokens, scale = torch.randint(0, 9, (5, 3)), torch.rand(5)
    args, kwargs = {
        "position": ((tokens, scale), {}),
        "name": ((), {"scale": scale, "tokens": tokens}),
        "default": ((tokens,), {}),  # made with example_input_array, one row
    }[how]
    task.export(program, kwargs or (None if how == "default" else args))
    out = run(program, *args, **kwargs)
    out = out["out"] if isinstance(out, dict) else out
    assert torch.allclose(out, task(*args, **kwargs)["out"], atol=1e-6)


def test_the_batch_is_free_where_forward_takes_any_arguments(program):
    class Pair(nn.Module):
        def forward(self, a, b):
            return a - b

    class Named(Net):
        def forward(self, **named):
            return super().forward(named["x"])

    task = lk.SupervisedTask(Pair(), loss="mse")  # its forward takes *inputs
    task.export(program, (X, 2 * X))
    assert torch.equal(run(program, X[:3], 2 * X[:3]), -X[:3])
    with pytest.raises(ExportError, match=r"takes as \*\*: name them in forward"):
        Named().export(program, {"x": X})


def test_a_fixed_batch_and_free_dimensions_of_ones_own(program):
    task = Net()
    task.export(program, X, dynamic_batch=False)
    assert run(program, X).shape == (4, 1)
    with pytest.raises(Exception, match="(?i)guard|dimension"):
        run(program, torch.randn(5, 4))
    long = torch.randn(4, 6, 4)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    task.export(program, long, dynamic_shapes=(dims,))
    assert run(program, torch.randn(2, 3, 4)).shape == (2, 3, 1)


def test_during_a_run_and_in_a_hook(tmp_path):
    class Exported(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            task.log("here", 1.0)
            task.export(tmp_path / f"{trainer.current_epoch}.pt2", X)

    class Logging(Net):
        def forward(self, x):
            self.log("mean_of_x", x.mean())
            return super().forward(x)

    plain, hooked = Logging(), Logging()
    hooked.load_state_dict(plain.state_dict())
    histories = [
        lk.Trainer(max_epochs=2, seed=1, callbacks=callbacks).fit(task, loader())
        for task, callbacks in ((plain, []), (hooked, [Exported()]))
    ]
    for one, two in zip(*histories, strict=True):
        assert one["mean_of_x"] == two["mean_of_x"]
        assert one["train_loss"] == two["train_loss"]
    assert torch.equal(plain.net.weight, hooked.net.weight)
    assert len(list(tmp_path.glob("?.pt2"))) == 2


def test_the_largest_difference_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightkit")
    Net().export(tmp_path / "net.pt2", X)
    assert "net.pt2 (torch_export), largest difference 0" in caplog.text


def test_a_program_that_computes_something_else_is_not_written(tmp_path):
    class Random(Net):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    class Stateful(Net):
        def __init__(self):
            super().__init__()
            self.plain = 0

        def forward(self, x):
            self.plain += 1  # the program keeps the number of its making
            return super().forward(x) + self.plain

    path = tmp_path / "net.pt2"
    path.write_text("before")
    for task in (Random(), Stateful()):
        with pytest.raises(
            ExportError, match="by .* on the sample and by .* twice.*=0.0001"
        ) as error:
            task.export(path, X)
        assert "something else each time, in eval mode too" in str(error.value)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    Random().export(path, X, tolerance=float("inf"))
    assert path.stat().st_size > 100


def test_what_torch_cannot_export_is_said_in_words(tmp_path):
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    class Fixed(Net):
        def forward(self, x):
            return super().forward(x).view(4, 1)

    class Seen(Net):
        def forward(self, x):
            return super().forward(x) * (1 if x.size(0) == 8 else 2)

    for task, kind, words in (
        (Branching(), ExportError, "branches on the values of a tensor: write torch.where"),
        (Fixed(), UsageError, "twice the sample: .*\n.*dynamic_batch=False"),
        (Seen(), ExportError, "Constraints violated.*\n.*dynamic_batch=False"),
    ):
        with pytest.raises(kind, match=words):
            task.export(tmp_path / "net.pt2", X)
    assert list(tmp_path.iterdir()) == []
    Fixed().export(tmp_path / "net.pt2", X, dynamic_batch=False)


def test_wrong_words_are_answered(tmp_path):
    class Bare(lk.TaskModule):
        pass

    task = Net()
    path = tmp_path / "net.pt2"
    with pytest.raises(UsageError, match=r"says no format.*\.onnx.*torch_export"):
        task.export(tmp_path / "net.bin", X)
    with pytest.raises(UsageError, match="Did you mean 'safetensors'"):
        task.export(path, X, format="safetensor")
    with pytest.raises(UsageError, match="format=3 is unknown"):
        task.export(path, X, format=3)
    with pytest.raises(TypeError, match="strikt"):
        task.export(tmp_path / "net.pt", strikt=True)
    with pytest.raises(UsageError, match=r"task\.export\(path, sample\).*example_input_array"):
        task.export(path)
    with pytest.raises(UsageError, match="defines no forward"):
        Bare().export(path, X)
    with pytest.raises(UsageError, match="fails on the sample: .*\n.*positional arguments"):
        task.export(path, (X, X))
    with pytest.raises(UsageError, match="which is the batch"):
        task.export(path, (X, X[:2]))
    with pytest.raises(UsageError, match="no values yet"):
        Net().to("meta").export(path, X)
    with pytest.raises(UsageError, match="dynamic_shapes="):
        task.to_onnx(path, X, dynamic_axes={"x": {0: "batch"}})
    with pytest.raises(UsageError, match=r"torch has given TorchScript up.*task\.export"):
        task.to_torchscript(path, example_inputs=X)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match="folder.pt2 cannot be written"):
        task.export(tmp_path / "folder.pt2", X)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


def test_a_sharded_task_is_exported_from_its_checkpoint(tmp_path, monkeypatch):
    from lightkit.checkpoint import sharded

    monkeypatch.setattr(sharded, "is_part", lambda tensor: tensor.dim() == 2)
    with pytest.raises(UsageError, match=r"part of net.weight only.*Net\.load_from_checkpoint"):
        Net().export(tmp_path / "net.pt")


def test_lightnings_name_for_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task = Net()
    task.to_onnx(tmp_path / "net.onnx", X, export_params=True, input_names=["x"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (out,) = session.run(None, {"x": X.numpy()})
    assert torch.allclose(torch.from_numpy(out), task(X), atol=1e-6)


def test_without_onnxruntime_onnx_checks_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    Net().export(tmp_path / "net.onnx", X)
    assert (tmp_path / "net.onnx").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'lightkit\[export\]'"):
        Net().export(tmp_path / "net.onnx", X)


def test_weights_beside_a_large_onnx_file_come_along(tmp_path):
    pytest.importorskip("onnxscript")
    from lightkit.export import _own_file

    with _own_file(tmp_path / "net.onnx") as file:
        file.write_text("program")
        file.with_name("net.onnx.data").write_text("weights")
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}


def test_safetensors_hold_each_name(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    task = Rich()
    task.export(tmp_path / "net.safetensors")
    held = library.load_file(tmp_path / "net.safetensors")
    assert set(held) == set(task.state_dict())  # both names of the tied weight
    other = Rich()
    other.load_weights(tmp_path / "net.safetensors")
    assert torch.equal(other.embed.weight, task.embed.weight)

    class Noted(Net):
        def get_extra_state(self):
            return {"note": 1}

    with pytest.raises(UsageError, match="tensors only, and _extra_state is none"):
        Noted().export(tmp_path / "noted.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        other.load_weights(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("name", ["net.pt2", "net.pt"])
def test_the_command_writes_what_the_name_says(name, tmp_path, capsys):
    file = tmp_path / name
    trainer = lk.Trainer(max_epochs=1)
    task = Net()
    trainer.fit(task, loader())
    checkpoint = str(trainer.run_dir / "checkpoints" / "last.ckpt")
    flags = ["--task", "tests.test_export.Sampled"] if file.name in PROGRAMS else []
    assert main(["export", checkpoint, str(file), *flags]) == 0
    assert capsys.readouterr().out.endswith(f"written: {file}\n")
    if file.name in PROGRAMS:
        assert torch.allclose(run(file, X), task(X), atol=1e-6)
    else:
        Net().load_weights(file)


class Sampled(Net):
    example_input_array = X


def test_wrong_words_of_the_command(tmp_path, capsys):
    assert main(["export", "a.ckpt", str(tmp_path / "net.pt2")]) == 2
    assert "--task module.Class" in capsys.readouterr().err
    assert main(["export", "a.ckpt", str(tmp_path / "net.pt2"), "--lr", "1"]) == 2
    assert "where FILE ends in .pt2" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "a.ckpt"), str(tmp_path / "net.pt")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 1
    assert "nothing to join" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_to_the_cpu(program):
    task = Rich().to("cuda")
    tokens = torch.randint(0, 9, (5, 3))
    task.export(program, tokens)
    task.eval()
    assert {p.device.type for p in task.parameters()} == {"cuda"}
    out = run(program, tokens)
    out = out["out"] if isinstance(out, dict) else out
    assert torch.allclose(out, task(tokens.to("cuda"))["out"].cpu(), atol=1e-4)
