"""The Trainer from outside: what is called, what comes back, what is left behind."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass

import pytest
import torch

import lightkit as lk
from lightkit.callbacks import EarlyStopping
from lightkit.errors import ConfigError, UsageError
from tests.small import Net, loader

# --- the skeletons -------------------------------------------------------------------------------


def test_the_skeleton_of_the_field(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_loader, val_loader = loader(), loader(8, seed=2)
    history = lk.Trainer(max_epochs=3).fit(Net(), train_loader, val_loader)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert {"train_loss", "val_loss", "step", "time"} <= set(history[-1])
    assert history[-1]["step"] == 15
    folder = tmp_path / "runs" / "Net" / "version_0"
    assert (folder / "metrics.jsonl").exists()
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert list(folder.glob("events.out.tfevents.*"))
    assert json.loads((folder / "hparams.json").read_text()) == {"width": 4}
    said = capsys.readouterr().out
    assert "training: 3 epochs, 5 batches of 4 per epoch" in said
    assert "tensorboard --logdir runs/Net/version_0" in said


def test_the_second_skeleton_without_a_gpu_says_how_to_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module, dl = Net(), loader()
    with pytest.raises(ConfigError, match=r"gpus=1 asks for a GPU.*Trainer\(gpus=0\)"):
        lk.Trainer(gpus=1).fit(module, dl)


def test_the_default_of_ten_epochs_is_announced(quiet, capsys):
    quiet(max_epochs=None, gpus=0).fit(Net(), loader(4))
    said = capsys.readouterr().out
    assert "training: 10 epochs (default; set max_epochs=), 1 batch of 4 per epoch" in said


def test_a_failed_start_can_be_tried_again(quiet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    t = quiet(gpus=1)
    for _ in range(2):
        with pytest.raises(ConfigError, match="gpus=1"):
            t.fit(Net(), loader())
    assert t.stage is None


def test_five_frames_lie_between_the_call_and_the_step(quiet):
    seen = []

    class Stack(Net):
        def training_step(self, batch, batch_idx):
            seen.append([f.name for f in traceback.extract_stack()])
            return super().training_step(batch, batch_idx)

    quiet().fit(Stack(), loader())
    for names in seen:
        here = names.index("test_five_frames_lie_between_the_call_and_the_step")
        assert names[here + 1 :] == ["fit", "fit", "train_epoch", "train_step", "training_step"]


# --- what comes back -----------------------------------------------------------------------------


def test_validate_and_test_return_one_dict_per_loader(quiet):
    net, t = Net(), quiet()
    one = t.validate(net, loader(), verbose=False)
    assert one == [{"val_loss": pytest.approx(_loss(net, loader()))}]
    two = t.test(net, [loader(), loader(8, seed=3)], verbose=False)
    assert [set(row) for row in two] == [
        {"test_loss/dataloader_idx_0"},
        {"test_loss/dataloader_idx_1"},
    ]
    named = t.validate(net, {"day": loader(), "night": loader(6, seed=3)}, verbose=False)
    assert named[0] == {"day/val_loss": pytest.approx(_loss(net, loader()))}
    assert named[1] == {"night/val_loss": pytest.approx(_loss(net, loader(6, seed=3)))}


def _loss(net, data) -> float:
    with torch.no_grad():
        total = sum(((net(x) - y) ** 2).sum() for x, y in data)
    return float(total / len(data.dataset))


def test_predict_returns_batches_in_order(quiet):
    net, t = Net(), quiet()
    outputs = t.predict(net, loader())
    x = loader().dataset.tensors[0]
    assert torch.equal(torch.cat(outputs), net(x).detach())
    assert not outputs[0].requires_grad
    several = t.predict(net, [loader(), loader(8)])
    assert [len(batches) for batches in several] == [5, 2]
    assert t.predict(net, loader(), return_predictions=False) == []


def test_steps_fall_back(quiet):
    class Own(Net):
        def test_step(self, batch, batch_idx):
            self.log("own", 2.0)

        def predict_step(self, batch):
            return batch[1]

    assert "test_loss" in quiet().test(Net(), loader(), verbose=False)[0]
    assert quiet().test(Own(), loader(), verbose=False) == [{"own": 2.0}]
    outputs = quiet().predict(Own(), loader())
    assert torch.equal(torch.cat(outputs), loader().dataset.tensors[1])


def test_the_test_falls_back_to_any_signature_of_validation_step(quiet):
    class Short(Net):
        def validation_step(self, batch):
            return torch.tensor(7.0)

    class Long(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            return torch.tensor(float(dataloader_idx))

    assert quiet().test(Short(), loader(), verbose=False) == [{"test_loss": 7.0}]
    found = quiet().test(Long(), {"a": loader(), "b": loader()}, verbose=False)
    assert found == [{"a/test_loss": 0.0}, {"b/test_loss": 1.0}]


def test_indices_may_be_left_out_of_the_steps(quiet):
    class Short(Net):
        seen = []

        def training_step(self, batch):
            return super().training_step(batch, 0)

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.seen.append((batch_idx, dataloader_idx))

        def test_step(self, batch):
            self.seen.append("test")

    net = Short()
    t = quiet(num_sanity_val_steps=0)
    t.fit(net, loader(), [loader(4), loader(8)])
    t.test(net, loader(4), verbose=False)
    assert net.seen == [(0, 0), (0, 1), (1, 1), "test"]


def test_evaluations_after_a_fit_need_neither_task_nor_data_again(quiet):
    class Data(lk.DataModule):
        def train_dataloader(self):
            return loader()

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    t = quiet()
    t.fit(Net(), Data())
    assert "val_loss" in t.validate(verbose=False)[0]
    assert "test_loss" in t.test(verbose=False)[0]
    assert len(t.predict()) == 5
    assert t.global_step == 5
    assert len(t.history) == 1


def test_results_are_shown_unless_verbose_is_off(quiet, capsys):
    t = quiet()
    t.validate(Net(), loader(), verbose=False)
    assert capsys.readouterr().out == ""
    t.test(Net(), loader())
    assert capsys.readouterr().out.startswith("test: test_loss ")


# --- again with the same trainer -----------------------------------------------------------------


def test_the_same_trainer_fits_again_from_the_beginning(quiet):
    stop = EarlyStopping(monitor="val_loss", patience=100)
    t = quiet(max_epochs=2, callbacks=[stop])
    first, net = t.fit(Net(), loader(), loader(8)), Net()
    second = t.fit(net, loader(), loader(8))
    assert first is not second
    assert len(first) == len(second) == 2
    assert (t.current_epoch, t.global_step) == (2, 10)
    third = t.fit(net, loader(), loader(8))  # goes on with the weights, counts anew
    assert third[0]["epoch"] == 1
    assert third[0]["train_loss"] < second[0]["train_loss"]
    assert t.history is third


def test_each_fit_has_its_own_folder(tmp_path):
    t = lk.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
    t.fit(Net(), loader())
    first = t.run_dir
    t.fit(Net(), loader())
    assert [first.name, t.run_dir.name] == ["version_0", "version_1"]
    for folder in (first, t.run_dir):
        assert len(list(folder.glob("events*"))) == 1
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert t.logger.log_dir == str(t.run_dir)


def test_a_call_within_a_call_is_an_error(quiet):
    class Nested(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            with pytest.raises(UsageError, match="in the middle of fit"):
                trainer.validate(task, loader(), verbose=False)

    t = quiet(callbacks=Nested())
    assert len(t.fit(Net(), loader())) == 1


@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_another_trainer_within_a_fit_leaves_it_its_task(quiet, call):
    class Nested(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            if trainer.current_epoch == 0:
                getattr(quiet(), call)(task, loader())
                assert task.trainer is trainer

    class Logs(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    history = quiet(max_epochs=3, callbacks=Nested()).fit(Logs(), loader())
    assert [row["mine"] for row in history] == [2.0] * 3


def test_a_start_that_fails_leaves_the_task_alone(quiet):
    class Fails(Net):
        def configure_callbacks(self):
            raise ValueError(f"no callbacks for {self.trainer.max_epochs} epoch")

        def teardown(self, stage):
            raise AssertionError("nothing was set up")

    net, t = Fails(), quiet()
    with pytest.raises(ValueError, match="for 1 epoch"):
        t.fit(net, loader())
    with pytest.raises(lk.LightkitError, match="has no trainer yet"):
        _ = net.trainer
    assert t.fit(Net(), loader())


def test_a_data_module_that_takes_no_attribute(quiet):
    @dataclass(frozen=True)
    class Frozen:
        samples: int = 8

        def train_dataloader(self):
            return loader(self.samples)

    t = quiet()
    t.fit(Net(), Frozen())
    assert t.global_step == 2
    assert t.stage is None


# --- what can be read ----------------------------------------------------------------------------


def test_the_attributes_of_the_field(quiet):
    class Look(Net):
        def configure_optimizers(self):
            t = self.trainer
            seen["steps"] = t.estimated_stepping_batches
            seen["batches"] = (t.num_training_batches, t.num_val_batches)
            return super().configure_optimizers()

        def on_train_epoch_end(self):
            t = self.trainer
            seen["stage"] = t.stage.value
            seen["world"] = (t.is_global_zero, t.global_rank, t.local_rank, t.world_size)
            seen["metrics"] = set(t.callback_metrics)
            seen["bar"] = set(t.progress_bar_metrics)

    seen, net = {}, Look()
    t = quiet(max_epochs=3, accumulate_grad_batches=2, log_every_n_steps=1)
    assert t.callback_metrics == {}
    assert t.estimated_stepping_batches is None
    t.fit(net, loader(), loader(8, seed=2))
    assert seen["steps"] == 9
    assert seen["batches"] == (5, [2])
    assert seen["stage"] == "fit"
    assert seen["world"] == (True, 0, 0, 1)
    assert {"train_loss", "val_loss"} <= seen["metrics"]
    assert "train_loss" in seen["bar"]
    assert t.model is t.task is t.lightning_module is net
    assert [type(o).__name__ for o in t.optimizers] == ["Adam"]
    assert t.lr_schedulers == []
    assert t.checkpoint_callback is None
    assert t.num_devices == 1
    assert float(t.callback_metrics["val_loss"]) == pytest.approx(t.history[-1]["val_loss"])
    assert (t.current_epoch, t.max_epochs, t.max_steps) == (3, 3, -1)


def test_the_precision_has_one_name(quiet):
    class Look(lk.Callback):
        def on_train_start(self, trainer, task):
            seen.append(trainer.precision)

    seen = []
    t = quiet(precision="bf16", callbacks=Look())
    seen.append(t.precision)
    t.fit(Net(), loader())
    assert [*seen, t.precision] == ["bf16-mixed"] * 3


def test_estimates_without_a_length_or_without_an_end(quiet):
    def steps(**options):
        class Look(Net):
            def configure_optimizers(self):
                seen.append(self.trainer.estimated_stepping_batches)
                raise StopAsyncIteration

        seen, data = [], options.pop("data", loader())
        with pytest.raises(StopAsyncIteration):
            quiet(**options).fit(Look(), data)
        return seen[0]

    endless = (batch for batch in loader())
    assert steps(max_epochs=2) == 10
    assert steps(max_epochs=2, max_steps=7) == 7
    assert steps(max_epochs=-1) == float("inf")
    assert steps(max_epochs=-1, max_steps=7) == 7
    assert steps(max_epochs=2, data=endless) is None
    endless = (batch for batch in loader())
    assert steps(max_epochs=2, max_steps=7, data=endless) == 7
    assert steps(max_epochs=2, limit_train_batches=0.4) == 4


def test_what_a_fit_wrote_stays_known_after_an_evaluation(tmp_path):
    t = lk.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
    net = Net()
    t.fit(net, loader(), loader(8))
    best = t.checkpoint_callback.best_model_path
    assert best
    with torch.no_grad():
        net.net.weight.zero_()
    changed = t.test(net, loader(8), verbose=False)
    assert t.test(net, loader(8), ckpt_path="best", verbose=False) != changed
    assert net.net.weight.any()
    assert t.checkpoint_callback.best_model_path == best
    fresh = lk.Trainer(default_root_dir=tmp_path, enable_progress_bar=False)
    assert fresh.validate(net, loader(8), ckpt_path="last", verbose=False)
    with pytest.raises(UsageError, match="there is no best"):
        lk.Trainer(default_root_dir=tmp_path / "x").test(net, loader(), ckpt_path="best")
    with pytest.raises(ConfigError, match="'auto' is for fit"):
        fresh.validate(net, loader(), ckpt_path="auto")


def test_without_a_model_the_best_weights_of_the_fit_are_tested(tmp_path):
    class Grows(lk.TaskModule):
        """Its weight is the number of steps; the validation likes 1 best."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            assert self.trainer.is_last_batch
            return -self.weight

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self.weight - 1).abs())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    trainer = lk.Trainer(
        max_epochs=3, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    batch = [(torch.zeros(1),)]
    task = Grows()
    trainer.fit(task, batch, batch)
    assert task.weight.item() == 3.0
    assert trainer.test(task, batch) == [{"val_loss": 2.0}]  # the task that is given, as it is
    assert trainer.test(dataloaders=batch) == [{"val_loss": 0.0}]
    assert trainer.validate(dataloaders=batch) == [{"val_loss": 0.0}]
