"""What the processes of test_evaluation.py do. Each function is called by all ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

import lightkit as lk
from lightkit.callbacks import BasePredictionWriter, PredictionWriter
from tests.distributed.quiet import quiet_trainer

COUNTS = (21, 23, 499)
METRICS = ("accuracy", "f1", "auroc", "mean", "own")


def data(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, torch.randint(3, (count,), generator=generator), torch.arange(count))


def loader(count: int) -> DataLoader:
    return DataLoader(data(count), 4)


class Own(Metric):
    """A metric with a reduction of its own, and one state that is kept as it is."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("most", torch.zeros(3), dist_reduce_fx=lambda stacked: stacked.amax(0))
        self.add_state("parts", [], dist_reduce_fx=None)

    def update(self, scores):
        self.most = torch.maximum(self.most, scores.amax(0))
        self.parts.append(scores.sum())

    def compute(self):
        return self.most.sum() + torch.stack(list(self.parts)).sum()


class Syncs:
    """Counts how often torchmetrics synchronises a state by itself."""

    def __init__(self):
        self.count = 0
        self.original = torchmetrics.metric.gather_all_tensors

    def __call__(self, *arguments, **options):
        self.count += 1
        return self.original(*arguments, **options)

    def __enter__(self):
        torchmetrics.metric.gather_all_tensors = self
        return self

    def __exit__(self, *error):
        torchmetrics.metric.gather_all_tensors = self.original


class Net(lk.TaskModule):
    """Does not learn, so that all numbers of an epoch are of the same weights."""

    def __init__(self, syncs=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(5, 3)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.f1 = MulticlassF1Score(3)
        self.auroc, self.mean, self.own = BinaryAUROC(), MeanMetric(), Own()
        self.matrix = MulticlassConfusionMatrix(3)
        self.group = MetricCollection(
            {"group_acc": MulticlassAccuracy(3), "group_f1": MulticlassF1Score(3)}
        )
        self.trained = MulticlassAccuracy(3, average="micro")
        self.syncs, self.told, self.in_steps = syncs, [], 0

    def predict_step(self, batch, batch_idx):
        return {"scores": self.net(batch[0]), "index": batch[2]}

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.trained(scores, batch[1])
        self.log("train_acc", self.trained, on_step=False, on_epoch=True)
        self.log("biggest", scores.max(), reduce_fx="max")
        return nn.functional.cross_entropy(scores, batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        scores, target = self.net(batch[0]), batch[1]
        before = 0 if self.syncs is None else self.syncs.count
        self.accuracy(scores, target)  # forward: it gives the value of this batch
        self.f1.update(scores, target)
        self.auroc.update(scores[:, 1], target == 1)
        self.mean(scores.abs(), weight=target[:, None] + 1.0)
        self.own.update(scores.abs())
        self.matrix.update(scores, target)
        self.group.update(scores, target)
        if self.syncs is not None:
            self.in_steps += self.syncs.count - before
        for name in METRICS:
            self.log(name, getattr(self, name))
        self.log_dict(self.group)
        self.log("count", float(len(target)), reduce_fx="sum")
        return nn.functional.cross_entropy(scores, target)

    def on_validation_epoch_end(self):
        self.told.append(self.matrix.compute().tolist())
        self.matrix.reset()
        self.log("late", float(self.trainer.global_rank))

    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options) -> lk.Trainer:
    return quiet_trainer(**{"max_epochs": 1} | options)


def plain(results):
    return [{name: float(value) for name, value in row.items()} for row in results]


def everything(folder: str) -> dict:
    """Fit with validation, test and predict for each count; then what goes wrong on purpose."""
    found = {count: measured(count, folder) for count in COUNTS}
    found["few"] = few()
    found["loaders"] = several_loaders()
    found["own"] = own_loaders(folder)
    found["plateau"] = plateau()
    found["wrong"] = different_names()
    return found


class Places(BasePredictionWriter):
    """Keeps which samples it was given, and which the batch says that they are."""

    def __init__(self):
        super().__init__("batch")
        self.told, self.true = [], []

    def write_on_batch_end(
        self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        self.told += batch_indices
        self.true += batch[2].tolist()


def measured(count: int, folder: str) -> dict:
    """All numbers and predictions of one number of samples."""
    with Syncs() as syncs:
        task = Net(syncs)
        one = trainer()
        one.fit(task, DataLoader(data(480), 4), loader(count))
        fitted = {k: v for k, v in one.history[0].items() if k != "time"}
        tested = plain(one.test(task, loader(count), verbose=False))
        predicted = one.predict(task, loader(count))
        writer = PredictionWriter(Path(folder) / f"predictions_{count}", batches_per_file=7)
        places = Places()
        two = trainer(callbacks=[writer, places])
        nothing = two.predict(task, loader(count), return_predictions=False)
        return {
            "history": fitted,
            "test": tested,
            "matrix": task.told,
            "metrics": {name: float(v) for name, v in one.callback_metrics.items()},
            "predictions": predicted,
            "nothing": nothing,
            "places": (places.told, places.true),
            "written": PredictionWriter.load(writer.output_dir),
            "in_steps": task.in_steps,
            "by_itself": syncs.count,
        }


def gathered(tensor, group=None):
    """What the user brings to synchronise a metric."""
    found = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, tensor)
    return found


class Few(Net):
    """Like a `Net` whose matrix is not computed by the user, and with metrics of other kinds."""

    def __init__(self):
        super().__init__()
        self.by_itself = SumMetric(dist_sync_fn=gathered)
        self.sum = SumMetric() + 1.0  # torchmetrics makes a metric of its own kind of it

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.by_itself.update(batch[1])
        self.sum.update(batch[1])
        self.log("by_itself", self.by_itself)
        self.log("sum", self.sum)
        self.log("mine", float(batch_idx), rank_zero_only=True)
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.matrix.reset()

    on_test_epoch_end = on_validation_epoch_end


def few() -> dict:
    """Fewer batches than ranks: some have none."""
    one, task = trainer(), Few()
    one.fit(task, DataLoader(data(480), 4), loader(5))
    return {
        "history": {k: v for k, v in one.history[0].items() if k != "time"},
        "test": plain(one.test(task, loader(3), verbose=False)),
        "predictions": one.predict(task, loader(3)),
    }


def several_loaders() -> dict:
    one, task = trainer(), Few()
    loaders = {"long": loader(23), "short": loader(4), "last": loader(9)}
    return {
        "test": plain(one.test(task, loaders, verbose=False)),
        "predictions": one.predict(task, loaders),
    }


def own_loaders(folder: str) -> list[list[int]]:
    """Loaders that give each rank its own share: the samples in the order of ranks."""
    writer = PredictionWriter(Path(folder) / "own", batches_per_file=1)
    one = trainer(use_distributed_sampler=False, callbacks=[writer])
    rank = torch.distributed.get_rank()
    own = Subset(data(40), range(10 * rank, 10 * rank + 10 - rank))
    found = [one.predict(Net(), DataLoader(own, 4)), PredictionWriter.load(writer.output_dir)]
    return [torch.cat([batch["index"] for batch in batches]).tolist() for batches in found]


class Plateau(Net):
    """Its rate falls by a value of single steps, which differs between ranks."""

    def training_step(self, batch, batch_idx):
        value = float(self.trainer.global_step % 7 * (1 + self.trainer.global_rank))
        self.log("noise", value)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9)
        how = {"scheduler": schedule, "interval": "step", "monitor": "noise"}
        return {"optimizer": optimizer, "lr_scheduler": how}


def plateau() -> dict:
    one, task = trainer(max_steps=30, max_epochs=-1), Plateau()
    one.fit(task, DataLoader(data(480), 4))
    return {"lr": one.optimizers[0].param_groups[0]["lr"], "weights": task.net.weight.detach()}


class Wrong(Net):
    def validation_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1:
            self.log("only_here", 1.0)
        return super().validation_step(batch, batch_idx)


def different_names() -> str:
    try:
        trainer().validate(Wrong(), loader(23), verbose=False)
    except lk.errors.LoggingError as error:
        return str(error)
    return ""
