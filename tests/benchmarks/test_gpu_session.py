"""The script of a first session on a GPU: a part that fails is said, and the next one begins."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["doctor", "smoke", "smoke-network", "tests", "throughput-4", "growth_cost", "wallclock"]


def session(tmp_path: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of the rehearsal, with a Python that fails where its words match `FAILING`."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "words: $*"\necho "$*" | grep -Eq -- "$FAILING" && exit 3\nexit 0\n')
    python.chmod(0o755)
    variables = (
        os.environ | {"SMALL": "1", "OUT": str(tmp_path / "out"), "PY": str(python), "FAILING": "^$"} | environment
    )
    command = ["bash", str(ROOT / "benchmarks" / "gpu_session.sh")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "out" / "log.txt").read_text() == done.stdout
    return done.returncode, done.stdout


def test_all_parts_run_and_their_logs_are_kept(tmp_path: Path) -> None:
    code, out = session(tmp_path)
    assert code == 0
    assert re.findall(r"^=== (\S+): ok", out, re.M) == PARTS
    assert "all parts are done" in out
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert {f"./{part}.log" for part in PARTS} <= set(archive.getnames())


@pytest.mark.parametrize(
    ("failing", "part"), [("doctor", "doctor"), ("pytest", "tests"), ("throughput", "throughput-4")]
)
def test_a_part_that_fails_is_said_and_the_next_one_begins(failing: str, part: str, tmp_path: Path) -> None:
    code, out = session(tmp_path, FAILING=failing)
    assert code == 1
    assert re.findall(r"^=== (\S+): ok", out, re.M) == [each for each in PARTS if each != part]
    assert f"=== {part}: FAILED, exit code 3" in out
    assert re.search(rf"^=== FAILED after \d+ s: {part} \(exit code 3\)$", out, re.M)


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", (ROOT / "benchmarks" / "gpu_session.sh").read_text())
    assert len(named) >= 6
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_a_run_that_fails_is_tried_eagerly(tmp_path: Path) -> None:
    code, out = session(tmp_path, FAILING="--run-dir .*/smoke$")
    assert code == 1
    assert "=== smoke: FAILED" in out
    assert "=== smoke-eager: ok" in out


def test_what_there_is_no_time_for_counts_as_failed(tmp_path: Path) -> None:
    code, out = session(tmp_path, LIMIT="10")
    assert code == 1
    assert "=== wallclock: SKIPPED" in out


def test_on_a_gpu_it_uses_many_environments_few_profiled_steps_and_shows_warnings(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code, out = session(tmp_path, SMALL="", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert code == 0
    words = dict(re.findall(r"^words: (?:-W default )?(\S+ ?\S*) (.*)$", out, re.M))
    assert "--num-envs 64" in words["-m growtrain"]
    assert "-W default" in words["-m pytest"]
    (wallclock,) = re.findall(r"words: -W default benchmarks/run_wallclock.py (.*)", out)
    assert "--num-envs 64" in wallclock
    throughput = re.findall(r"words: -W default benchmarks/throughput.py (.*)", out)
    assert [re.search(r"--num-envs (\d+)", each)[1] for each in throughput] == ["64", "8"]  # type: ignore[index]
    assert all("--profile-steps 20" in each for each in throughput)
