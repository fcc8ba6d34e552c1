"""A disk that is full in the middle of a fit: by a limit on the size of files."""

from __future__ import annotations

import dataclasses

from lightkit.checkpoint import latest, read_checkpoint
from tests.faults.harness import Outcome, log_of
from tests.faults.victim import Settings

#: Checkpoints of this width have about 200 KiB; the files of loggers stay below the limit.
WIDTH, LIMIT = 2000, 100_000


def full(tmp_path, **settings) -> Settings:
    return Settings(root=str(tmp_path), width=WIDTH, full={"after": 4, "size": LIMIT, **settings})


def test_it_ends_with_words_and_goes_on_when_there_is_room(lives, reference, tmp_path):
    settings = full(tmp_path)
    assert lives.live(settings) == 1
    said = log_of(tmp_path)
    folder = tmp_path / "runs" / "Net" / "version_0" / "checkpoints"
    assert f"{folder}/step_" in said
    assert "could not be written: File too large. It needs about" in said
    assert "free there:" in said
    assert "Earlier checkpoints are untouched" in said
    assert not [p.name for p in folder.iterdir() if "tmp" in p.name]
    assert read_checkpoint(folder / "last.ckpt")["loop"]["global_step"] == 8
    assert latest(folder) is not None
    settings = dataclasses.replace(settings, full=None)
    found = lives.run(settings)
    assert not reference(settings).differences(found)


def test_a_run_may_go_on_without(lives, reference, tmp_path):
    saving = {"on_error": "warn"}
    settings = dataclasses.replace(full(tmp_path, until=13), saving=saving)
    assert lives.live(settings) == 0, log_of(tmp_path)
    assert "File too large" in log_of(tmp_path)
    found = Outcome.of(tmp_path)
    expected = reference(dataclasses.replace(settings, full=None))
    for outcome in (found, expected):  # which files there are is another matter
        del outcome.dump["callbacks"], outcome.dump["checkpoints"]
    assert not expected.differences(found)
    folder = tmp_path / "runs" / "Net" / "version_0" / "checkpoints"
    assert read_checkpoint(folder / "last.ckpt")["loop"]["global_step"] == 19
