"""What is declared, what is shipped, and that the README's commands are the gate's commands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightkit

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def declared(name: str) -> list[str]:
    """Returns the names of the packages in a list of pyproject.toml."""
    block = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert block, name
    return re.findall(r'"([A-Za-z0-9_-]+)(?:\[[\w,]*\])?[<>=~! .\d]*"', block[1])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_one_version():
    assert re.search(r'^version = "(.+?)"', PYPROJECT, re.MULTILINE)[1] == lightkit.__version__
    assert f"## [{lightkit.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_everything_declared_is_pinned():
    names = {"torch", "pytest", *declared("dependencies"), *declared("dev")} - {"lightkit"}
    for extra in ("examples", "plot"):
        names |= set(re.findall(r'"([\w-]+)>', re.search(rf"^{extra} = (.*)$", PYPROJECT, re.M)[1]))
    assert {name.lower() for name in names} <= set(pins())
    assert len(names) > 10
    assert pins()["torch"] == "2.13.0"


def test_every_dependency_has_its_reason():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^\| ([\w-]+) \| (.+?) \|", page, re.MULTILINE))
    for name in [*declared("dependencies"), *declared("dev")]:
        assert name == "lightkit" or reasons.get(name), f"{name}: no line in docs/dependencies.md"


def test_everything_imported_is_declared():
    """What the code imports from elsewhere is a dependency, or an extra that is asked for nicely."""
    modules = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    known = {modules.get(name, name) for name in declared("dependencies")}
    known |= {"matplotlib", "pandas"}  # the extra "plot": history.py says so where one is missing
    known |= {"onnx", "onnxruntime", "onnxscript", "safetensors"}  # the extra "export", likewise
    known |= {"sklearn"}  # the extra "sklearn": sklearn.py says so where it is missing
    known |= {"wandb"}  # the extra "wandb": its logger says so where it is missing
    known |= {"numpy", "IPython"}  # only where it is there already
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for path in (ROOT / "lightkit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported - known - set(sys.stdlib_module_names) <= {"lightkit"}


def test_the_gate_uses_the_readme():
    """`.ci/run` takes its commands from the README, so the two marks must stand around one."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- test command -->" in script
    block = README.partition("<!-- test command -->")[2].partition("<!-- /test command -->")[0]
    commands = [line for line in block.splitlines() if line.startswith("python3")]
    assert len(commands) == 1
    setup, _, tests = commands[0].rpartition(" && ")
    assert setup.startswith("python3 -m venv .venv && ")
    assert "-c constraints.txt" in setup
    assert tests.startswith(".venv/bin/pytest")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_main_job_of_the_readme_exists():
    command = re.search(r"^python3 .*&& .venv/bin/lightkit (.*)$", README, re.MULTILINE)[1]
    assert command == "fit --config configs/digits.yaml"
    assert (ROOT / "configs" / "digits.yaml").is_file()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, where it would be installed."""
    pytest.importorskip("hatchling")
    built, folder = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    info = f"lightkit-{lightkit.__version__}.dist-info"
    assert sorted(path.name for path in installed.iterdir()) == ["lightkit", info]
    assert (installed / "lightkit" / "py.typed").is_file()
    code = {path.relative_to(ROOT) for path in (ROOT / "lightkit").rglob("*.py")}
    shipped = {path.relative_to(installed) for path in (installed / "lightkit").rglob("*.py")}
    assert {path for path in shipped if "_shared" not in path.parts} == code


def test_the_wheel_holds_templates_and_configs(installed):
    for kind in ("templates", "configs"):
        ours = {path.relative_to(ROOT) for path in (ROOT / kind).rglob("*") if path.is_file()}
        ours = {path for path in ours if not {"__pycache__", "runs"} & set(path.parts)}
        base = installed / "lightkit" / "_shared"
        assert {path.relative_to(base) for path in (base / kind).rglob("*.*")} == ours


def test_new_and_demo_from_an_installed_wheel(installed, tmp_path):
    """Outside the clone, with the package from the wheel: a project that can be configured."""
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}

    def python(*args: str, cwd: Path) -> str:
        command = [sys.executable, *args]
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import lightkit; print(lightkit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert "digits" in python("-m", "lightkit", "new", "--list", cwd=tmp_path)
    python("-m", "lightkit", "new", "digits", "my-project", cwd=tmp_path)
    project = tmp_path / "my-project"
    options = ("--config", "config.yaml", "--print_config")
    resolved = python("-m", "lightkit", "fit", *options, cwd=project)
    assert "class_path: model.DigitsNet" in resolved
    assert "class_path: data.DigitsData" in resolved
    # A folder of the user's that has the same name as that of the templates is not in the way.
    (project / "templates").mkdir()
    (project / "templates" / "__init__.py").touch()
    short = ("--trainer.fast_dev_run", "2")
    assert "val_accuracy, epoch 1: " in python("-m", "lightkit", "demo", *short, cwd=project)
