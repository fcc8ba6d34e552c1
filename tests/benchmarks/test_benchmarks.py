"""The benchmarks compare equals, count right, and say what is missing."""

from __future__ import annotations

import re

import pytest
import torch

from tests.benchmarks import __main__ as command
from tests.benchmarks import contenders, fresh, levels, plan, tables, turns
from tests.benchmarks.beside import WARMUP, Beside
from tests.benchmarks.contenders import hand
from tests.benchmarks.pairs import Pair, compare, gain_table
from tests.benchmarks.summary import summary
from tests.benchmarks.works import LEVELS, WORKS, make_job

SHORT = {"steps": 3, "epochs": 3}
OURS = ("silent", "usual", "plain", "lightkit")
PEERS = ("lightning", "fabric", "accelerate", "ignite")
PLACES = [(work, level) for work in WORKS for level in WORKS[work].levels]


class Bar:
    """What is used of tqdm, where that is not installed."""

    def __init__(self, batches, desc=""):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def set_postfix(self, **values):
        pass


@pytest.fixture
def tqdm(monkeypatch):
    if not contenders.CONTENDERS["hand"].installed:
        monkeypatch.setattr(hand, "tqdm", Bar)


@pytest.mark.parametrize(("work", "level"), PLACES)
def test_all_train_to_the_weights_of_the_loop_by_hand(work, level, tqdm):
    weights = {name: turns.train(work, level, name, **SHORT) for name in ("hand", *OURS)}
    by_hand = weights["hand"]["weights"]
    # Fused Adam rounds differently, so what lightkit chooses is left out where there is AdamW.
    same = OURS if work == "mlp" else OURS[:-1]
    assert {name: weights[name]["weights"] for name in same} == dict.fromkeys(same, by_hand)
    assert all(turn["cpu"] > 0 and turn["wall"] > 0 for turn in weights.values())


def test_the_choices_of_lightkit_train_on_the_same_batches(tmp_path):
    from tests.benchmarks.contenders.ours import tensor_loader

    job = make_job("digits", "bare", tmp_path)
    tensors = tensor_loader(job.train)
    for loaders in (job.train, tensors), (job.train, tensors):
        orders = []
        for loader in loaders:
            torch.manual_seed(5)
            orders.append([x for x, _ in loader])
        assert all(map(torch.equal, *orders))
    assert turns.train("digits", "full", "choices", epochs=3)["cpu"] > 0
    assert not levels.fits("choices", "mlp", "full")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("work", ["mlp", "digits"])
def test_so_do_the_peers(name, work, tqdm):
    if not contenders.CONTENDERS[name].installed:
        pytest.skip(f"{name} is not installed")
    arguments = {"work": work, "level": "full", **SHORT}
    turn = fresh.call("tests.benchmarks.turns:train", contender=name, **arguments)
    assert turn["weights"] == turns.train(contender="hand", **arguments)["weights"]


def test_the_job_is_that_of_the_template(tmp_path):
    from templates.digits.data import DigitsData
    from templates.digits.model import DigitsNet

    job = make_job("digits", "full", tmp_path)
    data = DigitsData()
    data.setup("fit")
    assert str(job.net.net) == str(DigitsNet().net)
    for ours, theirs in ((job.train, data.train_dataloader()), (job.val, data.val_dataloader())):
        torch.manual_seed(3)
        x, y = next(iter(ours))
        torch.manual_seed(3)
        their_x, their_y = next(iter(theirs))
        assert len(ours) == len(theirs)
        assert torch.equal(x, their_x)
        assert torch.equal(y, their_y)
    assert "max_epochs: 12" in (fresh.ROOT / "configs/digits.yaml").read_text("utf-8")
    assert job.epochs == 12


def test_the_table_of_known_turns():
    def turn(cpu, wall, weights="a"):
        return {"cpu": cpu, "wall": wall, "peak": 300.0, "weights": weights}

    results = {
        "hand": [turn(100.0, 110.0), turn(200.0, 220.0), turn(1000.0, 1100.0)],
        "silent": [turn(50.0, 60.0), turn(100.0, 120.0), turn(500.0, 500.0)],
        # Slower where the hand loop was, too: the ratios are 0.8, 0.9, 1.0, whatever the times.
        "lightkit": [turn(80.0, 110.0), turn(180.0, 220.0), turn(1000.0, 1100.0, "b")],
    }
    table = levels.level_table("mlp", "full", results)
    by_hand, _, ours = table.rows
    assert by_hand[2] == "1.00 (1.00 to 1.00)"
    assert ours[:3] == ("lightkit", "180", "0.90 (0.85 to 0.95)")
    assert ours[3:5] == ("1.80 (1.70 to 1.90)", "1.00 (1.00 to 1.00)")
    assert ours[5:] == ("300", "others")
    assert by_hand[6] == "the same"
    assert table.notes == []
    results["lightning"] = [turn(160.0, 1.0), turn(360.0, 1.0), turn(4000.0, 1.0)]
    notes = levels.level_table("mlp", "full", results).notes
    assert notes == ["Lightning's time is 2.00 (2.00 to 3.00) times that of lightkit."]
    lines = table.markdown().splitlines()
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|") == 8


def test_a_gain_of_known_numbers():
    found = {"what": "a thing", "unit": "step", "base": [4.0, 8.0], "other": [2.0, 2.0]}
    table = gain_table("name", "Title", "old", "new", [found])
    assert table.rows == [("a thing", "step", "6.0", "2.0", "0.38 (0.31 to 0.44)")]


def test_a_table_goes_between_its_marks(tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    page.write_text("before\n<!-- table: x/y -->\nold\n<!-- /table -->\nafter\n", encoding="utf-8")
    other.write_text("<!-- table: x -->\nkept\n<!-- /table -->\n", encoding="utf-8")
    table = tables.Table("x/y", "Title", ("a", "b"), [("1", r"\1")], ["A note."])
    assert tables.write(table, [page, other]) == [page]
    tables.write(table, [page, other])  # again: in the place of the first
    expected = "**Title**\n\n| a | b |\n|---|---|\n| 1 | \\1 |\n\nA note.\n"
    marked = f"<!-- table: x/y -->\n{expected}<!-- /table -->"
    assert page.read_text(encoding="utf-8") == f"before\n{marked}\nafter\n"
    assert "kept" in other.read_text(encoding="utf-8")


def test_the_summary_is_put_together_from_the_tables_of_a_page():
    page = """
<!-- table: mlp/full -->
| | us | ratio |
|---|---|---|
| loop by hand | 1,100 | 1.00 (1.00 to 1.00) | 2.00 (1.00 to 3.00) |
| lightkit | 900 | 0.82 (0.80 to 0.90) | 1.00 (1.00 to 1.00) |
<!-- /table -->
<!-- table: mlp/log -->
<!-- /table -->
<!-- table: digits/full -->
| lightkit | 2,900 | 0.95 (0.80 to 0.99) |
<!-- /table -->
"""
    table = summary(page)
    assert table.header == ("", "MLP: everything on", "digits: everything on")
    assert table.rows == [("loop by hand", "1.00", ""), ("lightkit", "0.82", "0.95")]


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    here = contenders.CONTENDERS
    monkeypatch.setitem(here, "hand", contenders.Contender("loop by hand", "hand"))
    monkeypatch.setitem(here, "gone", contenders.Contender("Gone", "gone", "no-such-package"))
    assert plan.installed(["hand", "gone"]) == ["hand"]
    assert command.main(["imports", "--quick", "--contenders", "hand,gone"]) == 0
    said = capsys.readouterr().out
    assert "Left out, not installed: gone (pip install no-such-package)" in said
    assert "`python -m tests.benchmarks imports --contenders hand,gone --quick`" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mpl"], "no scenario 'mpl'; there are"),
        (["mlp", "--contenders", "hand,lightnin"], "no contender 'lightnin'; there are hand"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_right_ones(words, said, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert said in capsys.readouterr().err


def test_rounds_are_interleaved_and_turned_round(monkeypatch):
    called = []
    monkeypatch.setattr(fresh, "call", lambda target, contender, **_: called.append(contender))
    turns.rounds("module:function", ["a", "b", "c"], 2)
    assert called == ["a", "b", "c", "c", "b", "a"]


def test_one_that_fails_is_left_out_and_said(monkeypatch):
    def call(target, contender, **_):
        if contender == failing:
            raise fresh.FailedError("it broke")
        return 1

    said = []
    monkeypatch.setattr(fresh, "call", call)
    failing = "b"
    results = turns.rounds("module:function", ["a", "b", "c"], 2, said.append)
    assert results == {"a": [1, 1], "c": [1, 1]}
    assert "it broke" in said
    assert turns.failed(["a", "b", "c"], results) == ["Failed here, and so left out: b."]
    failing = "a"
    with pytest.raises(fresh.FailedError):
        turns.rounds("module:function", ["a", "b"], 2)


def test_a_pair_is_measured_in_turn():
    called = []
    pair = Pair("it", lambda n: called.append(("a", n)), lambda n: called.append(("b", n)), times=5)
    found = compare(pair, rounds=2)
    turn = [("a", 5), ("b", 5), ("b", 5), ("a", 5)]
    once = [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert called == [*once, *turn, *turn, *turn]  # one turn to warm up
    assert len(found["base"]) == len(found["other"]) == 2


def test_a_fit_beside_a_loop_by_hand():
    called = []
    loader = Beside(lambda n: called.append(n), "batch", chunk=3, rounds=4, at=(2, 70))
    given = []
    for batch in loader:
        called.append(1)
        given.append(batch)
    assert given == ["batch"] * len(loader)
    a_round = [3, *[1] * 6, 3]
    assert called[:10] == [1, 1, *a_round]
    assert called.count(3) == 2 * 2 * (WARMUP + 4)
    assert {place: len(loader.ratios(place)) for place in loader.at} == {2: 4, 70: 4}
    assert loader.memory[70] > 1


def test_a_call_in_a_fresh_process():
    words = ["-c", "the", "words"]
    assert fresh.call("shlex:join", split_command=words) == "-c the words"
    script = "import os; assert os.isatty(1); assert os.environ['OMP_NUM_THREADS'] == '1'"
    assert fresh.call("timeit:timeit", stmt="pass", setup=script, number=1) >= 0
    with pytest.raises(fresh.FailedError, match="No module named"):
        fresh.call("tests.benchmarks.nothing:here")


def test_pages_have_places_for_known_tables():
    names = set()
    for page in (fresh.ROOT / "docs").glob("*.md"):
        names |= set(re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8")))
    assert names
    for name in names - {"machine", "summary"}:
        group, _, rest = name.partition("/")
        assert (rest if group == "gains" else group) in plan.known(), name
        if group in WORKS:
            assert rest in LEVELS, name


def test_every_scenario_says_what_it_measures():
    for name, module in plan.known().items():
        assert module.__doc__.splitlines()[0], name
        assert hasattr(module, "tables") or (module.BASE and module.OTHER and module.pairs), name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(plan.known()))
def test_every_scenario_runs(name, capsys):
    if not contenders.CONTENDERS["hand"].installed:
        pytest.skip("tqdm is not installed")
    if name == "prefetch" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    words = [name, "--quick", "--rounds", "1", "--contenders", "hand,lightkit"]
    assert command.main(words) == 0
    assert f"`python -m tests.benchmarks {name} --contenders" in capsys.readouterr().out
