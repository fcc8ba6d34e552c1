"""`lk.fit`, `lk.evaluate` and `lk.predict`: one line for a plain network."""

from __future__ import annotations

import logging
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

import lightkit as lk
from lightkit import functional
from lightkit.errors import ConfigError, DataError, OptimizerError, UsageError
from tests.small import Net

X = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
Y = (X.sum(1) > 0).astype("int64")
TENSORS = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def fitted(train, **arguments):
    """The weights and the history of a fit from the same random states."""
    net = network()
    torch.manual_seed(2)
    arguments = {"loss": "cross_entropy", "epochs": 2, "fused": False, **QUIET, **arguments}
    history = lk.fit(net, train, **arguments)
    return nn.utils.parameters_to_vector(net.parameters()).detach(), history


def by_hand() -> torch.Tensor:
    net = network()
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        for x, y in DataLoader(TENSORS, 32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize(
    "train",
    [
        TENSORS,
        (X, Y),
        [X.astype("float64"), list(map(int, Y))],
        tuple(TENSORS.tensors),
        DataLoader(TENSORS, 32, shuffle=True),
    ],
    ids=["data set", "arrays", "float64 and a list", "tensors", "loader"],
)
def test_S0_07_S0_14_S0_15_one_line_trains_as_a_loop_by_hand(train):
    weights, history = fitted(train)
    assert torch.equal(weights, by_hand())
    assert [row["step"] for row in history] == [2, 4]


def test_S4_05_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcd"))
    assert torch.equal(fitted((frame, pandas.Series(Y)))[0], by_hand())


def test_S0_16_S0_20_a_history_of_plain_numbers():
    _, history = fitted((X, Y), val=(X[:20], Y[:20]), metrics=["accuracy"])
    names = ["train_loss", "val_loss", "train_accuracy", "val_accuracy"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(type(row[name]) is float for row in history for name in names)
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_S0_25_a_part_of_the_data_and_another_batch_size():
    _, history = fitted((X, Y), limit_train_batches=3, batch_size=5)
    assert [row["step"] for row in history] == [3, 6]


def test_S2_10_callbacks_and_schedules_control_it():
    stop = lk.callbacks.EarlyStopping(monitor="val_loss", patience=1)
    seen = []
    _, history = fitted(
        (X, Y),
        val=(X, Y),
        epochs=9,
        optimizer="sgd",
        lr=1e-12,  # nothing becomes better
        scheduler=lambda optimizer: (
            seen.append(optimizer) or torch.optim.lr_scheduler.StepLR(optimizer, 1)
        ),
        callbacks=[stop],
    )
    assert len(history) < 4
    assert [type(optimizer) for optimizer in seen] == [torch.optim.SGD]
    assert seen[0].param_groups[0]["lr"] < 1e-12


def test_a_plateau_schedule_is_told_its_metric_in_place():
    def lowered(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    with pytest.raises(
        OptimizerError, match=r"'monitor': 'val_loss'.* from the function scheduler="
    ):
        lk.fit(network(), (X, Y), loss="cross_entropy", epochs=1, scheduler=lowered, **QUIET)


def test_a_schedule_that_lasts_as_long_as_the_fit():
    class Rates(lk.Callback):
        seen: list[float] = []

        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitted((X, Y), scheduler=lk.one_cycle, callbacks=Rates())
    assert Rates.seen == pytest.approx([4e-5, 8.117e-4, 2.831e-4, 4e-9], rel=1e-3)


def test_the_order_of_validation_and_of_iterable_data_sets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TENSORS)

    _, history = fitted(Stream(), val={"a": (X, Y), "b": TENSORS}, epochs=1)
    assert history[0]["a/val_loss"] == history[0]["b/val_loss"]


def test_a_task_of_the_users_brings_its_own():
    x = torch.from_numpy(X)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    history = lk.fit(Net(), data, data, epochs=1, **QUIET)
    assert set(history.names()) == {"train_loss", "val_loss"}
    assert set(lk.evaluate(Net(), data, **QUIET)) == {"loss"}
    with pytest.raises(ConfigError, match=r"loss= is for a plain network, but Net"):
        lk.fit(Net(), data, loss="mse")
    with pytest.raises(ConfigError, match=r"metrics= is for a plain network"):
        lk.evaluate(Net(), data, metrics=["accuracy"])


def test_a_run_goes_on_where_it_ended(tmp_path):
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    fitted((X, Y), metrics="accuracy", **options)
    weights, history = fitted((X, Y), metrics="accuracy", epochs=3, ckpt_path="auto", **options)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert torch.equal(weights, fitted((X, Y), epochs=3)[0])


# --- evaluate and predict ------------------------------------------------------------------------


def test_S0_27_S1_01_evaluate_gives_exact_means():
    net = network()
    found = lk.evaluate(net, (X, Y), loss="cross_entropy", metrics=["accuracy"], **QUIET)
    with torch.no_grad():
        output, target = net(torch.from_numpy(X)), torch.from_numpy(Y)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(output, target)), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float((output.argmax(1) == target).float().mean()))
    alone = lk.evaluate(net, DataLoader(TENSORS, 7), metrics="accuracy", **QUIET)
    assert alone == {"accuracy": found["accuracy"]}
    assert net.training


@pytest.mark.parametrize(
    "data",
    [X, (X, Y), torch.from_numpy(X), TENSORS, DataLoader(TENSORS, 7), X.tolist()],
    ids=["array", "pair", "tensor", "data set", "loader", "list"],
)
def test_S1_01_predict_gives_all_outputs_in_order(data):
    net = nn.Sequential(network(), nn.Dropout(0.9))
    found = lk.predict(net, data, **QUIET)
    assert torch.allclose(found, net[0](torch.from_numpy(X)).detach(), atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("kind", [DataLoader, lk.TensorLoader])
def test_outputs_in_an_order_that_nobody_knows_are_refused(kind):
    data = TENSORS if kind is DataLoader else TENSORS.tensors[0]
    with pytest.raises(DataError, match="The loader shuffles.*shuffle=False"):
        lk.predict(network(), kind(data, batch_size=7, shuffle=True), **QUIET)
    with pytest.raises(DataError, match="takes one data set"):
        lk.predict(network(), {"a": X, "b": X}, **QUIET)


def test_outputs_that_cannot_be_joined():
    squeezed = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.Identity())
    squeezed.forward = lambda x: squeezed[0](x).squeeze()
    with pytest.raises(DataError, match="a single number for a batch.*squeeze.1."):
        lk.predict(squeezed, X, batch_size=7, **QUIET)
    with pytest.raises(DataError, match="LSTM returned a tuple.*Trainer"):
        lk.predict(nn.LSTM(4, 2), np.zeros((8, 3, 4), "float32"), **QUIET)


# --- the picture ---------------------------------------------------------------------------------


def test_the_curves_are_drawn_in_the_folder_of_the_run(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "get_backend", lambda: "agg")
    options = {**QUIET, "logger": True, "default_root_dir": tmp_path}
    open_before = pyplot.get_fignums()
    _, history = fitted((X, Y), plot=True, **options)
    (picture,) = tmp_path.rglob("curves.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.parent == history.folder
    assert pyplot.get_fignums() == open_before  # nothing waits for pyplot.show()


def test_a_notebook_shows_the_curves(monkeypatch):
    shown = []
    pytest.importorskip("matplotlib")
    notebook = types.ModuleType("IPython.display")
    notebook.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr(functional.screen, "in_notebook", lambda: True)
    fitted((X, Y), plot=True)
    assert [type(figure).__name__ for figure in shown] == ["Figure"]


def test_a_picture_that_cannot_be_drawn_is_told_before_the_training(monkeypatch):
    monkeypatch.setattr(functional, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plot=True needs matplotlib: pip install 'lightkit"):
        fitted((X, Y), plot=True, epochs=10**6)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_split": 0.2}, "Write val=, with data that you split: .*random_split"),
        ({"validation_data": (X, Y)}, r"Write val=\(X, y\)"),
        ({"verbose": 0}, "Write enable_progress_bar=False"),
        ({"max_epochs": 3}, "Write epochs"),
        ({"epoch": 3}, "Did you mean 'epochs'"),
        ({"optimiser": "sgd"}, "Did you mean 'optimizer'"),
        ({"gradient_clip": 1.0}, "Did you mean 'gradient_clip_val'"),
        ({"loss": None}, "fit needs a loss"),
        ({"loss": "cross_entropi"}, "Did you mean 'cross_entropy'"),
        ({"optimizer": "adamww"}, "Did you mean 'adamw'"),
        ({"metrics": ["acuracy"]}, "Did you mean 'accuracy'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_arguments_of_other_libraries_and_misspelled_ones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        fitted((X, Y), **arguments)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (X, Y, r"an array without targets. Write fit\(net, \(X, y\)"),
        ((X, Y), 0.2, "never split by themselves.*train_test_split"),
        ((X, Y.astype(float)), None, "holds floats"),
        ((X, np.where(Y, "cat", "dog")), None, "y is not numeric.*pandas.factorize"),
        ((X, Y[:-1]), None, "X has 50 samples and y has 49"),
        ((X, Y, Y), None, r"train is a tuple of 3, but arrays are given as \(X, y\)"),
        ([(X, Y)], None, "inputs .of type ndarray.*batches hold tensors.*DataLoader"),
        ([(X[0], 1)] * 8, None, "inputs .of type ndarray.*batches hold tensors.*DataLoader"),
        ([(TENSORS[0][0], 1)] * 8, None, "make batches: DataLoader"),
    ],
)
def test_data_that_cannot_be_used(train, val, message):
    with pytest.raises(UsageError, match=message):
        fitted(train, val=val)


def test_a_generator_is_used_up_after_one_epoch():
    def batches():
        for start in range(0, 50, 10):
            yield TENSORS[start : start + 10]

    with pytest.raises(DataError, match="an iterator .generator. and is used up"):
        fitted(batches())


def test_a_batch_size_beside_loaders():
    with pytest.raises(ConfigError, match="the loaders that were given make the batches"):
        fitted(DataLoader(TENSORS, 8), batch_size=16)


def test_evaluate_needs_something_to_compute():
    for arguments, message in (
        ({}, "needs loss= or metrics="),
        ({"metrics": ["loss"]}, "metrics has 'loss', but there is none"),
        ({"metric": "accuracy"}, "Did you mean 'metrics'"),
    ):
        with pytest.raises(ConfigError, match=message):
            lk.evaluate(network(), (X, Y), **arguments)
    with pytest.raises(DataError, match=r"Write evaluate\(net, \(X, y\)"):
        lk.evaluate(network(), X, metrics="accuracy")


def test_what_is_said_of_arrays_is_seen(monkeypatch, capsys):
    from lightkit.data import arrays

    monkeypatch.setattr(arrays, "_said", False)
    logging.getLogger("lightkit").propagate = False
    fitted((X.astype("float64"), Y))
    assert "X is float64 and becomes float32" in capsys.readouterr().out


def test_a_private_split_is_never_made():
    parts = random_split(TENSORS, [40, 10])
    _, history = fitted(parts[0], val=parts[1], batch_size=10)
    assert [row["step"] for row in history] == [4, 8]
    assert len(parts[0]) == 40


def test_evaluate_over_several_data_sets_names_each():
    found = lk.evaluate(
        network(),
        {"old": (X[:20], Y[:20]), "new": (X[20:], Y[20:])},
        loss="cross_entropy",
        metrics=["accuracy", "f1"],
        **QUIET,
    )
    alone = lk.evaluate(network(), (X[20:], Y[20:]), loss="cross_entropy", metrics="f1", **QUIET)
    assert {name: found[f"new/{name}"] for name in alone} == pytest.approx(alone)
    assert set(found) == {f"{d}/{n}" for d in ("old", "new") for n in ("loss", "accuracy", "f1")}


def test_a_second_fit_goes_on_with_the_weights_and_a_new_optimizer():
    net, sums = network(), []
    for _ in range(2):
        before = lk.evaluate(net, (X, Y), loss="cross_entropy", **QUIET)["loss"]
        history = lk.fit(net, (X, Y), loss="cross_entropy", lr=0.01, epochs=1, **QUIET)
        sums.append(before)
        assert history["epoch"] == [1]
        assert history[0]["step"] == 2
    assert sums[1] < sums[0]


def test_metrics_alone_where_the_loss_would_say_how_they_are_meant():
    found = lk.evaluate(network(1), (X, X.sum(1)), metrics=["mae"], **QUIET)
    with torch.no_grad():
        errors = network(1)(torch.from_numpy(X))[:, 0] - torch.from_numpy(X).sum(1)
    assert found["mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-6)
    with pytest.raises(UsageError, match="not known without a loss of torch"):
        lk.evaluate(network(1), (X, Y), metrics=["accuracy"], **QUIET)
    assert (
        lk.evaluate(network(1), (X, Y), loss="bce_with_logits", metrics="acc", **QUIET)["acc"] > 0
    )
