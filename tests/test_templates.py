"""Every template runs where it lies, and as a copy; and keeps the promise of its README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightkit._share import copy_template, share_dir, templates
from lightkit.errors import ConfigError
from tests import own_data

ROOT = Path(__file__).parents[1]
#: What each README promises of the last epoch: a name, "at least" or "at most", and a number.
PROMISES = {
    "digits": ("val_accuracy", "at least", 0.97),
    "gan": ("val_f1", "at least", 0.5),
    "language-model": ("val_bits", "at most", 2.8),
    "recurrent": ("val_accuracy", "at least", 0.94),
    "segmentation": ("val_iou", "at least", 0.83),
    "tabular": ("val_accuracy", "at least", 0.94),
    "transfer": ("val_accuracy", "at least", 0.8),
    "vae": ("val_loss", "at most", 26),
}

pytest.importorskip("sklearn")


def lightkit(*args: str, cwd: Path) -> str:
    """Runs the command line in a process of its own, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "lightkit", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_values(run: Path) -> dict[str, float]:
    """Returns the last value of each name in a run's metrics file."""
    values: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values |= json.loads(line)
    return values


@pytest.mark.parametrize("name", templates())
def test_complete(name):
    folder = share_dir("templates") / name.replace("-", "_")
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"README.md", "model.py", "data.py", f"test_{folder.name}.py"} <= files
    assert (share_dir("configs") / f"{folder.name}.yaml").is_file()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {name}: ")
    value, bound, number = PROMISES[name]
    assert f"`{value}` of {bound} {number}" in readme
    assert "\n## With your own data" in readme


@pytest.mark.parametrize("name", templates())
def test_a_page_of_the_docs_shows_the_guide_and_the_code(name):
    page = (ROOT / f"docs/template-{name}.md").read_text(encoding="utf-8")
    folder = ROOT / "templates" / name.replace("-", "_")
    files = [path for path in folder.glob("*.py") if not path.name.startswith("test_")]
    shown = {f"templates/{folder.name}/{file}" for file in ("README.md", *(f.name for f in files))}
    assert set(re.findall(r'--8<-- "(.+)"', page)) == shown
    assert f"](template-{name}.md)" in (ROOT / "docs/how-to.md").read_text(encoding="utf-8")


def test_templates_are_listed_with_a_line_each():
    assert set(templates()) == set(PROMISES)
    assert all(10 < len(line) < 80 for line in templates().values())


@pytest.mark.parametrize("name", templates())
def test_in_the_clone(name, tmp_path):
    lightkit(
        *("fit", "--config", f"configs/{name.replace('-', '_')}.yaml"),
        *("--trainer.fast_dev_run", "true"),
        *("--trainer.default_root_dir", str(tmp_path)),
        cwd=ROOT,
    )
    assert list(tmp_path.iterdir()) == []  # fast_dev_run leaves nothing behind


#: The others are trained whole by hand; in every run they are tried on a few batches.
COPIES = [
    name if name == "digits" else pytest.param(name, marks=pytest.mark.slow) for name in templates()
]


@pytest.mark.parametrize("name", COPIES)
def test_as_a_copy(name, tmp_path):
    """The commands that `lightkit new` prints, the figure of the README, and the copy's tests."""
    project = tmp_path / "my-project"
    said = lightkit("new", name, "my-project", cwd=tmp_path)
    commands = re.findall(r"^ +lightkit (.+)$", said, re.MULTILINE)
    assert commands == ["fit --config config.yaml"]
    lightkit(*commands[0].split(), cwd=project)

    (run,) = (project / "runs").glob("*/version_0")
    value, bound, number = PROMISES[name]
    reached = last_values(run)[value]
    assert reached >= number if bound == "at least" else reached <= number
    best = run / "checkpoints" / "best.ckpt"
    lightkit(*("test", "--config", str(run / "config.yaml"), "--ckpt_path", str(best)), cwd=project)

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_photos_of_dogs_and_cats(tmp_path):
    """The code for torchvision runs, with what `tests/stand_ins` has in the place of it."""
    copy_template("transfer", tmp_path / "copy")
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "copy" / "photos" / part / kind
            own_data.pictures(folder, 4, np.random.default_rng(0))
    # Only what comes after torchmetrics finds it, which would import more from torchvision.
    begin = f"import sys, torchmetrics; sys.path.insert(0, {str(ROOT / 'tests/stand_ins')!r}); "
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    fit = "fit --task model.PhotoNet --data data.Photos --data.folder photos --data.size 32"
    assert fit.partition(" --data.size")[0] in (tmp_path / "copy/README.md").read_text("utf-8")
    fit += " --data.num_workers 0 --trainer.max_epochs 3"
    for code in (
        f"import lightkit.cli; sys.exit(lightkit.cli.main({fit.split()}))",
        "import pytest; sys.path.insert(0, '.'); sys.exit(pytest.main(['-k', 'photos']))",
    ):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", begin + code],
            cwd=tmp_path / "copy",
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_a_copy_is_rewritten(tmp_path):
    target = tmp_path / "deep" / "project"
    written = copy_template("digits", target)
    assert written == sorted(path for path in target.rglob("*") if path.is_file())
    assert {"config.yaml", "model.py", "README.md"} <= {path.name for path in written}
    config = (target / "config.yaml").read_text(encoding="utf-8")
    assert "class_path: model.DigitsNet" in config
    assert "lightkit fit --config config.yaml" in config
    assert "templates." not in config
    assert not list(target.rglob("__pycache__"))


def test_a_name_of_two_words_in_either_spelling(tmp_path):
    for spelling in ("language-model", "language_model"):
        files = {path.name for path in copy_template(spelling, tmp_path / spelling)}
        assert {"config.yaml", "test_language_model.py"} <= files
        config = (tmp_path / spelling / "config.yaml").read_text(encoding="utf-8")
        assert "class_path: model.LanguageModel" in config
        assert "lightkit fit --config config.yaml" in config


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / ".git").mkdir()  # as `git init` leaves it
    assert copy_template("tabular", tmp_path)


def test_a_folder_with_a_space_can_be_pasted(tmp_path):
    assert "\n  cd 'my project'\n" in lightkit("new", "tabular", "my project", cwd=tmp_path)


def test_wrong_targets(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty"):
        copy_template("digits", tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.txt' is a file"):
        copy_template("digits", tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match=r"no template 'digit'\. Did you mean 'digits'\?"):
        copy_template("digit", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
