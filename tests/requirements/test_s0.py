"""Requirements of the first article, "No fit?": ready loops on dogs and cats, and classic mistakes.

What one forgets in a loop of one's own must be impossible, and the simple case must be simple.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightkit as lk
from lightkit.callbacks import EarlyStopping, ModelCheckpoint
from lightkit.data import move_to_device
from tests.small import Net, loader

ROOT = Path(__file__).parents[2]


def classes(samples: int = 22, seed: int = 0) -> TensorDataset:
    """Two classes that a line parts."""
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


class Classifier(lk.TaskModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)
        )
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.val_accuracy = self.accuracy.clone()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.accuracy(scores, batch[1])
        self.log("train_acc", self.accuracy, prog_bar=True)
        return nn.functional.cross_entropy(scores, batch[1])

    def validation_step(self, batch, batch_idx):
        scores = self(batch[0])
        self.val_accuracy(scores, batch[1])
        self.log("val_acc", self.val_accuracy, prog_bar=True)
        return nn.functional.cross_entropy(scores, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_S0_01_eval_mode_in_evaluations_and_every_mode_put_back(quiet):
    seen = []

    class Frozen(Classifier):
        def __init__(self):
            super().__init__()
            self.frozen = nn.BatchNorm1d(4).eval()

        def training_step(self, batch, batch_idx):
            seen.append(("train", self.training, self.net[1].training, self.frozen.training))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            before = self.net[1].running_mean.clone()
            loss = super().validation_step(batch, batch_idx)
            assert torch.equal(self.net[1].running_mean, before)
            seen.append(("val", self.training, self.net[1].training, self.frozen.training))
            return loss

    task, val = Frozen(), DataLoader(classes(seed=1), 4)
    quiet(max_epochs=2).fit(task, DataLoader(classes(), 4), val)
    assert set(seen) == {("train", True, True, False), ("val", False, False, False)}
    one, two = (quiet().validate(task, val, verbose=False) for _ in range(2))
    assert one == two  # no dropout
    assert quiet().test(task, val, verbose=False)[0]["test_loss"] == one[0]["val_loss"]
    assert task.training


def test_S0_02_gradients_are_zeroed_before_every_step(quiet):
    seen = []

    class Constant(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.weight * 1.0

        def on_before_optimizer_step(self, optimizer):
            seen.append(self.weight.grad.item())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet(max_epochs=2).fit(Constant(), [(torch.zeros(1),)] * 5)
    assert seen == [1.0] * 10


@pytest.mark.parametrize("how", ["loader", "dataset", "subset"])
def test_S0_03_training_data_in_validation_is_told(quiet, caplog, how):
    data = classes()
    train = DataLoader(Subset(data, range(15)) if how == "subset" else data, 4)
    val = {"loader": train, "dataset": DataLoader(data, 11)}
    val["subset"] = DataLoader(Subset(data, range(12, 22)), 4)
    with caplog.at_level(logging.WARNING, logger="lightkit"):
        quiet().fit(Classifier(), train, val[how])
    assert "training loader" in caplog.text
    assert ("shares 3 of its 10 samples" in caplog.text) is (how == "subset")


@dataclasses.dataclass
class Pair:
    image: torch.Tensor
    name: str


Row = collections.namedtuple("Row", ["x", "y"])


class Own:
    """A batch that knows how to move itself."""

    device = None

    def to(self, device):
        moved = Own()
        moved.device = torch.device(device)
        return moved


def test_S0_04_batches_of_any_nesting_are_moved(quiet):
    batch = {
        "tuple": (torch.ones(2), [torch.ones(1)]),
        "dataclass": Pair(torch.ones(2), "cat"),
        "named": Row(torch.ones(2), 3),
        "packed": pack_sequence([torch.ones(2), torch.ones(1)]),
        "own": Own(),
    }
    moved = move_to_device(batch, "meta")
    assert moved["tuple"][0].is_meta
    assert moved["tuple"][1][0].is_meta
    assert moved["dataclass"].image.is_meta
    assert moved["dataclass"].name == "cat"
    assert (moved["named"].x.is_meta, moved["named"].y) == (True, 3)
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["packed"].data.is_meta
    assert moved["own"].device == torch.device("meta")

    seen = []

    class Moved(Net):  # not a word about devices and types in it
        def training_step(self, batch, batch_idx):
            seen.append((batch["own"].device, batch["named"].x.dtype, batch["packed"].data.dtype))

    quiet(precision=64).fit(Moved(), [batch, batch])
    assert seen == [(torch.device("cpu"), torch.float64, torch.float64)] * 2


def test_S0_05_means_and_metrics_are_those_of_the_whole_data_set(quiet):
    data = classes(10)  # batches of 4, 4 and 2
    task = Classifier()
    [row] = quiet().validate(task, DataLoader(data, 4), verbose=False)
    x, y = data.tensors
    scores = task.eval()(x).detach()
    assert row["val_loss"] == pytest.approx(nn.functional.cross_entropy(scores, y).item(), abs=1e-6)
    assert row["val_acc"] == pytest.approx((scores.argmax(1) == y).double().mean().item(), abs=1e-6)


def test_S0_06_no_graph_in_evaluations(quiet):
    class Looks(Net):
        def training_step(self, batch, batch_idx):
            assert self(batch[0]).requires_grad
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not self(batch[0]).requires_grad

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    quiet(max_epochs=2).fit(Looks(), loader(), loader(8, seed=2))
    assert not quiet().predict(Looks(), loader())[0].requires_grad


def test_S0_07_one_line_trains_and_a_loop_of_ones_own_stays_possible(quiet, tmp_path):
    torch.manual_seed(3)
    history = lk.fit(nn.Linear(4, 1), loader(), loss="mse", epochs=2, default_root_dir=tmp_path)
    assert history[-1]["train_loss"] < history[0]["train_loss"]

    torch.manual_seed(3)
    by_hand, task = Net(), None
    torch.manual_seed(3)
    task = Net()
    optimizer = by_hand.configure_optimizers()
    for batch_idx, batch in enumerate(loader()):
        optimizer.zero_grad()
        by_hand.training_step(batch, batch_idx).backward()  # the task is a plain module
        optimizer.step()
    quiet(fused=False).fit(task, loader())
    assert torch.equal(task.net.weight, by_hand.net.weight)


class Photos(Dataset):
    """Cats and dogs as an existing data set holds them; here they are dark and bright noise."""

    def __len__(self):
        return 128

    def __getitem__(self, index):
        label = index % 2
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)) + label, label


def test_S0_08_transfer_learning(quiet):
    class DogsAndCats(lk.TaskModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential()  # a backbone that was trained before would be loaded here
            self.net.stem = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
            )
            self.net.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            lk.freeze(self.net)
            assert lk.is_frozen(self.net)
            self.net.fc = nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.fc.parameters(), lr=1e-4)

    task = DogsAndCats()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train = DataLoader(Photos(), 64, shuffle=True, num_workers=2)
    quiet(max_epochs=2).fit(task, train)
    changed = {n for n, value in task.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"net.fc.weight", "net.fc.bias"}  # no running mean either
    assert "lk.freeze(" in (ROOT / "templates/transfer/model.py").read_text(encoding="utf-8")


def test_S0_09_freezing(quiet):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    lk.freeze(net[:2])
    assert lk.is_frozen(net[:2])
    assert not lk.is_frozen(net)

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.net = net

        def on_before_optimizer_step(self, optimizer):
            assert net[0].weight.grad is None
            assert not net[1].training
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(net[2].weight), id(net[2].bias)}

        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.01)

    quiet(max_epochs=2).fit(Frozen(), loader(), loader(8, seed=2))
    lk.unfreeze(net)
    assert all(p.requires_grad for p in net.parameters())
    assert net[1].training


def test_S0_10_metrics_of_training_need_no_second_pass(quiet):
    """That a fit costs no more time than a bare loop is measured in tests/cost."""
    reads = collections.Counter()

    class Counted(Dataset):
        data = classes()

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            reads[index] += 1
            return self.data[index]

    history = quiet(max_epochs=3).fit(Classifier(), DataLoader(Counted(), 4, shuffle=True))
    assert set(reads.values()) == {3}
    assert len(reads) == 22
    assert all(0 <= row["train_acc"] <= 1 for row in history)


def test_S0_11_the_first_page_needs_thirty_lines_and_no_callback():
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    definitions, fit = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:2]
    code = [line for line in (definitions + fit).splitlines() if line.strip()]
    assert 10 < len(code) <= 30
    assert "lk.Trainer(max_epochs=3).fit(" in fit
    assert "callback" not in definitions + fit


def test_S0_12_progress_and_metrics_with_no_set_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lk.Trainer(max_epochs=2).fit(Classifier(), loader_of(classes()), loader_of(classes(seed=1)))
    said = capsys.readouterr().out
    assert re.search(r"epoch +train_loss +val_loss +train_acc +val_acc +time", said)
    for epoch in ("1/2", "2/2"):
        assert re.search(rf"^ *{epoch}( +\d\.\d+){{4}} +[\d.]+s", said, re.MULTILINE)


def loader_of(data) -> DataLoader:
    return DataLoader(data, 4)


def test_S0_13_a_plain_line_per_epoch_where_there_is_no_terminal(quiet, capsys):
    assert not sys.stdout.isatty()
    quiet(max_epochs=3, enable_progress_bar=True).fit(Net(), loader())
    said = capsys.readouterr().out
    assert "\r" not in said
    assert "\x1b" not in said
    assert len(re.findall(r"^ *\d/3 .*$", said, re.MULTILINE)) == 3


def test_S0_14_loaders_are_used_as_they_are(quiet):
    data, seen = classes(), []
    train = DataLoader(data, 5, shuffle=True, drop_last=True)
    parts = (train.dataset, train.sampler, train.batch_sampler)

    class Sees(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    torch.manual_seed(5)
    wanted = torch.cat([x for x, _ in train])
    task = Sees()
    torch.manual_seed(5)
    quiet().fit(task, train)
    assert (train.dataset, train.sampler, train.batch_sampler) == parts
    assert [len(x) for x in seen] == [5] * 4  # nothing is set aside
    assert torch.equal(torch.cat(seen), wanted)


@pytest.mark.parametrize("kind", ["dataset", "tensors", "arrays", "lists"])
def test_S0_15_data_sets_and_arrays_where_a_loader_is_expected(tmp_path, kind):
    x, y = loader().dataset.tensors
    given = {
        "dataset": TensorDataset(x, y),
        "tensors": (x, y),
        "arrays": (x.numpy().astype("float64"), y.numpy()),
        "lists": (x.tolist(), y.tolist()),
    }[kind]
    net = nn.Linear(4, 1)
    weights = net.weight.detach().clone()
    [row] = lk.fit(net, given, loss="mse", epochs=1, default_root_dir=tmp_path)
    assert row["step"] == 1  # one batch of 20, by default of 32
    assert not torch.equal(net.weight, weights)
    assert lk.predict(net, given[0] if kind != "dataset" else given).shape == (20, 1)


def test_S0_16_fit_returns_one_dict_of_floats_per_epoch(quiet):
    history = quiet(max_epochs=2).fit(
        Classifier(), loader_of(classes()), loader_of(classes(seed=1))
    )
    assert isinstance(history, list)
    assert [row["epoch"] for row in history] == [1, 2]
    for row in history:
        assert {"train_loss", "train_acc", "val_loss", "val_acc"} <= set(row)
        assert all(type(row[name]) is float for name in ("train_loss", "train_acc", "val_acc"))


def test_S0_17_the_best_checkpoint(tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7])
    after = []

    class Scored(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", self.score)

        def on_validation_start(self):
            self.score = next(scores)

        def on_validation_end(self):
            after.append(self.net.weight.detach().clone())

    keep = ModelCheckpoint(
        tmp_path,
        "model_{epoch}-{val_acc:.2f}",
        monitor="val_acc",
        mode="max",
        save_last=False,
        restore_best=True,
    )
    task = Scored()
    options = {"max_epochs": 3, "logger": False, "enable_progress_bar": False}
    trainer = lk.Trainer(
        **options, num_sanity_val_steps=0, callbacks=keep, default_root_dir=tmp_path / "runs"
    )
    trainer.fit(task, loader(), loader(4, seed=2))
    best = tmp_path / "model_epoch=2-val_acc=0.90.ckpt"
    assert keep.best_model_path == str(best)
    assert [path.name for path in tmp_path.glob("model_*")] == [best.name]
    assert not torch.equal(task.net.weight, after[-1])
    assert torch.equal(task.net.weight, after[1])  # the best weights are back

    # Atomic: a disk that fails in the middle of writing leaves the old file as it was.
    whole = best.read_bytes()
    real = torch.save

    def torn(obj, file, *args, **kwargs):
        real(obj, file, *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    monkeypatch.setattr("lightkit.checkpoint.writer.RETRY_SECONDS", 0.0)
    with pytest.raises(lk.errors.CheckpointError, match="No space left"):
        lk.checkpoint.write_checkpoint({"task": {}}, best)
    assert best.read_bytes() == whole


def test_S0_18_stopping_best_weights_and_every_scheduler(quiet):
    class Worse(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    stop = EarlyStopping("val_loss", patience=2)
    assert len(quiet(max_epochs=9, callbacks=stop).fit(Worse(), loader(), loader(4, seed=2))) == 3

    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(lk.LightkitError, match="nan"):
        quiet(log_every_n_steps=1).fit(Diverges(), loader())

    lrs = torch.optim.lr_scheduler
    makes = {
        "epoch": [
            lambda o: lrs.StepLR(o, 1),
            lambda o: lrs.ExponentialLR(o, 0.5),
            lambda o: lrs.CosineAnnealingLR(o, 4),
            lambda o: lrs.LinearLR(o),
            lambda o: lrs.LambdaLR(o, lambda n: 0.5**n),
            lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.StepLR(o, 1)], [1]),
            lambda o: lrs.CosineAnnealingWarmRestarts(o, 4),
        ],
        "step": [lambda o: lrs.OneCycleLR(o, 0.1, 10), lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3)],
    }
    for interval, several in makes.items():
        for make in several:

            class Scheduled(Net):
                def configure_optimizers(self):
                    optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
                    entry = {"scheduler": make(optimizer), "interval": interval}  # noqa: B023
                    return {"optimizer": optimizer, "lr_scheduler": entry}

            trainer = quiet(max_epochs=2)
            trainer.fit(Scheduled(), loader())
            reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01, momentum=0.9)
            wanted = make(reference)
            for _ in range(2 if interval == "epoch" else 10):
                reference.step()
                wanted.step()
            assert trainer.optimizers[0].param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert_plateau_reduces(quiet)


def assert_plateau_reduces(quiet):
    class Plateau(Net):
        def validation_step(self, batch, batch_idx):
            return torch.tensor(1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            entry = {"scheduler": schedule, "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": entry}

    trainer = quiet(max_epochs=2)
    trainer.fit(Plateau(), loader(), loader(4, seed=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


def test_S0_19_callbacks_reach_into_the_optimization(quiet):
    class Clip(lk.Callback):
        def on_after_backward(self, trainer, task):
            for parameter in task.parameters():
                parameter.grad.zero_()

    task = Net()
    before = task.net.weight.detach().clone()
    quiet(callbacks=Clip()).fit(task, loader())
    assert torch.equal(task.net.weight, before)


def test_S0_20_metrics_by_name(tmp_path):
    x, y = classes(40).tensors
    net = nn.Linear(4, 2)
    [row] = lk.fit(
        net,
        (x, y),
        (x[:10] + 0.0, y[:10]),
        loss="cross_entropy",
        metrics=["accuracy"],
        epochs=1,
        default_root_dir=tmp_path,
    )
    right = (net(x[:10]).argmax(1) == y[:10]).float().mean().item()
    assert row["val_accuracy"] == pytest.approx(right)
    assert 0 <= row["train_accuracy"] <= 1


def test_S0_21_the_loss_is_logged_in_intervals(tmp_path):
    rows = []

    class Keeps(lk.loggers.Logger):
        def log_metrics(self, metrics, step):
            rows.append((step, dict(metrics)))

    losses = []

    class Losses(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    options = {"enable_progress_bar": False, "enable_checkpointing": False}
    lk.Trainer(
        max_epochs=1,
        logger=Keeps(),
        log_every_n_steps=10,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    ).fit(Losses(), loader(120))
    assert [step for step, _ in rows] == [10, 20, 30]
    assert rows[1][1]["train_loss"] == pytest.approx(sum(losses[10:20]) / 10)


def test_S0_22_time_is_taken_with_nothing_attached(quiet):
    trainer = quiet(max_epochs=2)
    history = trainer.fit(Net(), loader(), loader(8, seed=2))
    assert all(row["time"] > 0 for row in history)
    times = trainer.epoch_times
    assert set(times) == {"data", "validation", "checkpoint", "callbacks", "step"}
    assert sum(times.values()) == pytest.approx(history[-1]["time"], abs=0.01)
    assert trainer.state.seconds > 0


def test_S0_23_layers_are_those_of_torch():
    assert {"Flatten", "Identity", "Lambda"}.isdisjoint(dir(lk))


def test_S0_24_a_quickstart_concepts_and_a_guide():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ("index.md", "concepts.md", "loop.md", "data.md", "checkpoints.md", "callbacks.md"):
        assert page in navigation
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) > 100, page


def test_S0_25_a_small_part_of_the_data(quiet):
    steps = []

    class Counts(Net):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    quiet(limit_train_batches=2).fit(Counts(), loader(80))
    assert steps == [0, 1]
    quiet(limit_train_batches=0.25).fit(Counts(), loader(80))
    assert len(steps) == 2 + 5


def test_S0_26_segmentation(quiet):
    """The second kind of task, a class for each pixel, is a template."""
    pytest.importorskip("sklearn")
    from templates.segmentation.data import ClutterData
    from templates.segmentation.model import UNet

    history = quiet(max_epochs=3, seed=0).fit(UNet(), datamodule=ClutterData(pictures=400))
    assert history[-1]["val_iou"] > 0.5


def test_S0_27_any_loader_is_evaluated_on_demand(quiet):
    task, trainer, train = Net(), quiet(), loader(18)  # the last batch is shorter
    trainer.fit(task, train)
    [row] = trainer.validate(task, train, verbose=False)
    x, y = train.dataset.tensors
    assert row == {"val_loss": pytest.approx(((task(x) - y) ** 2).mean().item(), rel=1e-6)}
    [row] = trainer.test(task, train, verbose=False)
    assert set(row) == {"test_loss"}


def test_S0_28_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from lightkit.sklearn import LightkitClassifier

    x, y = (part.numpy() for part in classes(60).tensors)
    model = make_pipeline(StandardScaler(), LightkitClassifier(Hidden, epochs=3, lr=0.05))
    search = GridSearchCV(model, {"lightkitclassifier__module__hidden": [2, 8]}, cv=2)
    search.fit(x, y)
    assert search.best_params_["lightkitclassifier__module__hidden"] in (2, 8)
    shares = search.predict_proba(x)
    assert shares.shape == (60, 2)
    assert shares.sum(1) == pytest.approx(1.0, abs=1e-5)


class Hidden(nn.Module):
    def __init__(self, hidden: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, x):
        return self.net(x)
