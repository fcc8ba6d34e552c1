"""Requirements of the article on the ecosystem: defaults, extension, production, old data people."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightkit as lk
from tests.distributed.harness import torchrun
from tests.distributed.quiet import quiet_trainer
from tests.small import Net, loader

ROOT = Path(__file__).parents[2]


def test_S4_01_an_error_about_shapes_says_where(quiet):
    """Two dozen faults are tested in tests/test_explaining.py."""

    class Narrow(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 1))

    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        quiet_trainer(max_epochs=1).fit(Narrow(), loader())
    if sys.version_info < (3, 11):
        return  # there it is a line of the log
    (note,) = raised.value.__notes__
    assert "in net.1: Linear(in_features=2, out_features=1, bias=True)" in note
    assert "input   float32 (4, 3)" in note
    assert "weight  float32 (1, 2)" in note
    assert "hint    Linear(in_features=3)" in note


def test_S4_02_a_trial_of_everything_in_one_batch(quiet, tmp_path, monkeypatch):
    """Shapes in the summary are tested in tests/callbacks/test_summary.py."""
    monkeypatch.chdir(tmp_path)
    called = []

    class Checks(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            assert x.shape == (4, 4)  # a check of shapes is a line of Python,
            assert y.shape == (4, 1)  # and python -O switches it off
            called.append("train")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            called.append("val")

    lk.Trainer(fast_dev_run=True, enable_progress_bar=False).fit(Checks(), loader(), loader(8, 2))
    assert called == ["train", "val"]
    assert list(tmp_path.iterdir()) == []


def test_S4_03_good_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = lk.Trainer()
    trainer.fit(Net(), loader(8), loader(4, seed=2))
    said = capsys.readouterr().out
    assert "10 epochs (default; set max_epochs=)" in said
    assert "device:" in said  # the fastest there is, unless another is asked for
    folder = trainer.run_dir
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"last.ckpt", "best.ckpt"}
    assert (folder / "metrics.jsonl").is_file()
    assert json.loads((folder / "hparams.json").read_text("utf-8")) == {"width": 4}
    optimizer = lk.SupervisedTask(nn.Linear(4, 1), loss="mse").configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)


class Words:
    """A batch of no known kind: sentences of unequal lengths."""

    def __init__(self, texts):
        self.texts = texts


def test_S4_04_for_any_purpose(quiet):
    class Counts(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.weights = nn.Embedding(128, 1)

        def training_step(self, batch, batch_idx):
            scores = [self.weights(torch.tensor([*text.encode()])).sum() for text in batch.texts]
            target = torch.tensor([float(text.count("a")) for text in batch.texts])
            self.log("longest", max(map(len, batch.texts)), reduce_fx="max", batch_size=2)
            loss = nn.functional.mse_loss(torch.stack(scores), target)
            return {"loss": loss, "weight": len(batch.texts)}

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    batches = DataLoader([Words(["banana", "kiwi"]), Words(["ananas", "fig"])], batch_size=None)
    history = quiet(max_epochs=30).fit(Counts(), batches)
    assert history[-1]["train_loss"] < 0.2 * history[0]["train_loss"]
    assert history[-1]["longest"] == 6


def test_S4_05_arrays_in_and_predictions_out(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("sklearn")
    from lightkit.sklearn import LightkitRegressor

    x = np.random.default_rng(0).normal(size=(64, 4))
    y = x.sum(axis=1)
    frame = pandas.DataFrame(x, columns=list("abcd"))
    model = LightkitRegressor(epochs=40, lr=0.05, random_state=0).fit(frame, y)
    assert model.score(frame, y) > 0.9
    assert isinstance(model.predict(frame), np.ndarray)

    net = nn.Linear(4, 1)
    lk.fit(net, (frame, y), loss="mse", lr=0.05, epochs=40, default_root_dir=tmp_path)
    found = lk.predict(net, frame)
    assert nn.functional.mse_loss(found.squeeze(1), torch.tensor(y, dtype=torch.float32)) < 0.1


def test_S4_06_the_trained_code_is_exported_as_it_is(tmp_path):
    task, x = Net(), torch.randn(3, 4)
    wanted = task(x)
    program = torch.export.load(task.export(tmp_path / "net.pt2", torch.randn(2, 4)))
    torch.testing.assert_close(program.module()(x), wanted)  # also for another size of batch
    weights = torch.load(task.export(tmp_path / "net.pt"), weights_only=True)
    plain = nn.Sequential()
    plain.net = nn.Linear(4, 1)
    plain.load_state_dict(weights)
    assert torch.equal(plain(x), wanted)

    class Branches(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    with pytest.raises(lk.LightkitError, match="Branches"):
        Branches().export(tmp_path / "bad.pt2", torch.ones(2, 4))

    class Differs(Net):
        def forward(self, x):
            return super().forward(x) + float(torch.compiler.is_exporting())

    with pytest.raises(lk.LightkitError, match="differ"):
        Differs().export(tmp_path / "bad.pt2", torch.ones(2, 4))
    assert not (tmp_path / "bad.pt2").exists()


def test_S4_07_one_cycle(quiet):
    rates = []

    class Cycles(Net):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": lk.one_cycle(optimizer, self.trainer)}

    quiet(max_epochs=4).fit(Cycles(), loader())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    wanted = []
    for _ in range(20):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(wanted)


def test_S4_08_every_part_can_be_exchanged(quiet):
    called = []

    class Rows(lk.loggers.Logger):
        def log_metrics(self, metrics, step):
            called.append("logger")

    class Watches(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            called.append("callback")

    class Own(Net):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            called.append("transfer")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            called.append("clip")

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            called.append("step")
            optimizer.step(optimizer_closure)

        def lr_scheduler_step(self, scheduler, metric):
            called.append("schedule")
            scheduler.step()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    trainer = quiet(logger=Rows(), callbacks=Watches(), gradient_clip_val=1.0)
    trainer.fit(Own(), loader(4))
    assert called == ["transfer", "clip", "step", "logger", "callback", "schedule"]


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    text = path.read_text(encoding="utf-8")
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1
        for number, line in lines
        if line.strip() and line.lstrip()[0] != "#" and number not in prose
    )


def test_S4_09_a_compact_loop_that_does_it_all(quiet):
    assert code_lines(ROOT / "lightkit/loops.py") < 400
    task = Net()
    history = quiet(
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        precision="bf16-mixed",
        val_check_interval=0.5,
        limit_train_batches=4,
        check_val_every_n_epoch=1,
    ).fit(task, loader(), loader(8, seed=2))
    assert [row["step"] for row in history] == [2, 4]
    assert {"train_loss", "val_loss", "grad_norm"} <= set(history[0])


def on_ranks() -> dict[str, object]:
    """Trains on this process's share; called by each of them, or by one alone."""
    torch.manual_seed(0)
    task, seen = Net(), []
    batches = DataLoader(loader().dataset, 4 // quiet_trainer().world_size)

    class Sizes(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(len(batch[0]))

    trainer = quiet_trainer(max_epochs=2, callbacks=Sizes())
    history = trainer.fit(task, batches, loader(8, seed=2))
    return {"weights": task.net.weight.detach(), "history": history["val_loss"], "seen": seen}


def test_S4_10_mixed_precision_and_many_devices(quiet, tmp_path):
    types = []

    class Mixed(Net):
        def training_step(self, batch, batch_idx):
            types.append((self(batch[0]).dtype, self.net.weight.dtype))
            return super().training_step(batch, batch_idx)

    quiet(precision="bf16-mixed").fit(Mixed(), loader(4))
    assert types == [(torch.bfloat16, torch.float32)]

    alone = on_ranks()
    for found in torchrun("tests.requirements.test_s4:on_ranks", 2, tmp_path):
        assert found["seen"] == [2] * 10
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-6, atol=1e-6)
        assert found["history"] == pytest.approx(alone["history"], rel=1e-6)


def test_S4_11_a_seed_and_a_class_tell_the_whole_run(tmp_path):
    def run(folder, **options):
        trainer = lk.Trainer(
            seed=7,
            max_epochs=2,
            default_root_dir=tmp_path / folder,
            enable_progress_bar=False,
            **options,
        )
        task = Net()
        shuffled = DataLoader(loader().dataset, 4, shuffle=True)
        history = trainer.fit(task, shuffled)
        return task.net.weight, history["train_loss"], trainer

    one, two = run("one"), run("two")
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]
    saved = Net.load_from_checkpoint(one[2].checkpoint_callback.last_model_path)
    assert saved.hparams == {"width": 4}
    assert (one[2].run_dir / "run.json").is_file()


def test_S4_12_the_step_is_ordinary_python(quiet, monkeypatch):
    stops = []

    def hook():
        frame = sys._getframe(1)
        stops.append((frame.f_code.co_name, frame.f_locals["loss"].item()))

    monkeypatch.setattr(sys, "breakpointhook", hook)

    class Stops(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            breakpoint()  # noqa: T100
            return loss

    task = Stops()
    quiet(limit_train_batches=1).fit(task, loader())
    assert [name for name, _ in stops] == ["training_step"]
    x, y = next(iter(loader()))
    assert task.training_step((x, y), 0).requires_grad  # and it is called without a trainer
