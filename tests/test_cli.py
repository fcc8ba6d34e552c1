"""The command line: what it says to wrong input, and whole runs in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightkit as lk
from lightkit.cli import main
from lightkit.signatures import arguments

PROJECT = '''
from typing import Literal

import torch
from torch.utils.data import DataLoader, TensorDataset

import lightkit as lk


class Net(lk.TaskModule):
    """A line.

    Args:
        width: How many inputs.
        lr: The learning rate.
    """

    def __init__(
        self,
        width: int,
        lr: float = 0.1,
        loss: Literal["mse", "l1"] = "mse",
        layers: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(width, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Data(lk.DataModule):
    def __init__(self, n: int = 16) -> None:
        super().__init__()
        x = torch.linspace(-1, 1, 2 * n).reshape(n, 2)
        self.set = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.set[:5]), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader


class Broken(Net):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("mine")


class Other:
    pass
'''
CONFIG = """\
trainer:
  max_epochs: 2
  logger: false
  default_root_dir: out
task:
  class_path: cli_project.Net
  init_args:
    width: 2
data: cli_project.Data
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "cli_project.py").write_text(PROJECT)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("cli_project", None)


def start(*words, cwd, **changes):
    """Runs the command in a process of its own, as a user does."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env |= changes
    command = [sys.executable, "-m", "lightkit", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


# Each case: the command line after "lightkit", what is put into more.yaml, parts of the message.
WRONG = {
    "unknown flag": (
        "fit --config run.yaml --max_epochs 3",
        None,
        ["command line: --max_epochs: unknown key", "Did you mean 'trainer.max_epochs'?"],
    ),
    "another trainer's word for it": (
        "fit --config run.yaml --epochs 3",
        None,
        ["command line: --epochs: unknown key", "Did you mean 'trainer.max_epochs'?"],
    ),
    "another trainer's word among its arguments": (
        "fit --config run.yaml --trainer.epochs 3",
        None,
        ["command line: --trainer.epochs: unknown key", "Write max_epochs."],
    ),
    "no abbreviation": (
        "fit --config run.yaml --trainer.max_ep 3",
        None,
        ["command line: --trainer.max_ep: unknown key", "Did you mean 'max_epochs'?"],
    ),
    "unknown flag of the task": (
        "fit --config run.yaml --task.widht 3",
        None,
        ["--task.widht: unknown key", "allowed: width, lr, loss, layers", "Did you mean 'width'?"],
    ),
    "unknown trainer key in a file": (
        "fit --config run.yaml --config more.yaml",
        "trainer:\n  max_epoch: 3\n",
        ["more.yaml, line 2: trainer.max_epoch: unknown key", "Did you mean 'max_epochs'?"],
    ),
    "unknown key of a callback": (
        "fit --config run.yaml --config more.yaml",
        "trainer:\n  callbacks:\n  - class_path: lightkit.callbacks.EarlyStopping\n    init_args: {patince: 2}",
        ["line 4: trainer.callbacks[0].init_args.patince", "Did you mean 'patience'?"],
    ),
    "unknown top-level key": (
        "fit --config run.yaml --config more.yaml",
        "model: cli_project.Net\n",
        ["more.yaml, line 1: model", "allowed: trainer, data, task", "Did you mean 'task'?"],
    ),
    "text for an int": (
        "fit --config run.yaml --config more.yaml",
        "trainer: {max_epochs: three}\n",
        ["trainer.max_epochs: wrong type", "given:   'three'", "allowed: int or null"],
    ),
    "bool for an int": (
        "fit --config run.yaml --trainer.accumulate_grad_batches true",
        None,
        ["--trainer.accumulate_grad_batches: wrong type", "given:   true", "allowed: int"],
    ),
    "float for an int": (
        "fit --config run.yaml --task.width=2.5",
        None,
        ["--task.width: wrong type", "given:   2.5", "allowed: int"],
    ),
    "text for a bool": (
        "fit --config run.yaml --trainer.detect_anomaly maybe",
        None,
        ["--trainer.detect_anomaly: wrong type", "given:   maybe", "allowed: bool"],
    ),
    "text for a float": (
        "fit --config run.yaml --config more.yaml",
        "task:\n  init_args:\n    lr: fast\n",
        ["more.yaml, line 3: task.init_args.lr: wrong type", "'fast'", "allowed: float"],
    ),
    "text in a list of int": (
        "fit --config run.yaml --config more.yaml",
        "task: {init_args: {layers: [8, wide]}}\n",
        ["task.init_args.layers[1]: wrong type", "given:   'wide'", "allowed: int"],
    ),
    "wrong choice": (
        "fit --config run.yaml --task.loss msee",
        None,
        ["--task.loss: unknown choice", "allowed: 'mse' or 'l1'", "Did you mean 'mse'?"],
    ),
    "missing file": (
        "fit --config rum.yaml",
        None,
        ["rum.yaml: no such file", "Did you mean 'run.yaml'?"],
    ),
    "malformed YAML": (
        "fit --config run.yaml --config more.yaml",
        "trainer:\n  max_epochs: [1, 2\ntask: x\n",
        ["more.yaml, line 3: not valid YAML", "given:   task: x"],
    ),
    "key given twice": (
        "fit --config more.yaml",
        "trainer:\n  max_epochs: 1\n  max_epochs: 2\n",
        ["more.yaml, line 3: not valid YAML: the key 'max_epochs' is there twice"],
    ),
    "unknown module": (
        "fit --config run.yaml --task cli_projects.Net",
        None,
        ["--task: no module 'cli_projects'", "Did you mean 'cli_project'?"],
    ),
    "unknown class": (
        "fit --config run.yaml --data.class_path cli_project.Dat",
        None,
        ["--data.class_path: no 'Dat' in cli_project", "Did you mean 'Data'?"],
    ),
    "name without a module": (
        "fit --config run.yaml --trainer.callbacks [{class_path: EarlyStopping}]",
        None,
        ["not an import path", "Did you mean 'lightkit.callbacks.EarlyStopping'?"],
    ),
    "class of lightkit without its module": (
        "fit --config run.yaml --trainer.callbacks lightkit.EarlyStopping",
        None,
        ["no 'EarlyStopping' in lightkit", "Did you mean 'lightkit.callbacks.EarlyStopping'?"],
    ),
    "missing argument": (
        "fit --task cli_project.Net",
        None,
        ["--task: argument 'width' of Net is missing", "allowed: width: int"],
    ),
    "not a task": (
        "fit --config run.yaml --task cli_project.Other",
        None,
        ["--task: not a TaskModule", "given:   'cli_project.Other'"],
    ),
    "missing task": ("fit", None, ["command line: task is missing", "--task"]),
    "arguments without a class": (
        "fit --task.lr 3",
        None,
        ["--task.lr: init_args without class_path", "allowed: class_path: module.Class"],
    ),
    "misspelled class_path": (
        "fit --config more.yaml",
        "task:\n  class_pth: cli_project.Net\n",
        ["more.yaml, line 2: task.class_pth: unknown key", "Did you mean 'class_path'?"],
    ),
    "key into a list": (
        "fit --config run.yaml --config more.yaml --trainer.callbacks.0.patience 3",
        "trainer: {callbacks: [lightkit.callbacks.EarlyStopping]}\n",
        ["--trainer.callbacks.0.patience: keys cannot reach into a list"],
    ),
    "unknown class under --help": (
        "fit --help --task cli_project.Nat",
        None,
        ["--task: no 'Nat' in cli_project", "Did you mean 'Net'?"],
    ),
    "unknown command": ("fti --config run.yaml", None, ["'fti'", "Did you mean 'fit'?"]),
    "second command": ("fit test", None, ["one word too many after 'fit'", "given:   test"]),
    "no command": ("--config run.yaml", None, ["no command", "allowed: fit, "]),
    "file without --config": ("fit run.yaml", None, ["Did you mean --config run.yaml?"]),
    "flag without a value": ("fit --config", None, ["--config needs a value"]),
    "flag of another command": ("fit --list", None, ["fit has no flag --list"]),
    "wrong value inside a list from a flag": (
        "fit --config run.yaml --config more.yaml --trainer.callbacks [lightkit.callbacks.EarlyStoping]",
        "trainer: {callbacks: [lightkit.callbacks.EarlyStopping]}\n",
        ["command line: --trainer.callbacks: no 'EarlyStoping'", "Did you mean 'EarlyStopping'?"],
    ),
    "short flag": ("fit -c run.yaml", None, ["unknown flag -c"]),
    "misspelled switch": ("new --lst", None, ["--lst needs a value", "Did you mean '--list'?"]),
    "no folder": ("new digits", None, ["no folder", "lightkit new TEMPLATE FOLDER", "--list"]),
    "unknown template": ("new digit x", None, ["'digit'", "Did you mean 'digits'?"]),
}


def test_notes_stand_below_the_error(monkeypatch, capsys):
    def fails(words):
        error = lk.errors.CheckpointError("the disk is full")
        error.__notes__ = ["in the rehearsal"]
        raise error

    monkeypatch.setattr("lightkit.cli._run", fails)
    monkeypatch.setattr("lightkit.cli._passes_through_user_code", lambda error: False)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err == "error: the disk is full\nin the rehearsal\n"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_in_four_lines(project, capsys, case):
    words, more, parts = WRONG[case]
    if more is not None:
        (project / "more.yaml").write_text(more)
    words = words.split(" ")
    if "[{class_path:" in words:  # the one value with a space in it
        words[-2:] = [" ".join(words[-2:])]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 4, err
    for part in parts:
        assert part in err


def weights(folder):
    """Returns the newest weights below a folder, as torch alone reads them."""
    files = sorted(Path(folder).rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    return torch.load(files[-1], weights_only=True)["model"]


def test_fit_repeats_from_the_config_it_saved_and_the_other_commands_load_it(project, capsys):
    assert main(["--config", "run.yaml", "fit", "--task.lr", "0.05"]) == 0
    [saved] = Path("out").rglob("config.yaml")
    first = weights("out")
    assert main(["fit", "--config", str(saved), "--trainer.default_root_dir=again"]) == 0
    again = weights("again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    [checkpoint, *_] = Path("out").rglob("*.ckpt")
    for command in ("validate", "test"):
        capsys.readouterr()
        assert main([command, "--config", str(saved), "--ckpt_path", str(checkpoint)]) == 0
        assert "untrained" not in capsys.readouterr().out
    words = ["--config", str(saved), "--ckpt_path", str(checkpoint), "--output", "p.pt"]
    assert main(["predict", *words]) == 0
    assert capsys.readouterr().out.endswith("predictions: p.pt\n")
    assert [tuple(batch.shape) for batch in torch.load("p.pt", weights_only=True)] == [
        (4, 1),
        (1, 1),
    ]


def test_untrained_weights_are_told(project, capsys):
    assert main(["fit", "--config", "run.yaml", "--trainer.max_epochs", "1"]) == 0
    [saved] = Path("out").rglob("config.yaml")
    capsys.readouterr()
    assert main(["validate", "--config", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "warning: untrained weights" in out
    assert "--ckpt_path" in out


def test_print_config_repeats_the_run(project, capsys):
    assert main(["fit", "--config", "run.yaml", "--print_config"]) == 0
    text = capsys.readouterr().out
    (project / "printed.yaml").write_text(text)
    assert main(["fit", "--config", "printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == text
    assert "seed: " in text
    assert "log_every_n_steps: 50" in text
    assert not (project / "out").exists()


def test_help_shows_arguments_types_defaults_and_texts(project, capsys):
    assert main(["fit", "--help", "--task", "cli_project.Net"]) == 0
    out = capsys.readouterr().out
    assert "--trainer.max_epochs  int or null (default: null)\n      " in out
    assert "--task.width  int (required)\n      How many inputs.\n" in out
    assert "--task.loss  'mse' or 'l1' (default: 'mse')\n" in out


def test_every_argument_of_the_trainer_has_a_text():
    known, _ = arguments(lk.Trainer)
    assert [name for name, argument in known.items() if not argument.text] == []
    assert [name for name, argument in known.items() if argument.annotation is Any] == []


def test_short_help_and_version(project, capsys):
    assert main([]) == 0
    assert "lightkit new TEMPLATE FOLDER" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightkit {lk.__version__}\n"


def test_each_command_has_a_help_of_its_own(project, capsys):
    """What to type, what it does and its own flags; ``help COMMAND`` is the same."""
    known = {
        "fit": ["usage: lightkit fit --config FILE", "\ntrain a task\n", "--trainer.max_epochs"],
        "predict": ["usage: lightkit predict", "--output FILE"],
        "new": ["usage: lightkit new TEMPLATE FOLDER\n", "\n  digits    "],
        "export": ["usage: lightkit export CHECKPOINT FILE", "\n  .onnx   ", "\n  .ckpt   "],
    }
    for command, parts in known.items():
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(part in out for part in parts), out
        assert "lightkit fit|" not in out
        assert ("--output" in out) == (command == "predict")
        assert ("--ckpt_path" in out) == (command in ("fit", "predict"))
        assert main(["help", command]) == 0
        assert capsys.readouterr().out == out
    assert main(["help"]) == main(["--help"]) == 0
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second


def test_the_users_own_error_keeps_its_traceback(project):
    words = ["fit", "--config", "run.yaml", "--task", "cli_project.Broken", "--task.width", "2"]
    done = start(*words, cwd=project)
    assert done.returncode == 1
    assert 'raise ZeroDivisionError("mine")' in done.stderr


def test_an_error_of_the_trainer_is_one_line_without_a_traceback(project):
    done = start("fit", "--config", "run.yaml", "--trainer.precision", "17", cwd=project)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


def test_a_lightkit_error_that_passes_through_user_code_is_raised(project, monkeypatch):
    import lightkit.config

    def users_code():
        raise lk.errors.UsageError("mine")

    monkeypatch.setattr(lightkit.config, "build", lambda config: users_code())
    with pytest.raises(lk.errors.UsageError, match="mine"):
        main(["fit", "--config", "run.yaml"])


def test_new_project(project, capsys):
    assert main(["new", "--list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["new", "digits", "mine"]) == 0
    assert capsys.readouterr().out.endswith("cd mine\n  lightkit fit --config config.yaml\n")
    assert (project / "mine" / "config.yaml").is_file()
    assert main(["new", "digits", "mine"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(project, capsys):
    (project / "file").write_text("")
    assert main(["new", "digits", "file/mine"]) == 2
    assert capsys.readouterr().err.startswith("error: file/mine: Not a directory.")


def test_programs_that_are_not_on_the_path_are_given_with_theirs(project, monkeypatch, capsys):
    """As after ``.venv/bin/lightkit new`` in an environment that is not active."""
    programs = project / "environment" / "bin"
    programs.mkdir(parents=True)
    for name in ("lightkit", "tensorboard"):
        (programs / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(project))
    assert main(["new", "digits", "mine"]) == 0
    assert f"cd mine\n  {programs}/lightkit fit --config" in capsys.readouterr().out
    assert main(["fit", "--config", "run.yaml", "--trainer.logger", "true"]) == 0
    said = capsys.readouterr()
    assert "curves:   environment/bin/tensorboard --logdir out/" in said.out + said.err


def test_demo_is_computed_by_one_thread(project, monkeypatch, capsys):
    """Small as it is, it gains nothing from more, and on a busy machine they wait for each other."""
    pytest.importorskip("sklearn")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--print_config"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_demo_trains_the_digits_and_ends_with_their_curves(project, monkeypatch, capsys):
    """In any folder, a second time too; narrow, in a pipe and without colors."""
    pytest.importorskip("sklearn")
    monkeypatch.setenv("COLUMNS", "40")
    words = ["demo", "--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]
    done = start(*words, cwd=project, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert main(words) == 0
    for version, out in enumerate((done.stdout, capsys.readouterr().out)):
        assert "\x1b" not in out
        lines = out[out.index("train_loss, epochs 1 to 2") :].splitlines()
        assert [lines[i] for i in (4, 8)] == [
            "val_loss, epochs 1 to 2",
            "val_accuracy, epochs 1 to 2",
        ]
        assert lines[12].startswith("best:     epoch ")
        assert max(map(len, lines[:-3])) <= 40
        assert out.count("best:") == 1
        folder = f"runs/DigitsNet/version_{version}"
        assert lines[-2:] == [f"results:  {folder}", f"curves:   tensorboard --logdir {folder}"]
    best = f"{folder}/checkpoints/best.ckpt"  # what it leaves behind is a run like any other
    assert main(["test", "--config", f"{folder}/config.yaml", "--ckpt_path", best]) == 0
    assert "test_accuracy" in capsys.readouterr().out


def test_demo_without_scikit_learn_names_the_extra(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 2
    assert "pip install 'lightkit[examples]'" in capsys.readouterr().err


def test_demo_takes_the_flags_of_fit_and_no_file_or_folder(project, capsys):
    pytest.importorskip("sklearn")
    assert main(["demo", "--task.width", "4", "--print_config"]) == 0
    assert "width: 4" in capsys.readouterr().out
    for words in (["demo", "digits"], ["demo", "--output", "here.pt"], ["demo", "--list"]):
        assert main(words) == 2
        assert "demo" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(project, monkeypatch):
    import lightkit.config

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(lightkit.config, "build", interrupted)
    assert main(["fit", "--config", "run.yaml"]) == 130
