"""What a run ran on."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

import growtrain
from growtrain.runs import provenance


def test_a_package_that_was_never_installed_is_said_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> str:
        if package == "growtrain":  # imported from its directory
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(provenance, "version", installed)
    assert provenance.versions()["growtrain"] == "not installed"
    assert provenance.versions()["torch"] == version("torch")


def test_a_resume_on_another_instruction_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(capability: str) -> dict[str, Any]:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
        return provenance.describe_machine(torch.device("cpu"))

    before, after = on("AVX512"), on("AVX2")
    assert provenance.differences(before, before) == []
    assert [("AVX512" in text, "AVX2" in text) for text in provenance.differences(before, after)] == [(True, True)]


# The commit

SOURCE = Path(growtrain.__file__).parent


def repository(directory: Path) -> str:
    """Makes a repository with one commit of all that is there; returns the commit."""
    git = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def commit_said_by(place: Path, **environment: str) -> str:
    """What the package that lies in `place` says when it is run from within."""
    command = [
        sys.executable,
        "-c",
        "import growtrain.runs.source_tree as p; print(p.__file__, p.git_state()['git_commit'])",
    ]
    variables = os.environ | {"PYTHONPATH": str(place)} | environment
    out = subprocess.run(command, cwd=place, env=variables, check=True, capture_output=True, text=True).stdout
    file, commit = out.split()
    assert Path(file).is_relative_to(place)
    return commit


def copy_package(place: Path) -> None:
    shutil.copytree(SOURCE, place / "growtrain", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("place", [".venv/lib/python3/site-packages", "third_party/growtrain", "."])
def test_a_package_within_somebodys_repository_does_not_name_theirs(place: str, tmp_path: Path) -> None:
    """Installed into it, with the source tree copied into it, or lying at its top."""
    copy_package(tmp_path / place)
    if place == "third_party/growtrain":
        shutil.copy(SOURCE.parent / "pyproject.toml", tmp_path / place)
    if place == ".":
        (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    repository(tmp_path)
    assert commit_said_by(tmp_path / place) == "None"


def test_a_source_tree_names_its_own_commit_whatever_a_hook_says(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    copy_package(own)
    shutil.copy(SOURCE.parent / "pyproject.toml", own)
    theirs.mkdir()
    commit, other = repository(own), repository(theirs)
    assert commit != other
    assert commit_said_by(own) == commit
    with (own / "growtrain" / "runs" / "loop.py").open("a") as file:
        file.write("# changed\n")
    command = [sys.executable, "-c", "import growtrain.runs.source_tree as p; print(p.git_state()['git_modified'])"]
    out = subprocess.run(
        command, cwd=own, env=os.environ | {"PYTHONPATH": str(own)}, check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == "True"
    assert commit_said_by(own, GIT_DIR=str(theirs / ".git"), GIT_WORK_TREE=str(theirs)) == commit
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "growtrain").symlink_to(own / "growtrain")  # as some editable installs do
    command = [sys.executable, "-c", "import growtrain.runs.source_tree as p; print(p.git_state()['git_commit'])"]
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "linked")}
    out = subprocess.run(command, cwd=theirs, env=variables, check=True, capture_output=True, text=True).stdout
    assert out.strip() == commit
