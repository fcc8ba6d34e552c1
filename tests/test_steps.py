"""One optimizer step: what happens when its batches are unequal, missing, or asked for again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightkit as lk
from lightkit.errors import OptimizerError, UsageError


class Scale(lk.TaskModule):
    """``weight`` times the mean of a batch, so that gradients can be told by heart."""

    def __init__(self, make=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.make = make or (lambda parameters: torch.optim.SGD(parameters, lr=1.0))

    def training_step(self, batch, batch_idx):
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(*sizes):
    """Batches whose samples are 1 in the first, 2 in the second, and so on."""
    return [(torch.full((n, 1), float(i)),) for i, n in enumerate(sizes, 1)]


@pytest.fixture
def fit(tmp_path):
    def run(task, data, **options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        defaults = {"max_epochs": 1, "enable_checkpointing": False, "default_root_dir": tmp_path}
        trainer = lk.Trainer(**{**quiet, **defaults, **options})
        trainer.fit(task, data)
        return trainer

    return run


def test_unequal_batches_of_any_iterable_count_by_their_samples(fit):
    task = Scale()
    fit(task, batches(4, 2), accumulate_grad_batches=2)
    assert task.weight.item() == pytest.approx(-(4 * 1 + 2 * 2) / 6)


def test_a_skipped_batch_leaves_the_mean_of_the_others(fit):
    class Skips(Scale):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    task = Skips()
    trainer = fit(task, batches(4, 2, 1), accumulate_grad_batches=3)
    assert trainer.global_step == 1
    assert task.weight.item() == pytest.approx(-(2 * 2 + 1 * 3) / 3)


def test_a_loader_that_ends_early_within_a_group_loses_no_gradient(fit, capsys):
    class Short:
        def __len__(self):
            return 4

        def __iter__(self):
            return iter(batches(2, 2, 2))

    task = Scale()
    trainer = fit(task, Short(), accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert task.weight.item() == pytest.approx(-(1 + 2) / 2 - 3)
    assert "gave 3 batches although its len() says 4" in capsys.readouterr().out


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_nothing_is_stepped_where_nothing_counts(fit, accumulate, zero):
    class Zero(Scale):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "weight": zero}

    decays = Zero(lambda parameters: torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1))
    nn.init.ones_(decays.weight)
    trainer = fit(decays, batches(2, 2), accumulate_grad_batches=accumulate)
    assert trainer.global_step == 0
    assert decays.weight.item() == 1.0


def test_weights_for_some_batches_only_are_refused(fit):
    class Mixed(Scale):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx else {"loss": loss, "weight": 3}

    with pytest.raises(UsageError, match="Return it always, or never"):
        fit(Mixed(), batches(2, 2), accumulate_grad_batches=2)


class Asks(Scale):
    """Calls its closure twice in every step, and notes what it returns."""

    def __init__(self, weights=None):
        super().__init__()
        nn.init.ones_(self.weight)
        self.weights, self.seen = weights, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.weights is None else {"loss": loss, "weight": self.weights[batch_idx]}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.seen.append(optimizer_closure().item())
        first = self.weight.grad.clone()
        self.seen.append(optimizer_closure().item())
        assert torch.equal(first, self.weight.grad)


@pytest.mark.parametrize(
    ("weights", "mean"), [(None, (4 * 1 + 2 * 2) / 6), ([1, 3], (1 * 1 + 3 * 2) / 4)]
)
def test_the_closure_returns_the_loss_of_the_group(fit, weights, mean):
    task = Asks(weights)
    fit(task, batches(4, 2), accumulate_grad_batches=2)
    assert task.seen == [pytest.approx(mean)] * 2
    assert task.weight.grad.item() == pytest.approx(mean)


def test_a_closure_cannot_be_called_twice_under_a_scaler(fit):
    with pytest.raises(OptimizerError, match="bf16-mixed"):
        fit(Asks(), batches(4), precision="16-mixed", gradient_clip_val=1e6)


def test_an_own_step_under_a_scaler_sees_true_gradients(fit):
    class Looks(Scale):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            gradients.append(self.weight.grad.item())
            optimizer.step(closure=optimizer_closure)

    gradients = []
    fit(Looks(), batches(4, 4), precision="16-mixed")
    assert gradients == [1.0, 2.0]


def test_a_clipped_closure_logs_one_norm(fit):
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, max_iter=4)

    class Square(Scale):
        def training_step(self, batch, batch_idx):
            return (self.weight - batch[0].mean()) ** 2

    norms = []

    class Watch(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            norms.append(len(trainer.session.metrics.train["grad_norm"].values))

    fit(Square(lbfgs), batches(2), gradient_clip_val=1.0, callbacks=Watch())
    assert norms == [1]


def test_a_plateau_schedule_by_steps_moves_with_steps_only(fit):
    class Half(Scale):
        def training_step(self, batch, batch_idx):
            self.log("high", float(batch_idx))
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
            plan = {"scheduler": plateau, "interval": "step", "monitor": "high"}
            return {"optimizer": optimizer, "lr_scheduler": plan}

    trainer = fit(Half(), batches(2, 2, 2, 2))
    assert trainer.global_step == 2
    assert trainer.lr_schedulers[0].scheduler.last_epoch == 2


def test_a_stop_at_the_last_save_point_of_an_epoch_is_saved(fit, tmp_path):
    class Stops(lk.Callback):
        def on_save_point(self, trainer, task):
            if trainer.epoch_ended and trainer.state.epoch == 3:
                trainer.stop("enough")

    saver = lk.callbacks.ModelCheckpoint(dirpath=tmp_path / "files", every_n_epochs=2)
    trainer = fit(
        Scale(), batches(2), max_epochs=9, callbacks=[Stops(), saver], enable_checkpointing=True
    )
    assert trainer.state.epoch == 3
    assert torch.load(saver.last_model_path, weights_only=True)["loop"]["epoch"] == 3


def test_a_stop_that_is_taken_back_does_not_end_the_next_epoch(fit):
    class Wavers(lk.Callback):
        def on_train_epoch_end(self, trainer, task):
            if trainer.current_epoch == 0:
                trainer.stop("perhaps")

        def on_save_point(self, trainer, task):
            trainer.should_stop = False

    trainer = fit(Scale(), batches(1, 1, 1), max_epochs=2, callbacks=Wavers())
    assert (trainer.state.epoch, trainer.global_step) == (2, 6)


def test_modes_are_put_back_after_an_error_at_the_start(fit):
    class Fails(lk.Callback):
        def on_train_start(self, trainer, task):
            raise RuntimeError("early")

    task = Scale()
    task.eval()
    with pytest.raises(RuntimeError, match="early"):
        fit(task, batches(1), callbacks=Fails())
    assert not task.training


def test_skipping_an_epoch_by_minus_one_is_refused(fit):
    class Skips(Scale):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    with pytest.raises(UsageError, match="limit_train_batches"):
        fit(Skips(), batches(1))


def test_a_stop_without_a_reason_ends_at_the_next_step_too(fit):
    class Stops(lk.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.stop("")

    assert fit(Scale(), batches(1, 1, 1), callbacks=Stops()).global_step == 1
