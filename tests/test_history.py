from __future__ import annotations

import builtins
import math
import sys
import types

import pytest

from lightkit.errors import UsageError
from lightkit.history import History


def three():
    return History(
        {
            "epoch": n,
            "step": 10 * n,
            "train_loss": 1 / n,
            "val_loss": 2 / n,
            "val_acc": n / 4,
            "time": 0.5,
        }
        for n in (1, 2, 3)
    )


def test_is_a_list_of_dicts():
    history = three()
    assert len(history) == 3
    assert history[-1]["epoch"] == 3
    assert history[0] == dict(history[0])
    assert isinstance(history[1:], History)
    assert [row["epoch"] for row in history[1:]] == [2, 3]


def test_repr_is_short():
    assert repr(three()) == "History(3 epochs: train_loss 1 -> 0.3333, val_loss 2 -> 0.6667)"
    assert repr(three()[:1]) == "History(1 epoch: train_loss 1, val_loss 2)"
    assert repr(History()) == "History(no epochs)"
    assert repr(History([{"epoch": 1, "step": 5}])) == "History(1 epoch)"
    assert repr(History([{"epoch": 1, "loss_d": 1.0}])) == "History(1 epoch: loss_d 1)"


def test_a_column_by_name():
    history = three()
    del history[1]["val_loss"]
    column = history["val_loss"]
    assert (column[0], column[2]) == (2.0, 2 / 3)
    assert math.isnan(column[1])
    assert history["epoch"] == [1, 2, 3]


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(KeyError, match="Did you mean 'val_loss'"):
        three()["val_los"]
    with pytest.raises(KeyError, match="no metrics"):
        History()["val_loss"]


def test_best():
    history = three()
    history[1]["val_loss"] = math.nan
    assert history.best("val_loss")["epoch"] == 3
    assert history.best("val_acc", mode="max")["epoch"] == 3
    assert history.best("time")["epoch"] == 1  # the earliest of equals
    with pytest.raises(UsageError, match="'min' and 'max'"):
        history.best("val_loss", mode="auto")
    with pytest.raises(UsageError, match="nan in every epoch"):
        History([{"a": math.nan}]).best("a")


def test_load_replaces_the_rows_by_copies():
    rows = [{"epoch": 1, "a": 1.0}]
    history = three()
    history.load(rows)
    rows[0]["a"] = 2.0
    assert history == [{"epoch": 1, "a": 1.0}]


def hide(monkeypatch, package):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_a_missing_library_says_what_to_install(monkeypatch):
    hide(monkeypatch, "pandas")
    with pytest.raises(ImportError, match="pip install pandas"):
        three().to_pandas()
    monkeypatch.undo()
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        three().plot()


def test_to_pandas():
    pytest.importorskip("pandas")
    frame = three().to_pandas()
    assert list(frame.index) == [1, 2, 3]
    assert frame["val_acc"].tolist() == [0.25, 0.5, 0.75]


def test_plot_puts_train_and_val_of_a_metric_on_one_axes(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    history = three()
    del history[1]["val_loss"]
    figure = history.plot(tmp_path / "curves.png")
    lines = {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes
    }
    assert set(lines) == {"loss", "acc"}
    assert set(lines["loss"]) == {"train_loss", "val_loss"}
    assert lines["loss"]["val_loss"] == [[1, 2.0], [3, 2 / 3]]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    only = history.plot(names=["val_acc"])
    assert [axes.get_title() for axes in only.axes] == ["acc"]
    pyplot.close("all")


def test_nothing_is_imported_before_it_is_needed():
    assert isinstance(sys.modules["lightkit.history"], types.ModuleType)
    assert not {"pandas", "matplotlib"} & set(vars(sys.modules["lightkit.history"]))


def test_the_picture_goes_into_the_folder_of_the_run(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    history = three()
    history.plot(close=True)  # no folder, no file
    history.folder = tmp_path / "run"
    history.folder.mkdir()
    history.plot(close=True)
    assert (tmp_path / "run/curves.png").is_file()
    history.plot(tmp_path / "mine.png", ["val_acc"], close=True)
    assert (tmp_path / "mine.png").is_file()
    history[1:].plot(close=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curves.png"]
    assert pyplot.get_fignums() == []


def test_sketch_draws_each_metric_between_its_lowest_and_highest_value():
    assert three()[:2].sketch(20).splitlines() == [
        "train_loss, epochs 1",  # cut to the width
        "   1.0000 | █▅▁",
        "          | ███▆▃",
        "   0.5000 | ██████▄▁",
        "val_loss, epochs 1 t",
        "   2.0000 | █▅▁",
        "          | ███▆▃",
        "   1.0000 | ██████▄▁",
        "val_acc, epochs 1 to",
        "   0.5000 |      ▁▅█",
        "          |    ▃▆███",
        "   0.2500 | ▁▄██████",
    ]


def test_sketch_leaves_out_what_is_not_finite_and_needs_no_more_than_ascii():
    history = three()
    history[0] |= {"val_loss": math.nan, "grad": math.inf}
    history[2] |= {"once": 3.0}
    lines = history.sketch(ascii_only=True).splitlines()
    assert all(line.isascii() and len(line) <= 72 for line in lines)
    assert "val_loss, epochs 2 to 3" in lines
    assert lines[-1] == "once, epoch 3: 3.0000"
    assert not any(line.startswith("grad") for line in lines)
    assert len(lines) == 3 * 4 + 1
    assert History().sketch() == ""


def test_sketch_of_a_constant_is_a_flat_line():
    history = History({"epoch": n, "loss": 2.0} for n in (1, 2, 3))
    assert history.sketch(20).splitlines()[1:] == [
        "   2.0000 |",
        "          | ▄▄▄▄▄▄▄▄",
        "   2.0000 | ████████",
    ]
    assert history.sketch(1).splitlines()[2] == "          | ▄▄▄▄▄▄▄▄"
