"""The step at which a fit failed, once more: by its batch, or by going on from a checkpoint."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightkit as lk
from lightkit.cli import main
from lightkit.errors import UsageError
from lightkit.replay import replay
from tests.test_failure import Net, loader, trainer

EVERY = lk.callbacks.ModelCheckpoint


class Told(Net):
    """Fails with its loss in the message, which tells whether all is as it was."""

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        if self.trainer.global_step == 5:
            weights = self.net[0].weight.detach()
            raise RuntimeError(f"{float(weights.sum()):.9g} {float(x.sum()):.9g}")
        return nn.functional.cross_entropy(self.net(x), y)


class Odd(Net):
    """Makes what is not finite, in several ways."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 5 and self.how == "batch":
            batch[0][0, 0] = float("nan")
        if self.trainer.global_step == 5 and self.how == "update":
            self.trainer.optimizers[0].param_groups[0]["lr"] = float("inf")

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        output = self.net(x)
        if self.trainer.global_step == 5:
            if self.how == "log":
                output = (output - 100).log()
            elif self.how == "inf":
                output = output * 1e38 * 1e38
            elif self.how == "backward":
                output = (output * 0).sqrt()
        return nn.functional.cross_entropy(output, y)


def fail(folder: Path, task: lk.TaskModule, **options: Any) -> Path:
    saver = EVERY(every_n_train_steps=3)
    one = trainer(folder, callbacks=[saver], log_every_n_steps=4, **options)
    with pytest.raises(Exception):  # noqa: B017  any: it is run again below
        one.fit(task, loader(), loader() if task.how == "validation" else None)
    return one.run_dir


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_G12_a_step_fails_again_with_its_batch_and_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fail(tmp_path, Told())
    task, before, state = Told(), files(tmp_path), torch.get_rng_state()
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run, task=task)
    assert torch.equal(torch.get_rng_state(), state)
    assert files(tmp_path) == before
    message = (run / "failure" / "traceback.txt").read_text("utf-8").partition("Error: ")[2]
    assert message.splitlines()[0] in caplog.text  # to the last digit
    assert (
        "replay:   step 6 (epoch 1): training batch 5, with the state before the step"
        in caplog.text
    )
    assert "in training_step\n" in caplog.text


def test_a_step_that_was_mended_goes_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fail(tmp_path, Net())
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run / "failure", task=Net())
        assert "in net.0: Linear(in_features=3" in caplog.text or sys.version_info < (3, 11)
        assert "watching.py" not in caplog.text  # what looks on is no part of the error
        assert not replay(run, task=Net(at=-1))
    assert "the step went through; in the run: RuntimeError" in caplog.text


def test_a_validation_fails_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fail(tmp_path, Net("validation"))
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run, task=Net("validation"))
    assert "validation batch 0, with the state before the step" in caplog.text
    assert "cannot be multiplied" in caplog.text


FOUND = {
    "log": [
        "the loss is nan",
        "log made the first nan",
        "output = (output - 100).log()",
        "from -10",
    ],
    "inf": ["mul made the first inf", "output = output * 1e38 * 1e38"],
    "backward": ["MulBackward0", "output = (output * 0).sqrt()", "returned nan values"],
    "batch": ["the batch itself holds nan"],
    "update": ["the update of step 6 made net.0.weight", "from finite gradients"],
}


@pytest.mark.parametrize("how", FOUND)
def test_the_origin_of_what_is_not_finite_is_found(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fail(tmp_path, Odd(how))
    before = files(tmp_path)
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run, task=Odd(how), data=loader())
    assert [part for part in FOUND[how] if part not in caplog.text] == [], caplog.text
    assert "goes on from" in caplog.text
    assert "step_000003" in caplog.text or "last.ckpt" in caplog.text
    assert files(tmp_path) == before


def test_the_debugger_stops_at_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("pdb.post_mortem", seen.append)
    run = fail(tmp_path, Odd("log"))
    assert replay(run, task=Odd("log"), data=loader(), debug=True)
    trace, names = seen[0], []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "training_step"


CONFIG = """
trainer: {max_epochs: 1, seed: 7, accelerator: cpu, logger: false, log_every_n_steps: 4,
          enable_progress_bar: false, enable_model_summary: false, rehearse: false}
task: {class_path: tests.test_replay.Odd, init_args: {how: log}}
data: {class_path: tests.test_replay.Data}
"""


class Data(lk.DataModule):
    def train_dataloader(self) -> Any:
        return loader()


def test_the_command_runs_it_from_the_configuration_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    assert main(["fit", "--config", "config.yaml"]) == 1
    (run,) = Path("runs/Odd").iterdir()
    assert f"lightkit replay {run}\n" in capsys.readouterr().out
    assert main(["replay", str(run)]) == 0
    said = capsys.readouterr().out
    assert "the run goes on from its beginning" in said  # before the first checkpoint
    assert "log made the first nan" in said
    assert main(["replay", str(run), "--task.how", "inf"]) == 0  # another fault at that step
    assert "mul made the first inf" in capsys.readouterr().out
    assert main(["replay", str(run), "--task.at", "-1", "--task.how", "none"]) == 1


def test_the_command_takes_the_class_where_there_is_no_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fail(tmp_path, Net())
    assert main(["replay", str(run), "--task", "tests.test_failure.Net"]) == 0
    assert "cannot be multiplied" in capsys.readouterr().out
    words = ["--task", "tests.test_replay.Told", "--task.at", "7"]
    assert main(["replay", str(fail(tmp_path, Told())), *words]) == 0  # a number, not text
    assert main(["replay", str(run), "--task", "tests.test_failure.Net", "--task.att", "1"]) == 2
    assert "Did you mean 'at'?" in capsys.readouterr().err
    run = fail(tmp_path, Odd("log"))
    words = ["--task", "tests.test_replay.Odd", "--data", "tests.test_replay.Data"]
    assert main(["replay", str(run), *words]) == 0
    assert main(["replay"]) == 2
    assert "allowed: lightkit replay RUN" in capsys.readouterr().err


def test_a_script_that_is_imported_for_its_class_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fail(tmp_path / "runs", Net())
    script = "import lightkit as lk\nfrom tests.test_failure import Net, loader\n"
    script += "lk.Trainer(max_epochs=1).fit(Net(at=-1), loader())\n"
    (tmp_path / "script_of_mine.py").write_text(script, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    fit = lk.Trainer.fit
    with pytest.raises(UsageError, match="trains when it is imported"):
        main(["replay", str(run), "--task", "script_of_mine.Net"])
    assert lk.Trainer.fit is fit
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("runs", "script_of_mine.py", "__pycache__")
    }


class Late(Net):
    """Fails in a validation from some step on."""

    def validation_step(self, batch: Any) -> Tensor:
        return self.net(batch[0][:, : 3 - (self.trainer.global_step > 5)])


def test_a_validation_that_fails_again_knows_its_step(tmp_path: Path) -> None:
    one = trainer(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError):
        one.fit(Late(at=-1), loader(), loader())
    assert replay(one.run_dir, task=Late(at=-1))


def test_an_error_of_a_hook_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fail(tmp_path, Net("end"))
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(run, task=Net("end"), data=loader())
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    start, found, trace, error = [line for line in said if not line.startswith("failure")][-4:]
    assert start.startswith("replay:   after step 10 (epoch 1): the run goes on from ")
    assert found == "found:    the same error again, out of no step"
    assert trace.startswith("Traceback from your code on:\n")
    assert trace.count("File ") == 1
    assert error == "ValueError: at the end"
    with pytest.raises(ValueError, match="no data"):  # another one, before it came to the place
        replay(run, task=Net("end"), data=Broken())


class Broken(lk.DataModule):
    """Has no data."""

    def train_dataloader(self) -> Any:
        raise ValueError("no data")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no failure/failure.json"):
        replay(tmp_path)
    run = fail(tmp_path, Odd("log"))
    with pytest.raises(UsageError, match="--task tests.test_replay.Odd; or in Python"):
        replay(run)
    with pytest.raises(UsageError, match="needs its data"):
        replay(run, task=Odd("log"))
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="no longer the checkpoint"):
        replay(run, task=Odd("log"), data=loader())


def test_a_run_without_a_checkpoint_needs_its_configuration(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    with pytest.raises(lk.errors.NonFiniteError):
        one.fit(Odd("log"), loader())
    with pytest.raises(UsageError, match=r"seed=7 and detect_anomaly=True"):
        replay(one.run_dir, task=Odd("log"), data=loader())


def test_the_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: lightkit replay RUN [--task module.Class]" in said
    assert "--debug" in said
    assert "--config" not in said


class Second(Net):
    """Fails on the second of two validation loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return self.net(batch[0][:, : 3 - dataloader_idx])


class Manual(Told):
    """Optimizes by itself."""

    automatic_optimization = False

    def training_step(self, batch: Any) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


def test_the_right_loader_is_validated_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = trainer(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError):
        one.fit(Second(at=-1), loader(), [loader(), loader()])
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(one.run_dir, task=Second(at=-1))
    assert "return self.net(batch[0][:, : 3 - dataloader_idx])" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Manual, {}), (Told, {"accumulate_grad_batches": 3}), (Told, {"precision": "bf16-mixed"})],
)
def test_steps_of_every_kind_come_again(
    kind: Any, options: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = trainer(tmp_path, **options)
    with pytest.raises(RuntimeError) as raised:
        one.fit(kind(), loader())
    with caplog.at_level(logging.INFO, "lightkit"):
        assert replay(one.run_dir, task=kind())
    assert f"RuntimeError: {raised.value}" in caplog.text
