"""The estimators, against scikit-learn's own checks and against the loop by hand."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightkit as lk
from lightkit.elsewhere import ESTIMATOR
from lightkit.errors import ConfigError, NonFiniteError, UsageError

pytest.importorskip("sklearn", minversion="1.6")

import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lightkit.sklearn import LightkitClassifier, LightkitRegressor


@pytest.fixture(autouse=True)
def nothing_written(tmp_path, monkeypatch):
    """Works in an empty folder that stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert [*tmp_path.iterdir()] == []


def flowers(samples=120):
    X, y = make_classification(samples, 6, n_informative=4, n_classes=3, random_state=0)
    return X, np.array(["iris", "rose", "tulip"])[y]


class Net(nn.Module):
    """Tells the sizes that it was given."""

    def __init__(self, in_features, out_features, hidden=8, dropout=0.0):
        super().__init__()
        self.sizes = in_features, out_features, hidden
        self.hidden = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.out = nn.Linear(hidden, out_features)

    def forward(self, x):
        return self.out(self.hidden(x))


# --- scikit-learn's own words --------------------------------------------------------------------


# Without an expected failure. One check skips itself unless SCIPY_ARRAY_API is set when scipy is
# imported; it passes then.
@parametrize_with_checks([LightkitClassifier(), LightkitRegressor()])
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


# --- the same numbers as by hand -----------------------------------------------------------------


def test_a_fit_is_that_of_a_hand_written_loop():
    X, y = flowers()
    settings = {"epochs": 2, "lr": 0.01, "optimizer__weight_decay": 0.1, "trainer__fused": False}
    net = LightkitClassifier(Net, module__dropout=0.5, random_state=3, **settings).fit(X, y)

    torch.manual_seed(np.random.RandomState(3).randint(2**31 - 1))
    by_hand = Net(6, 3, dropout=0.5)
    samples = torch.from_numpy(X).float(), torch.from_numpy(np.unique(y, return_inverse=True)[1])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*samples), batch_size=32, shuffle=True
    )
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        for x, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(by_hand(x), target).backward()
            optimizer.step()

    for ours, theirs in zip(net.module_.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    expected = by_hand.eval()(samples[0]).softmax(1).detach().numpy()
    np.testing.assert_allclose(net.predict_proba(X), expected, rtol=1e-5)
    assert (net.predict(X) == net.classes_[expected.argmax(1)]).all()
    assert len(net.history_["train_loss"]) == 2


def test_partial_fits_go_on_with_weights_optimizer_and_random_states():
    X, y = flowers()
    net = LightkitClassifier(Net, module__dropout=0.5, epochs=3, random_state=0)
    whole, parts = clone(net).fit(X, y), clone(net)
    for _ in range(3):  # of one epoch each
        parts = pickle.loads(pickle.dumps(parts.partial_fit(X, y)))
    for one, other in zip(whole.module_.parameters(), parts.module_.parameters(), strict=True):
        assert torch.equal(one, other)
    assert parts.history_["epoch"] == [1, 2, 3]
    assert parts.history_["step"] == whole.history_["step"] == [4, 8, 12]
    assert parts.history_["train_loss"] == whole.history_["train_loss"]


def test_partial_fit_takes_the_settings_of_today():
    X, y = flowers()
    net = LightkitClassifier(random_state=0).partial_fit(X, y)
    before = copy.deepcopy(net.module_)
    net.set_params(lr=1e-12).partial_fit(X, y)
    for one, other in zip(net.module_.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    net.set_params(optimizer="sgd", lr=0.1).partial_fit(X, y)  # AdamW's state is none of SGD's
    assert not torch.equal(net.module_[1].weight, before[1].weight)


def test_equal_seeds_give_equal_models_and_global_random_states_stay():
    X, y = flowers()
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = (LightkitClassifier(random_state=0, epochs=1).fit(X, y) for _ in range(2))
    third = LightkitClassifier(random_state=1, epochs=1).fit(X, y)
    assert (one.predict_proba(X) == other.predict_proba(X)).all()
    assert (one.predict_proba(X) != third.predict_proba(X)).any()
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()


def test_without_a_seed_numpy_decides():
    X, y = flowers()
    np.random.seed(0)
    first, second = (LightkitClassifier(epochs=1).fit(X, y) for _ in range(2))
    np.random.seed(0)
    again = LightkitClassifier(epochs=1).fit(X, y)
    assert (first.predict_proba(X) == again.predict_proba(X)).all()
    assert (first.predict_proba(X) != second.predict_proba(X)).any()


# --- S4-05, S0-28: arrays in, predictions out, at home in scikit-learn ------------------------------


def test_s4_05_frames_with_names_of_classes():
    pandas = pytest.importorskip("pandas")
    X, y = flowers()
    frame = pandas.DataFrame(X, columns=[*"abcdef"])
    net = LightkitClassifier(random_state=0, lr=0.01).fit(frame, pandas.Series(y))
    assert [*net.feature_names_in_] == [*"abcdef"]
    assert [*net.classes_] == ["iris", "rose", "tulip"]
    proba = net.predict_proba(frame)
    assert proba.shape == (120, 3)
    assert proba.dtype == np.float32
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-6)
    assert set(net.predict(frame)) <= {"iris", "rose", "tulip"}
    assert net.score(frame, y) > 0.8


def test_s0_28_grid_search_in_a_pipeline_over_parts():
    X, y = flowers()
    pipeline = make_pipeline(StandardScaler(), LightkitClassifier(Net, epochs=3, random_state=0))
    grid = {
        "lightkitclassifier__module__hidden": [2, 16],
        "lightkitclassifier__optimizer__weight_decay": [0.0, 0.1],
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["mean_test_score"]) == 4
    best = search.best_estimator_[-1]
    assert best.module_.sizes == (6, 3, search.best_params_["lightkitclassifier__module__hidden"])
    assert search.score(X, y) > 0.5


def test_grid_search_in_processes():
    X, y = flowers()
    net = LightkitClassifier(epochs=2, random_state=0, trainer__accelerator="cpu")
    grid = {"module__hidden": [4, 8]}
    alone, together = (
        GridSearchCV(net, grid, cv=2, error_score="raise", n_jobs=jobs).fit(X, y) for jobs in (1, 2)
    )
    scores = [search.cv_results_["mean_test_score"] for search in (alone, together)]
    np.testing.assert_allclose(*scores, atol=0.02)  # threads may sum in another order


def test_cross_validation_of_a_regressor():
    X, y = make_regression(120, 5, noise=1.0, random_state=0)
    net = LightkitRegressor(nn.Linear, optimizer="sgd", lr=0.05, random_state=0)
    scores = cross_val_score(net, StandardScaler().fit_transform(X), y / y.std(), cv=3)
    assert scores.min() > 0.95


def test_predictions_have_the_shape_and_type_of_the_targets():
    X, y = make_regression(40, 5, n_targets=2, random_state=0)
    net = LightkitRegressor(epochs=1).fit(X, y)
    assert net.module_[-1].out_features == 2
    assert net.predict(X).shape == (40, 2)
    for target, kind in ((y[:, 0], "float64"), (y[:, 0].astype("float32"), "float32")):
        found = net.fit(X, target).predict(X)
        assert (found.shape, found.dtype) == ((40,), kind)
    assert net.fit(X, y[:, 0].astype(int)).predict(X).dtype == np.float32


def test_clones_and_pickles():
    X, y = flowers()
    net = LightkitClassifier(Net(6, 3), epochs=1, optimizer__betas=(0.8, 0.9), random_state=0)
    given = copy.deepcopy(net.module.state_dict())
    net.fit(X, y)
    assert net.get_params()["optimizer__betas"] == (0.8, 0.9)
    copied = clone(net)
    assert copied.get_params().keys() == net.get_params().keys()
    with pytest.raises(NotFittedError):
        copied.predict(X)
    for one, other in zip(given.values(), net.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)  # a copy of it was trained
    loaded = pickle.loads(pickle.dumps(net))
    assert (loaded.predict_proba(X) == net.predict_proba(X)).all()
    assert "optimizer__betas=(0.8, 0.9)" in repr(net)
    assert "optimizer__betas" in net._repr_html_()


# --- modules -------------------------------------------------------------------------------------


def test_a_factory_gets_the_sizes_that_it_has_names_for():
    X, y = flowers()
    assert LightkitClassifier(Net, epochs=1).fit(X, y).module_.sizes == (6, 3, 8)
    own = LightkitClassifier(Net, module__in_features=6, module__hidden=5, epochs=1).fit(X, y)
    assert own.module_.sizes == (6, 3, 5)
    fixed = LightkitClassifier(lambda: nn.Sequential(nn.Linear(6, 3)), epochs=1).fit(X, y)
    assert len(fixed.module_) == 1


def test_numbers_of_numpy_as_a_search_draws_them():
    X, y = flowers()
    drawn = {"batch_size": np.int64(60), "epochs": np.int64(2), "module__hidden": np.int64(4)}
    net = LightkitClassifier(Net, lr=np.float64(0.01), **drawn).fit(X, y)
    assert net.history_["step"] == [2, 4]


def test_images_and_indices():
    images, y = load_digits(n_class=3, return_X_y=True)
    images = images[:60].reshape(-1, 1, 8, 8) / 16

    def convolutions(out_features):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, out_features)
        )

    net = LightkitClassifier(convolutions, epochs=10, lr=0.01, random_state=0).fit(images, y[:60])
    assert net.score(images, y[:60]) > 0.9
    assert LightkitClassifier(epochs=1).fit(images, y[:60]).module_[1].in_features == 64

    words = np.array([[i % 7, i % 5] for i in range(40)])
    bag = lambda out_features: nn.EmbeddingBag(7, out_features)  # noqa: E731
    net = LightkitClassifier(bag, dtype="int64", epochs=1).fit(words, words[:, 1] % 2)
    assert net.predict_proba(words).shape == (40, 2)


# --- stopping, callbacks, what is shown --------------------------------------------------------------


def test_early_stopping_keeps_samples_apart_and_takes_the_best_weights():
    X, y = flowers()
    settings = {"early_stopping": True, "validation_fraction": 0.25, "n_iter_no_change": 2}
    net = LightkitClassifier(lr=0.1, epochs=100, random_state=0, **settings).fit(X, y)
    losses = net.history_["val_loss"]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 100
    again = net.set_params(epochs=best + 1, early_stopping=False).fit(X, y)
    assert again.history_["val_loss"] == losses[: best + 1]  # of the same samples
    assert [row["step"] for row in again.history_] == [
        3 * n for n in range(1, best + 2)
    ]  # 90 of 120
    stopped = LightkitClassifier(lr=0.1, epochs=100, random_state=0, **settings).fit(X, y)
    assert (stopped.predict_proba(X) == again.predict_proba(X)).all()


def test_callbacks_metrics_and_options_of_the_trainer():
    seen = []
    epochs = lk.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, task: seen.append(trainer)
    )
    X, y = flowers()
    net = LightkitClassifier(
        callbacks=epochs, metrics=["accuracy"], epochs=5, lr=0.01, trainer__max_steps=8
    ).fit(X, y)
    assert len(seen) == 2
    assert seen[0].loggers == []
    assert net.history_["train_accuracy"][1] > 0.3
    rates = []
    scheduled = LightkitClassifier(
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        callbacks=[
            lk.callbacks.LambdaCallback(
                on_train_epoch_end=lambda trainer, task: rates.append(
                    trainer.optimizers[0].param_groups[0]["lr"]
                )
            )
        ],
        lr=0.5,
        epochs=3,
    )
    scheduled.fit(X, y)
    assert rates == [0.5, 0.25, 0.125]


def test_it_is_quiet_unless_asked(capsys):
    X, y = flowers()
    log = logging.getLogger("lightkit")
    LightkitClassifier(epochs=1).fit(X, y).predict(X)
    assert capsys.readouterr() == ("", "")
    level = log.level
    LightkitClassifier(epochs=1, verbose=True).fit(X, y)
    assert "1 epoch" in capsys.readouterr().out
    assert log.level == level


# --- mistakes ------------------------------------------------------------------------------------


def test_a_loss_that_learns_stays_as_it_was_given():
    class Scaled(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output, target):
            return super().forward(output * self.scale, target)

    X, y = flowers()
    net = LightkitClassifier(loss=Scaled(), lr=0.1, epochs=2, random_state=0)
    first, again = (net.fit(X, y).predict_proba(X) for _ in range(2))
    assert torch.equal(net.loss.scale, torch.ones(()))
    assert np.array_equal(first, again)


def test_wrong_names_name_the_nearest():
    X, y = flowers()
    with pytest.raises(ConfigError, match=r"'batchsize'.* Did you mean 'batch_size'"):
        LightkitClassifier(batchsize=3).fit(X, y)
    with pytest.raises(ConfigError, match=r"'epoch'.* Did you mean 'epochs'"):
        LightkitClassifier().set_params(epoch=3)
    with pytest.raises(ConfigError, match=r"module__hiden.* Did you mean 'hidden'"):
        LightkitClassifier(module__hiden=3).fit(X, y)
    with pytest.raises(ConfigError, match=r"optimizer__weight_decy.*'weight_decay'"):
        LightkitClassifier(optimizer__weight_decy=3).fit(X, y)
    with pytest.raises(ConfigError, match=r"trainer__precison.*'precision'"):
        LightkitClassifier(trainer__precison=3).fit(X, y)
    for name, instead in ESTIMATOR.items():
        with pytest.raises(ConfigError, match=f"no argument {name!r}. Write {instead}."):
            LightkitClassifier(**{name: None}).fit(X, y)
    with pytest.raises(ConfigError, match=r"Write epochs"):
        LightkitClassifier(trainer__max_epochs=3).fit(X, y)
    with pytest.raises(ConfigError, match=r"trainer__callbacks(?s:.*) write callbacks="):
        LightkitClassifier(trainer__callbacks=[]).fit(X, y)
    with pytest.raises(ConfigError, match="lr and optimizer__lr mean the same"):
        LightkitClassifier(lr=0.1, optimizer__lr=0.2).fit(X, y)
    with pytest.raises(ConfigError, match="optimizer: give a name"):
        LightkitClassifier(Net(6, 3), optimizer=torch.optim.SGD(Net(6, 3).parameters())).fit(X, y)
    with pytest.raises(ConfigError, match=r"module is Net(?s:.*) a class, a function"):
        LightkitClassifier(Net(6, 3), module__hidden=3).fit(X, y)
    with pytest.raises(ConfigError, match=r"module is 5, but allowed is a class"):
        LightkitClassifier(5).fit(X, y)


def test_wrong_sizes_classes_and_losses():
    X, y = flowers()
    wide = LightkitClassifier(Net, module__out_features=5, epochs=1).fit(X, y)
    with pytest.raises(UsageError, match=r"3 classes .*out_features.*, not \(120, 5\)"):
        wide.predict(X)
    net = LightkitClassifier(epochs=1).partial_fit(X, y, classes=["iris", "rose", "tulip"])
    with pytest.raises(UsageError, match=r"\['daisy'\].*classes="):
        net.partial_fit(X, np.where(y == "iris", "daisy", y))
    with pytest.raises(UsageError, match=r"\['daisy'\].*classes="):
        net.partial_fit(X, y, classes=["daisy", "iris", "rose", "tulip"])
    with pytest.raises(ValueError, match="test_size"):
        LightkitClassifier(early_stopping=True, validation_fraction=0.0).fit(X, y)
    with pytest.raises(NonFiniteError):
        LightkitRegressor(optimizer="sgd", lr=1e9).fit(X, X[:, 0])
