"""`assert_same_on_ranks`: real processes against one, for tasks that do and that do not spread."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.nn import functional

import lightkit as lk
from lightkit import rng
from lightkit.checkpoint import save_file
from lightkit.testing import assert_same_on_ranks, member, ranks
from tests import small

RANK_LIMIT = 90.0


class Own(small.Net):
    """Averages by itself, which each rank does over its own batches."""

    def on_validation_epoch_start(self):
        self.found = []

    def validation_step(self, batch, batch_idx):
        self.found.append(super().validation_step(batch, batch_idx))

    def on_validation_epoch_end(self):
        self.log("val_own", torch.stack(self.found).mean())


class Noisy(small.Net):
    def training_step(self, batch, batch_idx):
        x = functional.dropout(batch[0], 0.3)
        return functional.mse_loss(self.net(x), batch[1])


def good():
    return small.Net(), small.loader(44), small.loader(20)


def own():
    return Own(), small.loader(44), small.loader(20)


def noisy():
    return Noisy(), small.loader(44)


class WithData(small.Net):
    def train_dataloader(self):
        return small.loader()


def alone():
    return WithData()


@torch.no_grad()  # of another file
def decorated():
    return good()


def broken():
    raise ValueError("no data here")


def test_a_mean_of_each_rank_alone_is_found_and_all_else_is_the_same():
    """S4-04, G22: 11 batches, of which two ranks have 5 each, in groups of 2; 5 to validate on."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 2, "max_epochs": 1}
    with pytest.raises(AssertionError) as caught:
        assert_same_on_ranks(own, limit=RANK_LIMIT, **options)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3, lines
    first, second, why = lines
    assert first == "2 processes do not train as one does:"
    assert second.startswith("  val_own of epoch 1: ")
    assert " in one process, " in second
    assert second.endswith(" on rank 0")
    assert "by self.log or a metric" in why


def test_a_task_that_spreads_passes(monkeypatch):
    """As on ranks that all are alike, without starting them."""
    orders = []

    def run(number, folder, limit):
        order = json.loads((folder / "order.json").read_text("utf-8"))
        orders.append((number, limit, order["function"], order["options"]))
        for rank in range(number):
            options = {"accumulate_grad_batches": 3, "limit_train_batches": 9}
            with rng.preserved():
                result = ranks.train(good, order["seed"], folder, {**order["options"], **options})
            save_file({**result, "batches": 3}, folder / f"rank_{rank}.pt")

    monkeypatch.setattr(ranks, "_run", run)
    drawn = torch.get_rng_state()
    assert_same_on_ranks(good, ranks=3, max_epochs=1, precision=32, ignore="val_*")
    assert torch.equal(torch.get_rng_state(), drawn)
    given = {"max_epochs": 1, "precision": 32}
    assert orders == [(3, 120.0, [__name__, __file__, "good"], given)]


def test_an_error_of_a_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    function = (__name__, __file__, "broken")
    order = {"function": function, "seed": 0, "options": {}, "path": sys.path}
    (tmp_path / "order.json").write_text(json.dumps(order), encoding="utf-8")
    with pytest.raises(ValueError, match="no data here"):
        member.main(tmp_path)
    (tmp_path / "order.json").unlink()  # so that the processes fail before they import torch
    with pytest.raises(AssertionError) as caught:
        ranks._run(2, tmp_path, RANK_LIMIT)
    said = str(caught.value)
    assert said.startswith("The 2 processes ended with code 1:\nTraceback")
    assert said.endswith("ValueError: no data here\n")
    (tmp_path / "error_0.txt").unlink()
    with pytest.raises(AssertionError, match=r"FileNotFoundError.*order\.json"):
        ranks._run(2, tmp_path, RANK_LIMIT)


def test_what_differs_is_said_with_its_size(tmp_path):
    one = ranks.train(noisy, 0, tmp_path, {"max_epochs": 1})
    two = ranks.train(noisy, 0, tmp_path, {"max_epochs": 1})
    assert [*ranks._apart(one, two, 1, 0.0, [])] == []
    two["parameters"]["net.bias"] = two["parameters"]["net.bias"] + 0.5
    two["means"][0]["train_loss"] += 1
    del two["means"][0]["step"], two["parameters"]["net.weight"]
    found = dict(ranks._apart(one, two, 1, 1e-3, []))
    assert found.pop("train_loss of epoch 1").endswith(" on rank 1")
    assert found == {
        "step of epoch 1": "only in one process",
        "net.weight": "only in one process",
        "net.bias": "apart by up to 0.5 on rank 1",
    }
    assert [*ranks._apart(one, two, 1, 1e-3, ["net.*", "train_*", "step"])] == []
    two["means"] = []
    assert "epochs" in dict(ranks._apart(one, two, 0, 1e-3, []))


def test_processes_that_do_not_end_are_ended(tmp_path):
    with pytest.raises(AssertionError, match=r"The 2 processes did not end within 0\.3 s"):
        ranks._run(2, tmp_path, 0.3)


def test_a_function_is_found_by_its_module_and_by_its_file(tmp_path):
    assert member.found(__name__, __file__, "good") is good
    assert member.found("json", json.__file__, "JSONDecoder.decode") is json.JSONDecoder.decode
    file = tmp_path / "json.py"  # as a module that is there already
    file.write_text("def make():\n    return 3\n", encoding="utf-8")
    for module in ("json", "__main__", "no_such_module"):
        assert member.found(module, str(file), "make")() == 3
    del sys.modules["json_of_ranks"]


def test_a_decorated_function_is_that_of_its_own_file_and_a_task_may_have_its_data(tmp_path):
    assert json.loads(ranks._order(decorated, 2, 0, {}))["function"][1] == __file__
    found = ranks.train(alone, 0, tmp_path, {"max_epochs": 1})
    assert [*found["means"][0]] == [*ranks.train(noisy, 0, tmp_path, {"max_epochs": 1})["means"][0]]


def test_it_says_what_cannot_be_tried(monkeypatch):
    def inner():
        return good()

    for make in (inner, lambda: good(), 3, len):
        with pytest.raises(lk.errors.UsageError, match="cannot be imported by other processes"):
            assert_same_on_ranks(make)
    with pytest.raises(lk.errors.UsageError, match="from 2 on"):
        assert_same_on_ranks(good, ranks=1)
    with pytest.raises(lk.errors.UsageError, match=r"as plain values.*configure_callbacks"):
        assert_same_on_ranks(good, callbacks=lk.callbacks.EMA())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(lk.errors.UsageError, match="outside of torchrun, .* __name__"):
        assert_same_on_ranks(good)
