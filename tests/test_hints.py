"""The switch of hints and alarms, their names and their page."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import lightkit as lk
from lightkit import hints
from lightkit.config import build, load_config
from lightkit.errors import ConfigError
from tests.small import Net, loader

ROOT = Path(__file__).parents[1]


class Part(Net):
    """Two alarms: a layer in no optimizer, and the same data for train and validation."""

    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


def told(caplog, quiet, **options):
    data = loader()
    quiet(**options).fit(Part(), data, data)
    return [record.hint for record in caplog.records if hasattr(record, "hint")]


def test_all_are_told_by_default_as_warnings_of_their_own_logger(caplog, quiet):
    assert told(caplog, quiet) == ["same-data", "no-optimizer"]
    records = [record for record in caplog.records if hasattr(record, "hint")]
    assert {(r.name, r.levelname) for r in records} == {("lightkit.hints", "WARNING")}
    assert all(record.getMessage().endswith(f" [{record.hint}]") for record in records)


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (False, []),
        ([], ["same-data", "no-optimizer"]),
        (["same-data"], ["no-optimizer"]),
        (["same-data", "no-optimizer"], []),
    ],
)
def test_hints_are_switched_off_all_or_by_name(caplog, quiet, asked, left):
    assert told(caplog, quiet, hints=asked) == left


def test_nothing_listens_for_what_is_not_told(quiet):
    def listeners(**options):
        trainer, found = quiet(**options), []
        trainer.on("train_batch_start")(
            lambda: found.append(len(trainer.session.hooks.on_after_backward))
        )
        trainer.fit(Net(), loader())
        return found

    own = ["no-gradient", "zero-gradient", "no-change", "eval-mode", "high-loss", "probabilities"]
    assert listeners()[:2] == [1, 0]
    assert listeners(hints=own)[0] == listeners(hints=False)[0] == 0


def test_an_unknown_name_says_which_is_meant(quiet):
    with pytest.raises(
        ConfigError, match="no hint has the name 'slow-dat'. Did you mean 'slow-data'"
    ):
        quiet(hints=["slow-dat"])
    with pytest.raises(ConfigError, match="hints='slow-data': allowed are True, False, or a list"):
        quiet(hints="slow-data")


def test_the_switch_works_from_yaml(tmp_path):
    file = tmp_path / "hints.yaml"
    file.write_text("trainer:\n  hints: [slow-data]\ntask:\n  class_path: tests.small.Net\n")
    trainer = build(load_config(file)).trainer
    assert trainer.options.hints == ["slow-data"]


def test_every_name_has_a_section_of_the_page_and_a_place_in_the_code():
    page = (ROOT / "docs/hints.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^### ([\w-]+)$", page, re.MULTILINE)) == sorted(hints.NAMES)
    modules = ("advice", "alarms", "announce", "checks")
    code = "".join((ROOT / f"lightkit/{name}.py").read_text(encoding="utf-8") for name in modules)
    place = r'(?:say\((?:trainer|self\._trainer), |_warn\(\s*|yield |append\(\()"([\w-]+)"'
    said = re.findall(place, code)
    assert set(said) == set(hints.NAMES)


def test_other_ranks_say_nothing(caplog, quiet, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(lk.Trainer, "is_global_zero", property(lambda _: False))
    assert told(caplog, quiet) == []
