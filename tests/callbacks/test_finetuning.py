"""Unfreezing while a run trains: groups, schedules, resuming, several ranks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.callbacks import BackboneFinetuning, BaseFinetuning, LearningRateMonitor, Unfreeze
from lightkit.errors import ConfigError, UsageError
from lightkit.testing import assert_resumes_exactly
from tests.distributed import scenes_finetuning as scenes
from tests.distributed.harness import torchrun


def loader(samples: int = 16) -> DataLoader:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, shuffle=True)


class Net(lk.TaskModule):
    """Two layers with a batch norm below a head; only what learns is in the optimizer."""

    def __init__(self, schedule=None):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 6)
        )
        self.head = nn.Linear(6, 1)
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

    validation_step = training_step

    def configure_optimizers(self):
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=0.01, momentum=0.9)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


class Rates(lk.Callback):
    """Notes at the end of each epoch the rates of all groups, and how many parameters learn."""

    def __init__(self):
        self.rows, self.learning = [], []

    def on_train_epoch_end(self, trainer, task):
        self.rows.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.learning.append(sum(p.requires_grad for p in task.parameters()))


def by_step(optimizer):
    return {"scheduler": LambdaLR(optimizer, lambda step: 1 / (step + 1)), "interval": "step"}


UNFREEZE = {1: "backbone.3", 2: ["backbone.1", "backbone.0"]}


def test_S0_09_parts_join_at_their_epochs_under_a_schedule(quiet):
    seen, task = Rates(), Net(by_step)
    quiet(max_epochs=4, callbacks=[Unfreeze(UNFREEZE), seen, LearningRateMonitor()]).fit(
        task, loader(), loader(8)
    )
    assert seen.learning == [2, 4, 8, 8]
    for epoch, row in enumerate(seen.rows):
        first = 0.01 / (4 * (epoch + 1) + 1)
        wanted = [first / 2.6**depth for depth in range([1, 2, 4, 4][epoch])]
        assert row == pytest.approx(wanted, rel=1e-12)
    assert task.backbone[1].training


def test_S0_09_it_equals_a_run_that_had_every_group_from_the_start(quiet):
    """Parameters without a gradient are passed over, so both take the same steps."""

    class Whole(Net):
        def configure_optimizers(self):
            parts = [self.head, self.backbone[3], self.backbone[1], self.backbone[0]]
            groups = [
                {"params": [*part.parameters()], "lr": 0.01 / 2.6**depth}
                for depth, part in enumerate(parts)
            ]
            optimizer = torch.optim.SGD(groups, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}

    finals = []
    for kind in (Net, Whole):
        lk.seed_everything(5, verbose=False)
        task = kind(by_step)
        trainer = quiet(max_epochs=4, callbacks=[Unfreeze(UNFREEZE)], fused=False)
        trainer.fit(task, loader())
        assert len(trainer.optimizers[0].param_groups) == 4
        finals.append(task.state_dict())
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "fused"),
    [(None, None), (by_step, False), (lambda o: StepLR(o, 1), None)],
    ids=["none", "steps", "epochs"],
)
def test_it_resumes_exactly(schedule, fused):
    assert_resumes_exactly(
        Net(schedule),
        loader(),
        loader(8),
        max_epochs=3,
        at=[2, 5, 8, 10],
        callbacks=lambda: [Unfreeze(UNFREEZE)],
        fused=fused,
    )


def test_a_second_fit_begins_anew(quiet):
    callback, seen = Unfreeze({1: "backbone"}), Rates()
    task = Net()
    trainer = quiet(max_epochs=2, callbacks=[callback, seen])
    trainer.fit(task, loader())
    trainer.fit(task, loader())
    assert seen.learning == [2, 8, 2, 8]
    assert [len(row) for row in seen.rows] == [1, 2, 1, 2]


def test_a_run_that_is_resumed_with_it_unfreezes_what_was_due(quiet, tmp_path):
    task, seen = Net(), Rates()
    lk.freeze(task.backbone)
    first = quiet(max_epochs=2, enable_checkpointing=True)
    first.fit(task, loader())
    path = first.checkpoint_callback.last_model_path
    quiet(max_epochs=4, callbacks=[Unfreeze({1: "backbone.3", 3: "backbone"}), seen]).fit(
        task, loader(), ckpt_path=path
    )
    assert seen.learning == [4, 8]


def test_what_is_said(quiet, caplog):
    with caplog.at_level(logging.INFO, "lightkit"):
        quiet(max_epochs=2, callbacks=[Unfreeze({1: "head", 2: "backbone.0"})]).fit(Net(), loader())
    assert "epoch 2: head learns from here on" in caplog.text
    assert "max_epochs=2 ends before backbone.0 is unfrozen" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({1: "3"}, "Did you mean 'backbone.3'"),
        ({1: "heads"}, "Did you mean 'head'"),
        ({1: "backbone.9"}, "has no module 'backbone.9'"),
    ],
)
def test_a_name_that_is_none_is_an_error(quiet, schedule, text):
    with pytest.raises(ConfigError, match=text):
        quiet(callbacks=[Unfreeze(schedule)]).fit(Net(), loader())


@pytest.mark.parametrize("wrong", [{}, {-1: "a"}, {"1": "a"}, {1: [2]}, ["a"], {1: []}, {1: 2}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ConfigError, match="such as"):
        Unfreeze(wrong)
    with pytest.raises(ConfigError, match="a decay above 0"):
        Unfreeze({1: "a"}, decay="2")


def test_lbfgs_takes_no_group_and_says_so(quiet):
    class Closed(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS([p for p in self.parameters() if p.requires_grad])

    with pytest.raises(UsageError, match="No parameters can join an LBFGS"):
        quiet(max_epochs=2, callbacks=[Unfreeze({1: "backbone"})]).fit(Closed(), loader())


# --- Lightning's names ---------------------------------------------------------------------------


class Both(BaseFinetuning):
    """As in Lightning's manual: a layer at epoch 1, the rest at epoch 2, which gets a rate."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[3], optimizer, lr=0.002)
        if epoch == 2:
            rest = [pl_module.backbone[0], pl_module.backbone[1]]
            self.unfreeze_and_add_param_group(rest, optimizer, train_bn=False)
            optimizer.param_groups[1]["lr"] /= 2


def test_base_finetuning(quiet):
    seen, task = Rates(), Net(lambda o: StepLR(o, 1, gamma=0.5))
    quiet(max_epochs=4, callbacks=[Both(), seen]).fit(task, loader())
    assert seen.learning == [2, 4, 6, 6]
    wanted = [
        [0.01],
        [0.005, 0.002],
        [0.0025, 0.0005, 0.00025],
        [0.00125, 0.00025, 0.000125],
    ]
    for row, expected in zip(seen.rows, wanted, strict=True):
        assert row == pytest.approx(expected, rel=1e-12)
    assert not task.backbone[1].training
    assert_resumes_exactly(
        Net(by_step), loader(), max_epochs=4, at=[3, 6, 10], callbacks=lambda: [Both()]
    )


def test_the_helpers_of_base_finetuning():
    task = Net()
    flat = BaseFinetuning.flatten_modules([task.backbone, [task.head]])
    assert flat == [*task.backbone, task.head]
    BaseFinetuning.freeze(task.backbone)  # batch norms learn on, as elsewhere
    norm = [*task.backbone[1].parameters()]
    assert [*BaseFinetuning.filter_params(task.backbone)] == norm
    assert [*BaseFinetuning.filter_params(task.backbone, train_bn=False)] == []
    frozen = BaseFinetuning.filter_params(task.backbone, requires_grad=False)
    assert len([*frozen]) == 4
    BaseFinetuning.freeze_module(task.backbone)
    assert lk.is_frozen(task.backbone)
    BaseFinetuning.make_trainable([task.backbone])
    assert all(p.requires_grad for p in task.parameters())
    optimizer = torch.optim.SGD(task.head.parameters(), lr=1.0)
    assert BaseFinetuning.filter_on_optimizer(optimizer, [*task.head.parameters(), *norm]) == norm


def test_backbone_finetuning(quiet):
    seen = Rates()
    callback = BackboneFinetuning(1, backbone_initial_ratio_lr=0.2, verbose=True)
    quiet(max_epochs=5, callbacks=[callback, seen]).fit(Net(), loader())
    assert seen.learning == [4, 8, 8, 8, 8]  # the batch norm from the start
    assert [len(row) for row in seen.rows] == [1, 2, 2, 2, 2]
    rates = [row[-1] for row in seen.rows[1:]]
    assert rates == pytest.approx([0.002, 0.004, 0.008, 0.01], rel=1e-12)
    assert_resumes_exactly(
        Net(by_step),
        loader(),
        max_epochs=4,
        at=[3, 6, 10],
        callbacks=lambda: [BackboneFinetuning(1, lambda epoch: 1.5)],
    )


def test_backbone_finetuning_sets_no_rate_but_the_backbone_s(quiet, caplog):
    class Whole(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            out = self.head(self.backbone(batch[0]))
            self.manual_backward(nn.functional.mse_loss(self.other(out), batch[1]))
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            own = torch.optim.SGD(self.other.parameters(), lr=0.1)
            return [torch.optim.SGD(self.head.parameters(), lr=0.01), own]

    def end(task):
        trainer = quiet(max_epochs=3, callbacks=[BackboneFinetuning(1)])
        trainer.fit(task, loader())
        return [[group["lr"] for group in o.param_groups] for o in trainer.optimizers]

    assert end(Whole()) == [[0.01]]
    assert caplog.text.count("holds the backbone from the start") == 1
    assert end(Two()) == [[0.01, 0.002], [0.1]]
    for wrong in (("1",), (-1,), (1, 2.0)):
        with pytest.raises(ConfigError, match="an epoch from 0 on, then a function"):
            BackboneFinetuning(*wrong)


def test_backbone_finetuning_needs_a_backbone(quiet):
    task = Net()
    task.net = task.backbone
    del task.backbone
    with pytest.raises(UsageError, match="no module `backbone`"):
        quiet(callbacks=[BackboneFinetuning(1)]).fit(task, loader())


# --- several ranks -------------------------------------------------------------------------------


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    """Parameters that learn only from the second epoch on are averaged from there on."""
    first, second = torchrun(
        "tests.distributed.scenes_finetuning:unfreezing",
        2,
        tmp_path,
        world=2,
        path=str(tmp_path / "at_14.ckpt"),
    )
    alone = scenes.unfreezing(1)
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-6, atol=1e-6)
    assert first["rates"] == second["rates"] == alone["rates"]
    assert [len(row) for row in alone["rates"]] == [1, 2, 3]
    for name, value in first["resumed"].items():
        assert torch.equal(value, first["weights"][name]), name
