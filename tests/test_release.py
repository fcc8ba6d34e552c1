"""The workflow that publishes a release, as far as that shows without running it there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import lightkit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)
BUILD, PUBLISH = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]
COMMANDS = {step["name"]: step["run"] for step in BUILD["steps"] if "run" in step}


def test_only_a_tag_starts_it():
    assert WORKFLOW[True] == {"push": {"tags": ["v[0-9]*"]}}  # YAML takes "on" for true


def test_it_has_no_secret_and_only_the_upload_has_a_right():
    code = re.sub(r"#.*", "", TEXT)
    assert not re.search(r"secrets|password|(?<!id-)token", code)
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in BUILD
    assert PUBLISH["permissions"] == {"id-token": "write"}
    assert (PUBLISH["needs"], PUBLISH["environment"]) == ("build", "release")


def test_the_upload_runs_nothing_of_ours():
    """What has the right to publish only fetches the files that were checked."""
    used = [step["uses"].partition("@")[0] for step in PUBLISH["steps"]]
    assert used == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]
    assert not any("run" in step for step in PUBLISH["steps"])


def test_every_action_is_one_commit():
    """A tag can be moved to other code, which would then publish; what it was stands beside."""
    lines = re.findall(r"uses: (.+)", TEXT)
    assert len(lines) == sum("uses" in step for job in (BUILD, PUBLISH) for step in job["steps"])
    for line in lines:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)


def test_the_gate_comes_before_the_build():
    names = list(COMMANDS)
    assert COMMANDS["The gate"] == ".ci/run"
    assert names.index("The gate") < names.index("Build")


@pytest.mark.parametrize(("tag", "code"), [(f"v{lightkit.__version__}", 0), ("v9.9.9", 1)])
def test_the_tag_must_be_the_version(tag, code):
    environment = os.environ | {"GITHUB_REF_NAME": tag}
    command = ["bash", "-e", "-c", COMMANDS["The tag is the version"]]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == code


def test_the_source_archive_holds_what_its_tests_read(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {".ci/run", ".github/workflows/release.yml", "SECURITY.md", "docs/stability.md",
              "tests/fixtures/version_0_1_0/numbers.json", "pyproject.toml"}  # fmt: skip
    assert wanted <= names
    assert not [name for name in names if name.startswith(("runs/", "shared/"))]
