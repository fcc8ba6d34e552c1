"""``Trainer(compile=)`` on a GPU, with and without CUDA graphs, against the fit uncompiled."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.loggers.base import Logger

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the compiler's own


class Net(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
        self.all = torchmetrics.CatMetric()  # keeps what it was given in every batch

    def training_step(self, batch, batch_idx):
        x, y = batch
        found = self.net(x)
        loss = nn.functional.mse_loss(found, y)
        self.log("loss", loss)
        self.log("mean", found.mean())
        self.all.update(found.detach())
        return {"loss": loss, "found": found.detach()}

    def validation_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Rows(Logger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append(dict(metrics))


class Outputs(lk.Callback):
    """Keeps what the steps returned until the end of the epoch."""

    def __init__(self):
        self.kept, self.seen = [], None

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.kept.append(outputs["found"])

    def on_train_epoch_end(self, trainer, task):
        self.seen = torch.cat([torch.cat(self.kept).flatten(), task.all.compute().flatten()]).cpu()
        task.all.reset()
        self.kept = []


def loader(seed, samples=256):
    x = torch.randn(samples, 16, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16)


def fit(quiet, **options):
    torch.manual_seed(2)
    task, rows, outputs = Net(), Rows(), Outputs()
    how = {"max_epochs": 3, "gpus": 1, "logger": rows, "log_every_n_steps": 5, "callbacks": outputs}
    quiet(**how | options).fit(task, loader(1), loader(2))
    return task.cpu().state_dict(), rows.rows, outputs.seen


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", [True, {"mode": "reduce-overhead"}], ids=["plain", "graphs"])
def test_rows_outputs_and_weights_are_those_of_an_eager_fit(quiet, how, groups):
    torch._dynamo.reset()
    weights, rows, outputs = fit(quiet, accumulate_grad_batches=groups)
    found = fit(quiet, accumulate_grad_batches=groups, compile=how)
    for name, value in weights.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)
    assert len(found[1]) == len(rows)
    for row, wanted in zip(found[1], rows, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(found[2], outputs, rtol=1e-4, atol=1e-4)
