"""`SupervisedTask`: an ordinary task, whose numbers are those of a loop by hand (S3-04)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk
from lightkit.errors import ConfigError, DataError, UsageError
from lightkit.testing import assert_resumes_exactly
from tests.gpu.waiting import NoWaiting

X = torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long() + (X[:, 0] > 0.5)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, outputs))


def loader(x=X, y=Y, size: int = 5, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(x, y), size, shuffle=shuffle)


def by_hand(net: nn.Module, epochs: int) -> list[dict[str, float]]:
    """A loop with the numbers that the task logs."""
    optimizer, rows = torch.optim.Adam(net.parameters(), lr=0.01), []
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(epochs):
        loss_sum = right = 0.0
        net.train()
        for x, y in loader(shuffle=True):
            output = net(x)
            loss = F.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(x)
            right += int((output.argmax(1) == y).sum())
        net.eval()
        with torch.no_grad():
            pairs = [(net(x), y) for x, y in loader()]
        losses = [float(F.cross_entropy(output, y)) * len(y) for output, y in pairs]
        output = torch.cat([output for output, _ in pairs])
        rows.append(
            {
                "train_loss": loss_sum / 22,
                "train_accuracy": right / 22,
                "val_loss": sum(losses) / 22,
                "val_accuracy": float((output.argmax(1) == Y).float().mean()),
                "val_f1_score": float(
                    torchmetrics.functional.f1_score(
                        output, Y, task="multiclass", num_classes=3, average="macro"
                    )
                ),
            }
        )
        scheduler.step()
    return rows


@pytest.mark.filterwarnings("ignore:.*positive class|.*No positive")
def test_S3_04_numbers_and_weights_are_those_of_a_loop_by_hand(quiet):
    net = network()
    own = copy.deepcopy(net)
    torch.manual_seed(3)
    wanted = by_hand(own, 2)
    task = lk.SupervisedTask(
        net,
        loss="cross_entropy",
        optimizer="adam",
        lr=0.01,
        metrics=["accuracy", "f1_score"],
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    torch.manual_seed(3)
    trainer = quiet(max_epochs=2, fused=False, num_sanity_val_steps=0)
    history = trainer.fit(task, loader(shuffle=True), loader())
    for mine, other in zip(net.parameters(), own.parameters(), strict=True):
        assert torch.equal(mine, other)
    for row, numbers in zip(history, wanted, strict=True):
        assert numbers == pytest.approx({name: row[name] for name in numbers}, rel=1e-6)
    assert set(history.names()) == {*wanted[0], "train_f1_score"}


def test_a_run_resumes_exactly_in_the_middle_of_its_metrics():
    def task():
        return lk.SupervisedTask(
            network(), loss="cross_entropy", lr=0.01, metrics=["accuracy", "auroc"]
        )

    assert_resumes_exactly(task, lambda: loader(shuffle=True), lambda: loader(X + 1))


def test_a_compiled_step_gives_the_same_numbers(quiet):
    torch._dynamo.reset()
    found = []
    for how in (False, {"backend": "eager"}):
        task = lk.SupervisedTask(network(), loss="cross_entropy", metrics="accuracy")
        torch.manual_seed(3)
        history = quiet(max_epochs=2, fused=False, compile=how).fit(task, loader(), loader())
        found.append([{**row, "time": 0} for row in history])
    assert found[0] == found[1]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("loss", "target", "metric", "wanted"),
    [
        (
            "bce_with_logits",
            (Y > 0).long(),
            "accuracy",
            lambda out, y: ((out[:, 0] > 0) == y).float().mean(),
        ),
        (
            "bce_with_logits",
            (Y > 0).long(),
            "auroc",
            lambda out, y: torchmetrics.functional.auroc(out[:, 0].sigmoid(), y, task="binary"),
        ),
        ("mse", X[:, 0], "mae", lambda out, y: (out[:, 0] - y).abs().mean()),
        ("mse", X[:, 0], "r2_score", lambda out, y: torchmetrics.functional.r2_score(out[:, 0], y)),
        (nn.L1Loss(), X[:, 0], torchmetrics.PearsonCorrCoef(), None),
    ],
)
def test_one_output_per_sample_and_targets_of_one_dimension(quiet, loss, target, metric, wanted):
    net = network(1).eval()
    task = lk.SupervisedTask(net, loss=loss, metrics=metric)
    row = quiet().validate(task, loader(X, target), verbose=False)[0]
    name = next(name for name in row if name != "val_loss")
    wanted = wanted or (lambda out, y: torchmetrics.functional.pearson_corrcoef(out[:, 0], y))
    assert row[name] == pytest.approx(float(wanted(net(X).detach(), target)), rel=1e-5)


def test_labels_and_tokens_that_are_ignored(quiet):
    many = torch.randint(2, (22, 3), generator=torch.Generator().manual_seed(2)).float()
    net = network(3).eval()
    task = lk.SupervisedTask(net, loss="bce_with_logits", metrics="accuracy")
    row = quiet().validate(task, loader(X, many), verbose=False)[0]
    assert row["val_accuracy"] == pytest.approx(float(((net(X) > 0) == many).float().mean()))
    tokens = torch.randint(3, (22, 5), generator=torch.Generator().manual_seed(2))
    tokens[:, 2:] = -100
    each = nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (3, 5)))
    task = lk.SupervisedTask(each, loss="cross_entropy", metrics="accuracy")
    row = quiet().validate(task, loader(X, tokens), verbose=False)[0]
    right = (each(X).argmax(1) == tokens)[:, :2].float().mean()
    assert row["val_accuracy"] == pytest.approx(float(right))


def test_S0_27_S1_01_class_numbers_that_are_ignored_and_weights_count_exactly(quiet):
    some = Y.clone()
    some[::3] = -100
    some[5:10] = -100  # a whole batch, whose loss is nan
    weights = torch.tensor([1.0, 2.0, 5.0])
    net, kept = network().eval(), some != -100
    names = ["accuracy", "f1_score", "auroc"]
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weights, label_smoothing=0.1)):
        task = lk.SupervisedTask(net, loss=loss, metrics=names)
        row = quiet().validate(task, loader(y=some), verbose=False)[0]
        output = net(X).detach()
        assert row["val_loss"] == pytest.approx(float(loss(output, some)), rel=1e-6)
        right = (output.argmax(1) == some)[kept].float().mean()
        assert row["val_accuracy"] == pytest.approx(float(right))
        for name in names[1:]:
            wanted = getattr(torchmetrics.functional, name)(
                output[kept], some[kept], task="multiclass", num_classes=3, average="macro"
            )
            assert row[f"val_{name}"] == pytest.approx(float(wanted)), name


def test_a_loss_without_a_mean_is_told_in_an_evaluation(quiet):
    task = lk.SupervisedTask(network(), loss=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(UsageError, match=r"shape \(5,\).*reduction='mean'"):
        quiet().validate(task, loader(), verbose=False)


def test_a_step_of_a_subclass_may_return_anything(quiet):
    class Own(lk.SupervisedTask):
        def step(self, batch):
            return super().step(batch)["loss"]

    row = quiet().validate(Own(network(), loss="cross_entropy"), loader(), verbose=False)[0]
    assert set(row) == {"val_loss"}


def test_a_last_batch_of_one_sample_that_the_network_squeezes(quiet):
    class Squeezed(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze()

    net, target = Squeezed(4, 1), (Y > 0).long()
    task = lk.SupervisedTask(net, loss="bce_with_logits", metrics="accuracy")
    row = quiet().validate(task, loader(y=target, size=7), verbose=False)[0]
    assert row["val_accuracy"] == pytest.approx(float(((net(X) > 0) == target).float().mean()))


def test_S1_08_metrics_of_the_users_join_those_with_names(quiet):
    class Count(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

        def update(self, output, target):
            self.seen += len(target)

        def compute(self):
            return self.seen.float()

    def share(output, target):
        return (target == 0).float().mean()

    given = {"acc": "accuracy", "n": Count(), "kind": Count, "share": share, "loss": "loss"}
    task = lk.SupervisedTask(network(), loss="cross_entropy", metrics=given)
    history = quiet(max_epochs=2).fit(task, loader(), loader(X + 1, Y))
    assert task.measures == ["acc", "n", "kind", "share"]
    for row in history:
        assert row["train_n"] == row["val_n"] == row["val_kind"] == 22  # each has its own object
        assert row["train_share"] == pytest.approx(float((Y == 0).float().mean()))
    names = lk.SupervisedTask(network(), metrics=[share, Count(), "auroc"]).measures
    assert set(names) == {"share", "count", "auroc"}
    several = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
    assert lk.SupervisedTask(network(), metrics=several).measures == ["MeanSquaredError"]


def test_inputs_may_be_several_and_a_subclass_prepares_others(quiet):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    class Named(lk.SupervisedTask):
        def prepare_batch(self, batch):
            return {"a": batch["x"], "b": batch["x"]}, batch["label"]

    pairs = [((x, x), y) for x, y in zip(X, Y, strict=True)]
    dicts = [{"x": x, "label": y} for x, y in zip(X, Y, strict=True)]
    found = []
    for kind, data in ((lk.SupervisedTask, pairs), (Named, dicts)):
        torch.manual_seed(1)
        task = kind(Sum(), loss="cross_entropy", metrics="accuracy")
        found.append(quiet(fused=False).fit(task, DataLoader(data, 5), DataLoader(data, 5)))
    assert [{**row, "time": 0} for row in found[0]] == [{**row, "time": 0} for row in found[1]]
    task = lk.SupervisedTask(network(), loss="cross_entropy")
    with pytest.raises(DataError, match=r"must be a pair .* dict of 2: \['x', 'label'\]"):
        quiet().fit(task, DataLoader(dicts, 5))
    with pytest.raises(DataError, match="gave a list of 3"):
        quiet().fit(task, DataLoader(TensorDataset(X, X, Y), 5))


@pytest.mark.parametrize(
    ("x", "y", "loss", "message"),
    [
        (X, Y.float(), "cross_entropy", r"holds floats .*y.astype\('int64'\).*loss='mse'"),
        (X, Y + 1, "cross_entropy", "numbered from 0 to 2, but: Target 3 is out of bounds"),
        (X, torch.stack([Y, Y], 1), "cross_entropy", r"takes outputs \(N, classes\)"),
        (X, F.one_hot(Y), "cross_entropy", r"one-hot: y.argmax\(1\)"),
        (X, Y, "mse", r"shape \(5, 3\) and the target \(5,\).*loss='cross_entropy'"),
        (X, torch.zeros(22, 3), "bce", "Give the network a sigmoid .*bce_with_logits"),
        (X.long(), Y, "cross_entropy", r"inputs \(int64 .* weights are float32.*astype"),
        (X.double(), Y, "cross_entropy", r"inputs \(float64 .* weights are float32"),
        (X[:, :3], Y, "cross_entropy", r"cannot take the inputs \(float32 of shape \(5, 3\)\)"),
    ],
)
def test_data_that_do_not_fit_say_what_to_write(quiet, x, y, loss, message):
    with pytest.raises(DataError, match=message):
        quiet().fit(lk.SupervisedTask(network(), loss=loss), loader(x, y))


@pytest.mark.parametrize(
    ("metrics", "loss", "message"),
    [
        ("accuracy", "mse", "'accuracy' is one of classes.*a loss of torch.*torchmetrics.Accuracy"),
        ("mae", "cross_entropy", r"'mae' .*cannot compare .*\(5, 3\).*\(5,\)"),
    ],
)
def test_metrics_that_do_not_fit(quiet, metrics, loss, message):
    target = Y if loss == "cross_entropy" else torch.zeros(22, 3)
    with pytest.raises(UsageError, match=message):
        quiet().fit(lk.SupervisedTask(network(), loss=loss, metrics=metrics), loader(X, target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": [3]}, "metrics: 3 is none"),
        ({"metrics": lambda y_true, y_pred: 0.0}, "first parameter of <lambda> is 'y_true'"),
        ({"metrics": ["accuracy", "accuracy"]}, "two of them are called 'accuracy'"),
        ({"scheduler": "cosine"}, "give a function of the optimizer"),
        ({"net": nn.Linear}, r"Pass an object of it: Linear"),
        ({"net": "resnet"}, "is no torch.nn.Module"),
        ({"metrics": {"loss": "mae"}}, "the loss is called 'loss'"),
        ({"metrics": [torchmetrics.MetricCollection([])]}, "give a MetricCollection alone"),
    ],
)
def test_arguments_that_cannot_work(arguments, message):
    net = arguments.pop("net", nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=message):
        lk.SupervisedTask(net, loss="mse", **arguments)


def test_without_a_loss_it_only_evaluates(quiet):
    task = lk.SupervisedTask(network(), metrics="accuracy")
    assert set(quiet().test(task, loader(), verbose=False)[0]) == {"test_accuracy"}
    with pytest.raises(UsageError, match="can be evaluated only"):
        quiet().fit(task, loader())


def test_weights_are_those_of_the_network(tmp_path, quiet):
    task = lk.SupervisedTask(network(), loss="cross_entropy", metrics="accuracy")
    trainer = quiet(enable_checkpointing=True)
    trainer.fit(task, loader(), loader(X + 1, Y))
    assert set(task.state_dict()) == {f"net.{name}" for name in task.net.state_dict()}
    path = trainer.checkpoint_callback.best_model_path
    again = lk.SupervisedTask.load_from_checkpoint(path, net=network())
    assert torch.equal(again(X), task.eval()(X)) is False  # in train mode there is dropout
    assert torch.equal(again.eval()(X), task(X))
    assert again.measures == ["accuracy"]


def test_it_can_be_pickled():
    task = lk.SupervisedTask(network(), loss="mse", optimizer="sgd", lr=1, metrics=["f1", "mse"])
    again = pickle.loads(pickle.dumps(task))
    assert again.measures == ["f1", "mse"]
    assert torch.equal(again.eval()(X), task.eval()(X))


@pytest.mark.parametrize(
    ("device", "loss", "names"),
    [
        ("cpu", "cross_entropy", ["accuracy", "f1_score"]),
        ("cpu", "mse", ["mae", "r2_score"]),
        # On the CPU, where nothing waits, torchmetrics looks at the values of these.
        pytest.param("cuda", "cross_entropy", ["accuracy", "auroc"], marks=pytest.mark.gpu),
        pytest.param("cuda", "bce_with_logits", ["accuracy", "auroc"], marks=pytest.mark.gpu),
    ],
)
def test_metrics_do_not_wait_for_the_device(quiet, device, loss, names):
    target = {"cross_entropy": Y, "mse": X[:, 0]}.get(loss, (Y > 0).long())
    net = network(3 if loss == "cross_entropy" else 1)
    data = DataLoader(TensorDataset(X, target), 2, pin_memory=device == "cuda")
    guard = NoWaiting(device, 2, len(data) - 2)
    trainer = quiet(callbacks=[guard], accelerator=device, log_every_n_steps=100)
    trainer.fit(lk.SupervisedTask(net, loss=loss, metrics=names), data)
    assert guard.batches == len(data) - 3
