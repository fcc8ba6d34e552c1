"""Fits in 16-mixed: schedules, checkpoints, clipping, groups and manual steps around skipped steps.

Once with the scale read at once, as on the CPU, and once before the next step, as on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import lightkit as lk
from lightkit import opening
from lightkit.callbacks import LearningRateMonitor
from lightkit.errors import NonFiniteError
from lightkit.loggers import CSVLogger
from lightkit.precision import resolve_precision

INF = float("inf")
#: Times any scale above 32 this leaves the range of float32.
LARGE = 1e37


@pytest.fixture(params=["at once", "late"])
def reading(request, monkeypatch):
    """Whether fits read the scale at once, or before the next step as on CUDA."""
    real = resolve_precision

    def make(value, device):
        precision = real(value, device)
        if precision.has_scaler:
            precision._reads_late = request.param == "late"
        return precision

    monkeypatch.setattr(opening, "resolve_precision", make)
    return request.param


class Net(lk.TaskModule):
    """Its gradients are as large as the numbers of the batch; it keeps the rates of its steps."""

    def __init__(self, *, fused=None, make=AdamW, plateau=False):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.fused, self.make, self.plateau = fused, make, plateau
        self.rates = []

    def training_step(self, batch):
        return (self.net.weight * batch).mean()

    def validation_step(self, batch):
        self.log("val_loss", 1.0)

    def on_before_optimizer_step(self, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=1.0, fused=self.fused)
        halves = LambdaLR(optimizer, lambda moves: 0.5**moves)
        plans = [{"scheduler": halves, "interval": "step"}]
        if self.plateau:
            plateau = ReduceLROnPlateau(optimizer, factor=0.125, patience=0)
            plans.append({"scheduler": plateau, "interval": "step", "monitor": "val_loss"})
        return [optimizer], plans


def data(batches):
    return DataLoader(torch.tensor(batches).reshape(-1, 1), batch_size=1)


BATCHES = [LARGE, 1.0, LARGE, 1.0, 1.0, -LARGE]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("make", [Adam, AdamW, SGD])
def test_a_skipped_step_does_not_move_the_schedule(quiet, reading, make, fused):
    task = Net(make=make, fused=fused)
    t = quiet(precision="16-mixed", max_epochs=2)
    t.fit(task, data(BATCHES))
    first = [1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
    assert task.rates == first + [0.125 * rate for rate in first]
    assert t.global_step == 12
    assert t.lr_schedulers[0].scheduler.last_epoch == 12 - 6
    assert t.optimizers[0].param_groups[0]["lr"] == 0.5**6
    assert t.session.precision.last_scale == 2.0**10


def test_it_moves_for_the_last_step_of_a_fit_that_ends_within_an_epoch(quiet, reading):
    task = Net()
    t = quiet(precision="16-mixed", max_steps=5)
    t.fit(task, data(BATCHES))
    assert t.lr_schedulers[0].scheduler.last_epoch == 3


def test_a_plateau_is_looked_at_after_the_schedule_of_the_step(quiet, reading):
    task = Net(plateau=True)
    quiet(precision="16-mixed", val_check_interval=2).fit(task, data(BATCHES), data([1.0]))
    expected, rate, moves = [], 1.0, 0
    for step, batch in enumerate(BATCHES, start=1):
        expected.append(rate)
        if abs(batch) != LARGE:
            moves += 1
            rate = 0.5**moves  # it sets the rate, whatever the plateau made of it
        if step > 2:
            rate *= 0.125  # not better than after the validation before
    assert task.rates == expected


class Saves(lk.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_save_point(self, trainer, task):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_checkpoints_are_settled_and_go_on_bit_for_bit(quiet, reading, tmp_path):
    def run(**options):
        task = Net()
        t = quiet(precision="16-mixed", max_epochs=2, terminate_on_nan=False)
        t.fit(task, data(BATCHES), **options)
        return task, t

    t = quiet(precision="16-mixed", max_epochs=2, callbacks=Saves(tmp_path))
    whole = Net()
    t.fit(whole, data(BATCHES))
    moved = [0, 1, 1, 2, 3, 3, 3, 4, 4, 5, 6, 6]
    for step, count in enumerate(moved, start=1):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert saved["schedulers"][0]["last_epoch"] == count
        assert set(saved["precision"]) == {"scaler"}
        torch.manual_seed(step)
        again, other = run(ckpt_path=tmp_path / f"{step}.ckpt")
        assert again.rates == whole.rates[step:]
        assert torch.equal(again.net.weight, whole.net.weight)
        assert other.session.precision.state_dict() == t.session.precision.state_dict()


def test_the_rates_that_are_written_are_those_of_the_next_step(quiet, reading, tmp_path):
    monitor = LearningRateMonitor("step")
    t = quiet(
        precision="16-mixed",
        logger=CSVLogger(tmp_path),
        callbacks=monitor,
        log_every_n_steps=1,
        max_epochs=1,
    )
    task = Net()
    t.fit(task, data(BATCHES))
    rows = (t.run_dir / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    found = [row.split(",")[names.index("lr-AdamW")] for row in rows[1:]]
    assert [float(v) for v in found if v] == [*task.rates, 0.125]


def test_clipping_sees_and_logs_true_norms(quiet, reading):
    class Clipped(Net):
        def training_step(self, batch):
            return (self.net.weight * batch).mean() + self.net.bias.sum() * 0.0

        def on_before_optimizer_step(self, optimizer):
            norms.append(self.net.weight.grad.item())

        def on_train_batch_end(self, outputs, batch, batch_idx):
            clipped.append(self.net.weight.grad.item())

    norms, clipped = [], []
    t = quiet(precision="16-mixed", gradient_clip_val=2.0, accumulate_grad_batches=2)
    (row,) = t.fit(Clipped(make=SGD), data([3.0, 5.0, 1.0, 2.0]))
    assert norms == [4.0, 1.5]
    assert clipped[1::2] == [pytest.approx(2.0), 1.5]
    assert row["grad_norm"] == pytest.approx((4.0 + 1.5) / 2)


class Tokens(Net):
    """Returns the mean over so many tokens of its batch, and their number."""

    def training_step(self, batch):
        return {"loss": (self.net.weight * batch).mean(), "weight": self.tokens(batch)}

    def tokens(self, batch):
        return batch.abs().sum().clamp(max=1000.0)


def test_groups_weighted_by_tokens_skip_as_a_whole(quiet, reading):
    seen = []

    class Looks(Tokens):
        def on_before_optimizer_step(self, optimizer):
            seen.append(self.net.weight.grad.item())
            super().on_before_optimizer_step(optimizer)

    task = Looks(make=SGD)
    t = quiet(precision="16-mixed", accumulate_grad_batches=2)
    t.fit(task, data([2.0, 6.0, 1.0, LARGE, 1.0, 3.0]))
    assert seen[0] == pytest.approx((2 * 2 + 6 * 6) / 8)
    assert seen[2] == pytest.approx((1 + 3 * 3) / 4)
    assert task.rates == [1.0, 0.5, 0.5]
    assert t.session.precision.last_scale == 2.0**15


def test_a_single_loss_that_overflows_is_no_error_and_a_window_of_them_says_the_scale(quiet):
    class Overflows(Net):
        def training_step(self, batch):
            return super().training_step(batch) * (INF if batch.item() < 0 else 1.0)

    t = quiet(precision="16-mixed")
    t.fit(Overflows(), data([1.0, -1.0, 1.0]))
    assert t.global_step == 3
    with pytest.raises(NonFiniteError, match=r"3 of the last 3 batches\)\. The scale .* 8192;"):
        quiet(precision="16-mixed").fit(Overflows(), data([-1.0, -1.0, -1.0]))


class Two(lk.TaskModule):
    """The first optimizer steps with every batch, the second one gathers over two."""

    automatic_optimization = False

    def __init__(self, skip=-1):
        super().__init__()
        self.one, self.two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.skip = skip

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        size = float(batch)
        if batch_idx != self.skip:
            first.zero_grad()
            self.manual_backward((self.one.weight * size).sum())
            first.step()
        self.manual_backward((self.two.weight * min(size, 3.0) / 2).sum())
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        return [SGD(m.parameters(), lr=0.25, momentum=0.9) for m in (self.one, self.two)]


def test_two_optimizers_of_which_one_accumulates(quiet, reading):
    batches = [1.0, 2.0, LARGE, 0.5, 1.0, 2.0]
    weights = {}
    for precision, skip in (("16-mixed", -1), (32, 2)):
        torch.manual_seed(1)
        task = Two(skip)
        t = quiet(precision=precision, gradient_clip_val=1.5)
        t.fit(task, data(batches))
        weights[precision] = (task.one.weight.item(), task.two.weight.item())
        assert t.global_step == 6
    assert weights["16-mixed"] == weights[32]
